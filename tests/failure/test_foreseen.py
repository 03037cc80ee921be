"""What a launch foresees of a starting QEMU counts only when QEMU says the same: until then it has
all of the device state but its end, and there is no guest."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from failure.test_take_over import StoppedRestore, guest_of_record, recover
from vm.guests import (
    Lab,
    SharedSnapshots,
    Snapshot,
    cli_command,
    ends_within,
    goes_on_from,
    wait_until,
)

from qemu_postcopy.errors import AttachError, TargetGoneError
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.recover import owner_of
from qemu_postcopy.recover import recover as take_over
from qemu_postcopy.restore import RestoreOptions, restore
from qemu_postcopy.session import State, StateChange
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm import refusals
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.qmp import Qmp

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(120)]


@pytest.fixture
def snapshot(
    qemu_binary: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> Snapshot:
    return snapshots.checker(lab, guest_image, qemu_binary)


BEFORE_THE_END = [
    "after:attach.take_userfaultfd",
    "state:found",
    "before:registration.register",
    "after:registration.register",
    "before:Gate.let_in",
    "before:migration.load_through",
]


@pytest.mark.parametrize("where", BEFORE_THE_END)
def test_killed_before_there_was_a_guest(where: str, lab: Lab, snapshot: Snapshot) -> None:
    """QEMU ends by itself, since its stream ends too early; one that waits for a page until then is
    ended at the take-over.  The name is free."""
    stopped = StoppedRestore(where, lab, "restore", "--foreground", "--name", "r", snapshot.image)
    with ProcessIdentity.open(owner_of(RunDirectory.find("r").qmp_socket)) as qemu:
        stopped.kill()
        done = subprocess.run(
            cli_command("recover", "r"), capture_output=True, text=True, timeout=60, check=False
        )
        words = {10: "not come so far as a guest", 13: "has ended"}
        assert words[done.returncode] in done.stderr
        assert ends_within(qemu, 10)
    guest = lab.restore(snapshot)
    goes_on_from(guest, snapshot)


def held_before_the_end(lab: Lab, snapshot: Snapshot) -> tuple[StoppedRestore, ProcessIdentity]:
    """A restore that stands still when all is confirmed, and its QEMU."""
    stopped = StoppedRestore(
        "before:migration.load_through",
        lab, "restore", "--foreground", "--name", "r", snapshot.image,
    )  # fmt: skip
    record = RunDirectory.find("r").read_record()
    assert record is not None and record.state == State.SERVING
    return stopped, ProcessIdentity.open(record.pid, record.start_time)


def test_a_guest_whose_memory_lies_elsewhere_never_runs(
    lab: Lab, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's answers are moved by a page, in the words of either version."""
    human = Qmp.human
    asked = []

    async def elsewhere(self: Qmp, command_line: str) -> str:
        asked.append(command_line)
        text = await human(self, command_line)
        if command_line == "info ramblock" and self.version < (8, 1):
            return text
        return re.sub(r"0x[0-9a-f]+(?=(?: +r[ow])?\s*$)", _moved, text, flags=re.MULTILINE)

    def _moved(match: re.Match[str]) -> str:
        return f"{int(match[0], 16) + 4096:#x}"

    monkeypatch.setattr(Qmp, "human", elsewhere)
    states: list[StateChange] = []
    run = RunDirectory.create("wrong")
    with pytest.raises(AttachError, match="was taken to be at"):
        asyncio.run(restore(RestoreOptions(snapshot.image), run, states.append))
    assert "info ramblock" in asked and "query-memdev" not in asked
    assert [change.state for change in states][-2:] == [State.SERVING, State.FAILED]
    record = run.read_record()
    assert record is not None
    with suppress(TargetGoneError), ProcessIdentity.open(record.pid, record.start_time) as identity:
        assert ends_within(identity, 5)
    console = run.path / "console.log"
    assert not console.exists() or b"QPC" not in console.read_bytes()


def test_qemu_that_ends_while_the_end_is_held(lab: Lab, snapshot: Snapshot) -> None:
    stopped, qemu = held_before_the_end(lab, snapshot)
    with qemu:
        qemu.kill()
        assert ends_within(qemu, 5)
    os.kill(stopped.process.pid, signal.SIGCONT)
    _, said = stopped.process.communicate(timeout=30)
    assert stopped.process.returncode not in (0, None), said
    assert "could not load the device state" in said
    guest = lab.restore(snapshot)
    goes_on_from(guest, snapshot)


def test_killed_right_after_the_end(lab: Lab, snapshot: Snapshot) -> None:
    """Then there is a guest, and it is served on."""
    stopped = StoppedRestore(
        "before:Gate.close", lab, "restore", "--foreground", "--name", "r", snapshot.image
    )
    stopped.kill()
    guest = guest_of_record(lab, "r")
    recover(guest)
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)


def test_a_guest_that_may_run_is_not_asked_whether_it_might(
    lab: Lab, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record was written before QEMU had confirmed where its memory is; it did so before it got
    the end of its state.  Whoever takes over refuses nothing any more."""
    stopped = StoppedRestore(
        "before:Gate.close", lab, "restore", "--foreground", "--name", "r", snapshot.image
    )
    stopped.kill()
    guest = guest_of_record(lab, "r")
    run = RunDirectory.find("r")
    record = run.read_record()
    assert record is not None and record.presumed

    async def something(_: object) -> list[str]:
        return ["for a reason of today's"]

    monkeypatch.setattr(refusals, "refusals", something)
    asyncio.run(take_over(run))
    assert guest.registered_ranges() == 0
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_end_right_after_the_end(
    number: signal.Signals, lab: Lab, snapshot: Snapshot
) -> None:
    """QEMU lets the guest run by itself as soon as it has the end: the guest may run, though nobody
    has said so yet.  All of its memory is filled, and it goes on alone."""
    stopped = StoppedRestore(
        "before:migration._loaded", lab, "restore", "--foreground", "--name", "r",
        "--no-background", snapshot.image,
    )  # fmt: skip
    guest = guest_of_record(lab, "r")
    stopped.process.send_signal(number)
    stopped.process.send_signal(signal.SIGCONT)
    _, said = stopped.process.communicate(timeout=60)
    assert stopped.process.returncode == 0, said
    assert '"state": "detached"' in said
    assert guest.registered_ranges() == 0
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)


def test_asked_to_serve_in_the_background_right_after_the_end(lab: Lab, snapshot: Snapshot) -> None:
    stopped = StoppedRestore(
        "before:migration._loaded", lab, "restore", "--foreground", "--name", "r", snapshot.image
    )
    guest = guest_of_record(lab, "r")
    stopped.process.send_signal(signal.SIGQUIT)
    stopped.process.send_signal(signal.SIGCONT)
    _, said = stopped.process.communicate(timeout=60)
    assert stopped.process.returncode == 0, said
    wait_until(lambda: guest.registered_ranges() == 0, "it has all of its memory")
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)
