"""`qemu-postcopy list` tells what is served from what only was, and falls for nothing it reads."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from qemu_postcopy import listing
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord
from qemu_postcopy.vm.process import ProcessIdentity

DEAD = 1 << 22  # above pid_max


@pytest.fixture
def base(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QEMU_POSTCOPY_RUN_DIR", str(run_dir / "base"))
    return run_dir / "base"


def record_of(pid: int, state: str, **changes: object) -> SessionRecord:
    with ProcessIdentity.open(pid) as identity:
        return SessionRecord("/image", state, pid, identity.start_time, **changes)  # type: ignore[arg-type]


def test_living_ended_unused_and_damaged_are_told_apart(base: Path) -> None:
    living = RunDirectory.create("living")
    full = {"pages_data": 8, "pages_data_missing": 2}
    living.write_record(record_of(os.getpid(), "detached", statistics=full))
    living.release()
    ended = RunDirectory.create("ended")
    ended.write_record(SessionRecord("/image", "running", DEAD, 1, statistics=full))
    ended.release()
    RunDirectory.create("unused").release()
    damaged = RunDirectory.create("damaged")
    (damaged.path / "session.json").write_text("{")
    damaged.release()
    begun = RunDirectory.create("begun")

    found = {entry["name"]: entry for entry in listing.collect()}
    assert {name: (e["state"], e["stale"], e["filled"]) for name, e in found.items()} == {
        "living": ("detached", False, 100.0),
        "ended": ("ended", True, 75.0),
        "unused": ("unused", True, None),
        "damaged": ("damaged", False, None),
        "begun": ("unused", False, None),
    }
    assert listing.prune() == ["ended", "unused"]
    assert sorted(entry["name"] for entry in listing.collect()) == ["begun", "damaged", "living"]
    begun.release()


def test_directories_of_another_kind_are_neither_shown_nor_removed(base: Path) -> None:
    RunDirectory.create("ours").release()
    others = [base / "lock", base / "systemd"]
    others[0].mkdir(mode=0o755)
    others[1].mkdir()
    (others[1].parent / "systemd" / "notify").touch()
    assert [entry["name"] for entry in listing.collect()] == ["ours"]
    assert listing.prune() == ["ours"]
    assert all(path.is_dir() for path in others)


def test_the_image_that_was_made_for_a_guest_goes_with_its_directory(base: Path) -> None:
    run = RunDirectory.create("ended")
    run.write_record(SessionRecord("/image", "running", DEAD, 1))
    image = base.parent / ".guest.save.1.qpc"
    image.mkdir()
    (image / "manifest.json").touch()
    run.note_disposable(image)
    run.release()
    assert listing.prune() == ["ended"]
    assert not image.exists()


def test_a_libvirt_domain_goes_by_its_own_name_and_is_told_when_nobody_serves_it(
    base: Path,
) -> None:
    words = ["-name", "guest=my web,,server,debug-threads=on"]
    guest = subprocess.Popen(["sh", "-c", "echo; read line", "sh", *words],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert guest.stdout is not None and guest.stdin is not None
    try:
        guest.stdout.readline()
        run = RunDirectory.create("my_web_server")
        run.write_record(record_of(guest.pid, "running", qmp="libvirt:qemu:///system#some-uuid"))
        run.release()
        (entry,) = listing.collect()
        assert entry["domain"] == "my web,server"
        assert (entry["uri"], entry["uuid"]) == ("qemu:///system", "some-uuid")
        assert (entry["state"], entry["sidecar_pid"], entry["stale"]) == ("waiting", 0, False)
        assert "does not answer" in entry["trouble"]
    finally:
        guest.stdin.close()
        guest.wait()


@pytest.mark.parametrize("kind", ["link", "fifo", "lies"])
def test_nothing_in_a_run_directory_is_believed_or_waited_for(base: Path, kind: str) -> None:
    run = RunDirectory.create("vm")
    path = run.path / "session.json"
    if kind == "link":
        (base / "elsewhere").write_text(json.dumps({"image": "/image", "state": "detached"}))
        path.symlink_to(base / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.write_text(json.dumps({"image": "/image", "state": "running", "pid": "1"}))
    (entry,) = listing.collect()
    assert entry["state"] == "damaged"
    run.release()
