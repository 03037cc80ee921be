"""QEMU dies on the way: between the look-up and the attach, and at every later step."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from vm.guests import Guest, Lab, SharedSnapshots

from qemu_postcopy.errors import QmpError, TargetGoneError
from qemu_postcopy.image.image import Image
from qemu_postcopy.session import Session, SessionOptions, State
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace")


async def session_until(state: State, waiting: Guest, image: Path) -> Session:
    """A session that has come so far, by its own steps."""
    session = Session(Image.open(image), RunDirectory.create("gone"), SessionOptions())
    await session.find(waiting.qmp_path)
    if state is not State.FOUND:
        session.attach()
    if state is State.SERVING:
        session.serve()
    assert session.state is state
    return session


def killed(waiting: Guest) -> None:
    assert waiting.process is not None
    waiting.process.kill()


def test_qemu_that_died_before_the_attach(qemu: Path, lab: Lab, snapshots: SharedSnapshots) -> None:
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot)

    async def run() -> None:
        session = await session_until(State.FOUND, waiting, snapshot.image)
        killed(waiting)
        with pytest.raises(TargetGoneError, match=f"no process {waiting.pid}") as caught:
            session.attach()
        assert "Look the PID up again" in caught.value.hint
        await session.close()
        assert session.state is State.FAILED

    asyncio.run(run())


def test_pid_that_was_given_to_another_process_before_the_attach(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    """The new owner of the PID is another QEMU, which must not be touched.

    The kernel does not hand out a PID on request, so the session's identity gets the PID of a
    second QEMU beside the pidfd of the first.
    """
    snapshot = snapshots.bare(lab, qemu)
    waiting, other = lab.waiting(snapshot), lab.waiting(snapshot)

    async def run() -> None:
        session = await session_until(State.FOUND, waiting, snapshot.image)
        assert session.identity is not None
        killed(waiting)
        mixed = ProcessIdentity(
            other.pid, session.identity.start_time, os.dup(session.identity.pidfd)
        )
        with mixed:
            session.identity.pid = other.pid
            with pytest.raises(TargetGoneError):
                session.attach()
        await session.close()

    asyncio.run(run())
    assert other.run_state() == "inmigrate"
    assert other.registered_ranges() == 0
    descriptors = Path(f"/proc/{other.pid}/fd").iterdir()
    assert not any("userfaultfd" in os.readlink(entry) for entry in descriptors)  # noqa: PTH115


def test_qemu_that_died_before_it_was_served(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot)

    async def run() -> None:
        session = await session_until(State.ATTACHED, waiting, snapshot.image)
        killed(waiting)
        with pytest.raises(TargetGoneError, match=f"no process {waiting.pid}"):
            session.serve()
        await session.close()

    asyncio.run(run())


def test_qemu_that_died_before_its_state_was_loaded(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot)

    async def run() -> None:
        session = await session_until(State.SERVING, waiting, snapshot.image)
        killed(waiting)
        with pytest.raises(TargetGoneError, match=f"no process {waiting.pid}"):
            await session.load_device_state()
        await session.close()

    asyncio.run(run())


def test_monitor_without_a_qemu_behind_it(qemu: Path, lab: Lab, snapshots: SharedSnapshots) -> None:
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot)
    killed(waiting)

    async def run() -> None:
        session = Session(Image.open(snapshot.image), RunDirectory.create("gone"), SessionOptions())
        with pytest.raises(QmpError, match="cannot talk to QEMU"):
            await session.find(waiting.qmp_path)
        await session.close()

    asyncio.run(run())
