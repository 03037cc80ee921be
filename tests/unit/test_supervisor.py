"""Promise: what a supervisor cannot do now it tries again, and says so; it never just ends."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qemu_postcopy.errors import GuestEndedError, SidecarError
from qemu_postcopy.session import StateChange
from qemu_postcopy.sidecar import supervisor
from qemu_postcopy.sidecar.process import Job
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord


@pytest.fixture
def run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """Of a guest that needs a sidecar until one has run."""
    made = RunDirectory.create("vm", run_dir / "run")
    made.write_record(SessionRecord(image="vm.qpc", state="running", sidecar_pid=1))
    made.release()

    def recovering(run: RunDirectory) -> Job:
        async def job(listener: Callable[[StateChange], None]) -> None:
            (run.path / "served").touch()
            raise GuestEndedError("ended", vm="vm")

        return job  # type: ignore[return-value]

    def needs_sidecar(run: RunDirectory, record: SessionRecord) -> bool:
        return not (run.path / "served").exists()

    monkeypatch.setattr(supervisor, "recovering", recovering)
    monkeypatch.setattr(supervisor, "needs_sidecar", needs_sidecar)
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_SECONDS", 0.01)
    return made


class Notes:
    """What `status` could have read while it went on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        inner = supervisor.note

        def note(run: RunDirectory, failures: int, trouble: str) -> None:
            inner(run, failures, trouble)
            self.seen.append(json.loads(run.supervisor_notes.read_text())["trouble"])

        monkeypatch.setattr(supervisor, "note", note)


@pytest.mark.parametrize("call", ["fork", "pipe"])
def test_where_no_process_can_be_had_it_tries_again(
    call: str, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, inner = Notes(monkeypatch), getattr(os, call)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    def once_refused() -> object:
        monkeypatch.setattr(os, call, inner)
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, call, once_refused)
    supervisor.supervise(run, lambda _: None)
    assert "temporarily unavailable" in notes.seen[0]
    assert (run.path / "served").exists()
    assert not run.supervisor_notes.exists(), "all is well again"
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_record_that_cannot_be_read_now_is_read_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes, inner = Notes(monkeypatch), RunDirectory.read_record

    def once_damaged(run: RunDirectory, *, missing_ok: bool = False) -> SessionRecord | None:
        monkeypatch.setattr(RunDirectory, "read_record", inner)
        raise SidecarError("session.json is damaged")

    monkeypatch.setattr(RunDirectory, "read_record", once_damaged)
    supervisor.supervise(run, lambda _: None)
    assert notes.seen[0] == "session.json is damaged"
    assert (run.path / "served").exists()


def test_directory_that_was_removed_needs_nobody(run: RunDirectory) -> None:
    run.remove()
    supervisor.supervise(run, lambda _: None)
    assert not run.path.exists()
