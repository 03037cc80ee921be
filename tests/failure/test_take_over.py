"""A sidecar is killed, at any moment of its life: nobody but the clock notices.

The guest verifies its memory all the while; a bad word fails the test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from vm.guests import (
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    cli_command,
    ends_within,
    goes_on_from,
    refused,
    send,
    status_of,
    wait_until,
)

from qemu_postcopy.errors import TargetGoneError
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]

#: So that little is there when the sidecar dies.
SLOWLY = ("--rate", "256K", "--chunk", "4K")


def kill_sidecar(guest: Guest) -> None:
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    guest.sidecar.close()
    guest.sidecar = None


def recover(guest: Guest) -> None:
    (result,) = json.loads(cli("recover", "--json", guest.name).stdout)
    with suppress(TargetGoneError):  # it has done its work already
        guest.sidecar = ProcessIdentity.open(result["sidecar_pid"])


@pytest.fixture
def snapshot(qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage) -> Snapshot:
    return snapshots.checker(lab, guest_image, qemu)


def test_paused_guest_stays_paused(lab: Lab, snapshot: Snapshot) -> None:
    guest = lab.restore(snapshot, "--paused", *SLOWLY)
    kill_sidecar(guest)
    recover(guest)
    assert guest.run_state() == "paused"
    guest.ask("cont")
    goes_on_from(guest, snapshot)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    guest.console.wait_passes(2)


#: Stops the process itself right after it has entered a state, or at a step within.
STOPPED_AT = """
import inspect, os, signal, sys
from qemu_postcopy import cli, session
from qemu_postcopy.paging import registration
from qemu_postcopy.vm import attach, launch, migration
from qemu_postcopy.vm.gate import Gate
from qemu_postcopy.vm.gate import Gate
from qemu_postcopy.vm.qmp import Listener
where = sys.argv.pop(1)
stop = lambda: os.kill(os.getpid(), signal.SIGSTOP)
def after(owner, name, count=1):
    inner, calls = getattr(owner, name), []
    def wrapper(*a, **k):
        result = inner(*a, **k)
        if inspect.isawaitable(result):
            return awaited(result)
        calls.append(1)
        if len(calls) == count:
            stop()
        return result
    async def awaited(result):
        await result
        stop()
    setattr(owner, name, wrapper)
def before(owner, name):
    inner = getattr(owner, name)
    def wrapper(*a, **k):
        stop()
        return inner(*a, **k)
    setattr(owner, name, wrapper)
kind, _, what = where.partition(":")
if kind == "state":
    inner = session.Session._enter
    def enter(self, state):
        inner(self, state)
        if state == what:
            stop()
    session.Session._enter = enter
else:
    module, name = what.split(".")
    (before if kind == "before" else after)(globals()[module], name)
cli.main()
"""


class StoppedRestore:
    """A restore in the foreground that stops itself at a chosen place, to be killed there."""

    def __init__(self, where: str, lab: Lab, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", STOPPED_AT, where, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        done = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert done is not None
        if done.si_code != os.CLD_STOPPED:
            pytest.fail(f"it has ended: {self.process.communicate()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def guest_of_record(lab: Lab, name: str) -> Guest:
    run = RunDirectory.find(name)
    record = run.read_record()
    assert record is not None
    guest = Guest(record.pid, run.path, name)
    lab._guests.append(guest)
    return guest


BEFORE_A_GUEST = [
    "before:launch.launch",
    "after:launch.launch",
    "after:attach.take_userfaultfd",
    "state:found",
    "state:attached",
    "before:registration.register",
    "after:registration.register",
    "state:serving",
    "before:migration.load",
]


@pytest.fixture
def other_qemu(snapshot: Snapshot, run_dir: Path) -> Path:
    """The same QEMU, and not what the image was made by: it is asked everything."""
    link = run_dir / "other" / Path(snapshot.qemu).name
    link.parent.mkdir()
    link.symlink_to(shutil.which(snapshot.qemu) or snapshot.qemu)
    return link


@pytest.mark.parametrize("where", BEFORE_A_GUEST)
def test_killed_before_there_was_a_guest(
    where: str, lab: Lab, snapshot: Snapshot, other_qemu: Path
) -> None:
    """The QEMU that was started is ended, and the name is free."""
    stopped = StoppedRestore(
        where, lab, "restore", "--foreground", "--name", "r", "--attach-by", "ptrace",
        "--qemu", other_qemu, snapshot.image,
    )  # fmt: skip
    stopped.kill()
    record = RunDirectory.find("r").read_record()
    assert record is not None
    if where == "before:launch.launch":  # then there is no QEMU either
        refused("recover", "r", status=13, words=["has ended"])
    else:
        refused("recover", "r", status=10, words=["not come so far as a guest"])
    if record.pid:
        with suppress(TargetGoneError), ProcessIdentity.open(record.pid) as identity:
            assert ends_within(identity, 5)
    guest = lab.restore(snapshot)
    goes_on_from(guest, snapshot)


@pytest.mark.parametrize(
    "where", ["state:found", "after:attach.take_userfaultfd", *BEFORE_A_GUEST[4:]]
)
def test_killed_while_attaching_to_a_qemu_of_somebody_else(
    where: str, lab: Lab, qemu: Path, snapshots: SharedSnapshots
) -> None:
    """It waits as before, and can be attached to again."""
    bare = snapshots.bare(lab, qemu)
    waiting = lab.waiting(bare)
    stopped = StoppedRestore(
        where, lab, "attach", "--foreground", "--name", "a", waiting.qmp_path, bare.image
    )
    stopped.kill()
    if "found" not in where and "take_userfaultfd" not in where:
        refused("recover", "a", status=10, words=["not come so far as a guest"])
    assert waiting.registered_ranges() == 0
    guest = lab.attach(waiting, bare.image)
    guest.wait_sidecar_gone()
    assert guest.run_state() == "running"


WITH_A_GUEST = [
    "before:Listener.wait",  # QEMU has been told to load, and does so
    "after:migration.load_through",
    "state:loaded",
    "state:running",
    "state:complete",
    "after:registration.unregister",
]


@pytest.mark.parametrize("where", WITH_A_GUEST)
def test_what_was_begun_is_finished(where: str, lab: Lab, snapshot: Snapshot) -> None:
    """Killed from the load's end to the end of the detach: the guest runs in the end."""
    stopped = StoppedRestore(
        where, lab, "restore", "--foreground", "--name", "r", "--qemu", snapshot.qemu,
        snapshot.image,
    )  # fmt: skip
    stopped.kill()
    guest = guest_of_record(lab, "r")
    recover(guest)
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)
    assert status_of("r")["state"] == "detached"


def test_what_was_begun_is_finished_by_a_qemu_that_was_asked(
    lab: Lab, snapshot: Snapshot, other_qemu: Path
) -> None:
    stopped = StoppedRestore(
        "after:migration.load", lab, "restore", "--foreground", "--name", "r",
        "--qemu", other_qemu, snapshot.image,
    )  # fmt: skip
    stopped.kill()
    guest = guest_of_record(lab, "r")
    recover(guest)
    guest.wait_sidecar_gone()
    goes_on_from(guest, snapshot)


def test_ctrl_backslash_leaves_the_guest_to_a_sidecar_in_the_background(
    lab: Lab, snapshot: Snapshot
) -> None:
    command = subprocess.Popen(
        cli_command(
            "restore", "--foreground", "--name", "r", *SLOWLY, "--qemu", snapshot.qemu,
            snapshot.image,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert command.stderr is not None
    for line in command.stderr:
        if json.loads(line).get("state") == "running":
            break
    guest = guest_of_record(lab, "r")
    command.send_signal(signal.SIGHUP)  # its terminal is closed: nothing happens
    command.send_signal(signal.SIGQUIT)
    said, _ = command.communicate(timeout=60)
    assert command.returncode == 0
    assert "is served again" in said
    record = RunDirectory.find("r").read_record()
    assert record is not None
    guest.sidecar = ProcessIdentity.open(record.sidecar_pid)
    assert status_of("r")["state"] == "running"
    goes_on_from(guest, snapshot)
    cli("fill", "r")
    guest.wait_sidecar_gone()
    guest.console.wait_passes(1)


#: QEMU takes the end of its state late, and the operator is quicker.
QUIT_IN_THE_GATE = """
import asyncio, os, signal
from qemu_postcopy import cli
from qemu_postcopy.vm import migration
load_through = migration.load_through
async def late(qmp, gate, descriptor, begin, begins):
    def begun():
        begins()
        os.kill(os.getpid(), signal.SIGQUIT)
    let_in = gate.let_in
    async def let_in_late(*where):
        await asyncio.sleep(0.1)
        await let_in(*where)
    gate.let_in = let_in_late
    return await load_through(qmp, gate, descriptor, begin, begun)
migration.load_through = late
cli.main()
"""


def test_ctrl_backslash_while_qemu_takes_the_end_of_its_state_costs_no_guest(
    lab: Lab, snapshot: Snapshot
) -> None:
    command = subprocess.run(
        [sys.executable, "-c", QUIT_IN_THE_GATE, "restore", "--foreground", "--name", "r", *SLOWLY,
         "--qemu", str(snapshot.qemu), str(snapshot.image)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert command.returncode == 0, command.stderr
    assert "is served again" in command.stdout
    guest = guest_of_record(lab, "r")
    record = RunDirectory.find("r").read_record()
    assert record is not None
    guest.sidecar = ProcessIdentity.open(record.sidecar_pid)
    goes_on_from(guest, snapshot)
    cli("fill", "r")
    guest.wait_sidecar_gone()


#: Takes over with a trace that cannot be written to.
TRACE_LOST = """
import os
from qemu_postcopy import accounts, cli
record = accounts.Accounts.record
def lost(self, path, *, resume=False):
    record(self, path, resume=resume)
    os.truncate(path, 4096)
accounts.Accounts.record = lost
cli.main()
"""


def test_trace_that_cannot_be_written_to_costs_one_sidecar_and_not_the_guest(
    lab: Lab, snapshot: Snapshot
) -> None:
    trace = lab.directory / "trace"
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K", "--trace", trace)
    kill_sidecar(guest)
    size = trace.stat().st_size
    first = subprocess.run(
        [sys.executable, "-c", TRACE_LOST, "recover", "--foreground", guest.name],
        capture_output=True,
        timeout=60,
    )
    assert first.returncode == -signal.SIGBUS
    os.truncate(trace, size)
    recover(guest)
    goes_on_from(guest, snapshot)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()


def test_supervisor_that_fails_pauses_and_says_so(lab: Lab, snapshot: Snapshot) -> None:
    """And goes on once the reason is gone."""
    guest = lab.restore(snapshot, *SLOWLY, "--supervise")
    run = RunDirectory.find(guest.name)
    good = run.ledger.read_bytes()
    run.ledger.rename(run.path / "away")  # the sidecar that lives has it mapped
    kill_sidecar(guest)

    def trouble() -> str:
        said = status_of(guest.name)["trouble"]
        assert isinstance(said, str)
        return said

    wait_until(lambda: "supervisor has failed 3 times" in trouble(), "three attempts")
    assert "ledger" in trouble()
    assert guest.registered_ranges() > 0
    (run.path / "away").rename(run.ledger)
    assert len(good) == run.ledger.stat().st_size
    wait_until(lambda: status_of(guest.name)["state"] == "running", "it is served again")
    record = run.read_record()
    assert record is not None
    guest.sidecar = ProcessIdentity.open(record.sidecar_pid)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    goes_on_from(guest, snapshot)
