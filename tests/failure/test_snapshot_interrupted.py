"""A snapshot that is interrupted or killed: no image, and the guest runs on as if nothing was."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from vm.guests import (
    PATIENCE,
    Guest,
    Lab,
    cli,
    cli_command,
    ends_within,
    refused,
    send,
    wait_until,
)
from vm.stream_pipe import open_stream_of, read_what_is_there

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.qmp import Listener, Qmp

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


class Witness:
    """A second monitor of the guest that sees what happens to it; and the tool under way."""

    def __init__(self, guest: Guest, path: Path, image: Path) -> None:
        self.guest = guest
        self.path = path
        self.image = image
        self.tool: ProcessIdentity
        self.popen: subprocess.Popen[str]
        self.said = ""

    def start_tool(self, *options: object) -> None:
        """Begins a snapshot, by the command line tool."""
        self.popen = subprocess.Popen(
            cli_command("snapshot", *options, self.guest.qmp_path, self.image),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job has SIGINT ignored, and so has what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.tool = ProcessIdentity.open(self.popen.pid)

    @asynccontextmanager
    async def stopped_while_sending(self, *options: object) -> AsyncIterator[tuple[Qmp, Listener]]:
        """Starts a snapshot and stops the tool when QEMU has begun to send.

        The pipe holds 1 MiB and the guest has a hundred times that, so QEMU is in the middle of
        its stream and waits for a reader.
        """
        async with await Qmp.connect(self.path) as qmp:
            with qmp.listen("MIGRATION", "RESUME") as events:
                self.start_tool(*options)
                await wait_migration(events, "active")
                send(self.tool, signal.SIGSTOP)
                assert (await qmp.execute("query-migrate"))["status"] == "active"
                yield qmp, events

    def end_of_tool(self) -> int:
        """Its exit status."""
        _, self.said = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode

    def close(self) -> None:
        if hasattr(self, "tool"):
            send(self.tool, signal.SIGKILL)
            self.popen.communicate()
            self.tool.close()


async def wait_migration(events: Listener, status: str) -> None:
    await events.wait(
        lambda event: event["event"] == "MIGRATION" and event["data"]["status"] == status, PATIENCE
    )


@pytest.fixture
def witness(qemu: Path, lab: Lab, guest_image: GuestImage, run_dir: Path) -> Iterator[Witness]:
    """A guest with 256 MiB, half of them patterned."""
    path = run_dir / "witness.sock"
    monitors = [f"unix:{one},server=on,wait=off" for one in (path, another(path))]
    made = Witness(
        lab.boot(guest_image, qemu, "memfd", 64, "-qmp", monitors[0], "-qmp", monitors[1]),
        path,
        run_dir / "images" / "vm.qpc",
    )
    made.image.parent.mkdir()
    yield made
    made.close()


def another(monitor: Path) -> Path:
    """A monitor speaks with one client at a time."""
    return monitor.with_name("another.sock")


def left_beside(image: Path) -> list[str]:
    return [path.name for path in image.parent.iterdir()]


def check_unharmed(witness: Witness) -> None:
    """No image; the guest ticks, verifies, and can be saved by the next try, which cleans up."""
    assert not witness.image.exists()
    assert witness.guest.run_state() == "running"
    witness.guest.console.wait_passes(1)
    cli("snapshot", witness.guest.qmp_path, witness.image)
    assert left_beside(witness.image) == ["vm.qpc"]
    cli("image", "verify", witness.image)
    witness.guest.console.wait_passes(1)


def test_interrupted_snapshot_leaves_nothing_and_the_guest_running(witness: Witness) -> None:
    async def run() -> None:
        async with witness.stopped_while_sending():
            send(witness.tool, signal.SIGINT)
            send(witness.tool, signal.SIGCONT)
            assert await asyncio.to_thread(witness.end_of_tool) == 130, witness.said

    asyncio.run(run())
    assert left_beside(witness.image) == []
    check_unharmed(witness)


def test_a_snapshot_that_is_refused_lets_nothing_run_that_another_has_stopped(
    witness: Witness,
) -> None:
    live = ("--max-downtime", "1", "--accept-lost-writes", "--then", "stop")

    async def run() -> None:
        async with witness.stopped_while_sending(*live) as (qmp, _):
            assert await qmp.status() == "running"
            second = witness.image.with_name("second.qpc")
            refusal = asyncio.ensure_future(
                asyncio.to_thread(
                    refused,
                    *("snapshot", another(witness.path), second),
                    status=8,
                    words=["migration"],
                )
            )
            done, _ = await asyncio.wait({refusal}, timeout=5)
            send(witness.tool, signal.SIGCONT)
            await refusal
            assert done, "it waited for the other, to let the guest run when that has ended"
            # More than the guest can write in the meantime.
            await qmp.execute("migrate-set-parameters", {"downtime-limit": 60_000})
            assert await asyncio.to_thread(witness.end_of_tool) == 0, witness.said
            assert await qmp.status() == "postmigrate"

    asyncio.run(run())


def test_killed_while_the_guest_is_being_sent(witness: Witness) -> None:
    async def run() -> None:
        async with witness.stopped_while_sending():
            send(witness.tool, signal.SIGKILL)
            assert await asyncio.to_thread(witness.end_of_tool) == -signal.SIGKILL

    asyncio.run(run())
    wait_until(lambda: witness.guest.run_state() == "running", "the guest runs on")
    assert len(left_beside(witness.image)) == 1, "the leftover that the next try removes"
    check_unharmed(witness)


def test_killed_after_the_stream_and_before_the_guest_was_let_run(witness: Witness) -> None:
    """The one moment at which QEMU itself would leave the guest standing: the guard lets it run.

    With the tool stopped, the test reads the rest of the stream in its place.
    """

    async def run() -> None:
        async with witness.stopped_while_sending() as (qmp, events):
            stream = open_stream_of(witness.tool.pid)
            done = asyncio.ensure_future(wait_migration(events, "completed"))
            try:
                while not done.done():
                    await asyncio.to_thread(read_what_is_there, stream)
                await done
            finally:
                os.close(stream)
            assert (await qmp.execute("query-status"))["status"] == "postmigrate"
            send(witness.tool, signal.SIGKILL)
            await events.wait(lambda event: event["event"] == "RESUME", PATIENCE)
            await asyncio.to_thread(witness.end_of_tool)

    asyncio.run(run())
    check_unharmed(witness)


Moment = Callable[[Listener], Awaitable[object]]
MOMENTS: dict[str, Moment] = {
    "setup": lambda events: wait_migration(events, "setup"),
    "active": lambda events: wait_migration(events, "active"),
    "completed": lambda events: wait_migration(events, "completed"),
    "resume": lambda events: events.wait(lambda event: event["event"] == "RESUME", PATIENCE),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment(moment: str, witness: Witness) -> None:
    """Killed as soon as QEMU reports it; whichever of both is faster, the guest runs on."""

    async def run() -> None:
        async with await Qmp.connect(witness.path) as qmp:
            with qmp.listen("MIGRATION", "RESUME") as events:
                witness.start_tool()
                await MOMENTS[moment](events)
                send(witness.tool, signal.SIGKILL)
                assert ends_within(witness.tool, PATIENCE)

    asyncio.run(run())
    wait_until(lambda: runs_on(witness.guest), "the guest runs on")
    check_unharmed(witness)


def runs_on(guest: Guest) -> bool:
    """And not still: while QEMU has not noticed that nobody reads, it may yet stop the guest."""
    under_way = guest.ask("query-migrate").get("status") in (
        "setup",
        "active",
        "device",
        "cancelling",
    )
    return not under_way and guest.run_state() == "running"
