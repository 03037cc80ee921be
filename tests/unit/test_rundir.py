"""Run directories: private, one per guest, and never somebody else's."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_postcopy.errors import HostError, SidecarError, StateError, UsageError
from qemu_postcopy.sidecar.rundir import (
    RunDirectory,
    SessionRecord,
    base_directory,
    list_directories,
)
from qemu_postcopy.sidecar.supervisor import supervise
from qemu_postcopy.vm.process import ProcessIdentity

NOBODY = 65534


@pytest.fixture
def base(run_dir: Path) -> Path:
    return run_dir / "base"


def record_of_this_process(state: str = "running") -> SessionRecord:
    with ProcessIdentity.open(os.getpid()) as identity:
        return SessionRecord("/image", state, identity.pid, identity.start_time)


def test_directory_and_record_are_private(base: Path) -> None:
    run = RunDirectory.create("vm", base)
    run.write_record(SessionRecord("/image", "new"))
    assert stat.S_IMODE(base.stat().st_mode) == 0o700
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((run.path / "session.json").stat().st_mode) == 0o600


def test_record_comes_back_as_it_was_written(base: Path) -> None:
    run = RunDirectory.create("vm", base)
    record = SessionRecord(
        "/image", "running", 1, 2, blocks=[{"name": "m0", "address": 3, "length": 4}]
    )
    run.write_record(record)
    assert RunDirectory.find("vm", base).read_record() == record
    run.update_record(state="detached")
    found = run.read_record()
    assert found is not None
    assert (found.state, found.pid) == ("detached", 1)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "-x", ".x", "a b", "ä", "x" * 49])
def test_name_that_cannot_be_one(name: str, base: Path) -> None:
    with pytest.raises(UsageError, match="cannot be a guest's name") as caught:
        RunDirectory.create(name, base)
    assert "--name" in caught.value.hint
    assert not base.exists()
    with pytest.raises(SidecarError):
        RunDirectory.find(name, base)


def test_path_too_long_for_a_socket(run_dir: Path) -> None:
    with pytest.raises(UsageError, match="too long for sockets") as caught:
        RunDirectory.create("vm", run_dir / ("x" * 90))
    assert "QEMU_POSTCOPY_RUN_DIR" in caught.value.hint


def test_name_of_a_guest_that_lives_is_refused(base: Path) -> None:
    RunDirectory.create("vm", base).write_record(record_of_this_process())
    with pytest.raises(StateError, match=f"vm runs already .PID {os.getpid()}") as caught:
        RunDirectory.create("vm", base)
    assert "--name" in caught.value.hint


def test_directory_of_a_guest_that_has_ended_is_emptied(base: Path) -> None:
    run = RunDirectory.create("vm", base)
    living = record_of_this_process()
    # Same PID, other process: the start time tells.
    run.write_record(SessionRecord("/image", "running", living.pid, living.start_time - 1))
    (run.path / "console.log").write_text("old")
    run.release()
    assert list(RunDirectory.create("vm", base).path.iterdir()) == []


def test_directory_of_a_restore_that_failed_is_emptied_though_qemu_lives(base: Path) -> None:
    """A QEMU of somebody else's waits on for the next try."""
    run = RunDirectory.create("vm", base)
    run.write_record(record_of_this_process("failed"))
    run.release()
    assert list(RunDirectory.create("vm", base).path.iterdir()) == []


def test_directory_of_another_kind_is_not_emptied(base: Path) -> None:
    (base / "mail").mkdir(parents=True, mode=0o700)
    (base / "mail" / "letter").touch()
    base.chmod(0o700)
    with pytest.raises(UsageError, match="no run directory"):
        RunDirectory.create("mail", base)
    assert (base / "mail" / "letter").exists()


def test_name_that_is_being_restored_is_refused(base: Path) -> None:
    """Also in the time before there is a record of it."""
    run = RunDirectory.create("vm", base)
    with pytest.raises(StateError, match="vm is being restored"):
        RunDirectory.create("vm", base)
    run.release()
    RunDirectory.create("vm", base).release()


@pytest.mark.needs("root")
@pytest.mark.parametrize("which", ["base", "guest"])
def test_directory_of_somebody_else_is_not_used(which: str, base: Path) -> None:
    run = RunDirectory.create("vm", base)
    run.write_record(SessionRecord("/image", "running"))
    assert [entry.name for entry in list_directories(base)] == ["vm"]
    os.chown(base if which == "base" else run.path, NOBODY, NOBODY)
    (run.path / "kept").write_text("theirs")
    with pytest.raises(HostError, match=f"belongs to user {NOBODY}") as caught:
        RunDirectory.create("vm", base)
    assert "QEMU_POSTCOPY_RUN_DIR" in caught.value.hint
    assert (run.path / "kept").read_text() == "theirs"
    # What is listed is ours itself, wherever it lies.
    listed = {"base": ["vm"], "guest": []}[which]
    assert [entry.name for entry in list_directories(base)] == listed


def test_directory_that_others_can_write_is_not_used(base: Path) -> None:
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(HostError, match="can be written by others") as caught:
        RunDirectory.create("vm", base)
    assert f"chmod go-w {base}" in caught.value.hint


def test_link_in_the_place_of_a_directory_is_not_followed(base: Path, run_dir: Path) -> None:
    base.mkdir(mode=0o700)
    (run_dir / "elsewhere").mkdir()
    (run_dir / "elsewhere" / "kept").write_text("precious")
    (base / "vm").symlink_to(run_dir / "elsewhere")
    with pytest.raises(HostError, match="is not a directory"):
        RunDirectory.create("vm", base)
    assert (run_dir / "elsewhere" / "kept").read_text() == "precious"


def test_unknown_guest_is_answered_with_the_known_ones(base: Path) -> None:
    for name in ("one", "two"):
        RunDirectory.create(name, base).write_record(SessionRecord("/image", "running"))
    with pytest.raises(SidecarError, match="no guest named three") as caught:
        RunDirectory.find("three", base)
    assert "one, two" in caught.value.hint
    assert [run.name for run in list_directories(base)] == ["one", "two"]


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"image": "x"}', '{"surprise": 1}'])
def test_damaged_record_is_said_to_be_damaged(text: str, base: Path) -> None:
    run = RunDirectory.create("vm", base)
    (run.path / "session.json").write_text(text)
    with pytest.raises(SidecarError, match="is damaged"):
        run.read_record()


@pytest.mark.parametrize(("pid", "start_time"), [(0, 0), (-1, 0), (1 << 40, 1)])
def test_record_without_a_process_is_of_no_living_guest(pid: int, start_time: int) -> None:
    assert not RunDirectory.guest_alive(SessionRecord("/image", "new", pid, start_time))


def test_place_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QEMU_POSTCOPY_RUN_DIR", "/somewhere")
    assert base_directory() == Path("/somewhere")


def test_record_is_readable_by_scripts(base: Path) -> None:
    run = RunDirectory.create("vm", base)
    run.write_record(SessionRecord("/image", "running", pid=7))
    assert json.loads((run.path / "session.json").read_text())["pid"] == 7


@pytest.fixture
def replaced(base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RunDirectory]]:
    """The next lock is had when another process has just restored under the same name."""
    flock, others = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        others.append(RunDirectory.create("vm", base))
        others[0].write_record(record_of_this_process("serving"))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    yield others
    for other in others:
        other.release()


@pytest.mark.parametrize("how", ["create", "lock"])
def test_lock_of_a_directory_that_was_replaced_is_none(
    how: str, base: Path, replaced: list[RunDirectory]
) -> None:
    path = base / "vm"
    path.mkdir(mode=0o700, parents=True)
    base.chmod(0o700)
    with pytest.raises(StateError, match="removed or replaced"):
        RunDirectory.create("vm", base) if how == "create" else RunDirectory(path).lock()
    (other,) = replaced
    assert other.read_record() is not None
    assert other.is_served()


def test_lock_that_is_refused_is_not_kept_open(base: Path) -> None:
    run = RunDirectory.create("vm", base)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(StateError, match="is being restored or served"):
            RunDirectory(run.path).lock()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_supervisor_of_a_directory_that_was_replaced_leaves_the_next_guest_alone(
    base: Path, replaced: list[RunDirectory]
) -> None:
    path = base / "vm"
    path.mkdir(mode=0o700, parents=True)
    base.chmod(0o700)
    said: list[str] = []
    supervise(RunDirectory(path), said.append)
    (other,) = replaced
    assert said == []
    assert not other.supervisor_notes.exists()
