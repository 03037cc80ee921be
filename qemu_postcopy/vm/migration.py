"""QEMU's own migration, used as the way in and out for device state.

Out: the whole state of a running guest as one stream into a pipe of ours; in: device state from a
descriptor into a QEMU that waits with ``-incoming defer``.  Runs in the caller's event loop; rests
on QEMU's docs/devel/migration and its QAPI schema (migrate, migrate-incoming, MIGRATION event).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from qemu_postcopy.errors import MismatchError, PostcopyError, QmpError, StateError
from qemu_postcopy.vm.gate import Gate
from qemu_postcopy.vm.monitor import CommandError, EventListener, Message, Monitor
from qemu_postcopy.vm.opening import Question

#: Capabilities that change the stream's format, or take the pages another way; off while we save.
FORMAT_CAPABILITIES = (
    "xbzrle",
    "compress",
    "multifd",
    "postcopy-ram",
    "x-ignore-shared",
    "mapped-ram",
    "background-snapshot",
    "auto-converge",
    "return-path",
    "zero-copy-send",
    "x-colo",
    "dirty-limit",
    "rdma-pin-all",
    "block",
)
#: What else is changed meanwhile.
PARAMETERS = ("max-bandwidth", "downtime-limit")
#: Faster than any disk; QEMU takes any size_t.
NO_BANDWIDTH_LIMIT = 1 << 40
#: QEMU's own upper bound of downtime-limit: 2000 seconds.
LONGEST_DOWNTIME_MS = 2_000_000
#: The first QEMU that misses no write of a guest under TCG while its pages are sent in several
#: passes. Before, what a pass had marked clean stayed writable unseen in TCG's TLB
#: (cpu_physical_memory_sync_dirty_bitmap, include/exec/ram_addr.h; mended for 9.0). Where there is
#: one pass, and the guest then stops, nothing is lost.
PASSES_KEEP_WRITES = (9, 0, 0)
#: What an operator is told of that.
LOST_WRITES = (
    "under TCG a QEMU older than 9.0 loses writes of a guest that runs while its memory is sent in "
    "several passes"
)
LOAD_SECONDS = 120.0
NOT_BEGUN_SECONDS = 1.0
DESCRIPTOR_NAME = "qpc"
EVENTS_ON = {"capabilities": [{"capability": "events", "state": True}]}
#: What a load sends before its command, to be asked ahead; `getfd` with the descriptor.
EVENTS_QUESTION: Question = ("migrate-set-capabilities", EVENTS_ON)
LOAD_QUESTIONS: tuple[Question, ...] = (
    EVENTS_QUESTION,
    ("getfd", {"fdname": DESCRIPTOR_NAME}),
)
ENDED = ("completed", "failed", "cancelled")


#: QEMU's words (block/file-posix.c) for an image file that another process has open: 'Failed to get
#: "write" lock'. A disk of an incoming QEMU is inactive: it is locked only when the load ends.
LOCK_WORDS = ("Failed to get", "lock")


class DiskHeldError(MismatchError):
    """Another process holds a disk: the state is loaded, and the guest has not run."""


class NotLoadedError(QmpError):
    """QEMU says that it has not loaded the state: the guest has not run, and will not."""


def lock_report(output: str) -> str:
    """What QEMU wrote of a lock that it did not get, and of which file; empty: nothing."""
    lines = output.splitlines()
    for number, line in enumerate(lines):
        if all(word in line for word in LOCK_WORDS):
            # The file's name is in QEMU's own hint, the line after.
            return "\n".join(lines[number : number + 2])
    return ""


def _disk_held(reason: str) -> DiskHeldError:
    return DiskHeldError(
        reason,
        hint="stop the other guest, or give this one a copy of the disk: restore IMAGE -- QEMU...",
    )


def _status(event: Message) -> str:
    status: str = event["data"]["status"]
    return status


async def load(qmp: Monitor, descriptor: int, begins: Callable[[], None]) -> bool:
    """Makes a QEMU in ``-incoming defer`` load the stream behind ``descriptor`` (stays open here).

    Returns whether the guest is known to run: without -S QEMU lets it, and then may answer no
    question any more, because the guest waits for a page under QEMU's lock.

    Args:
        begins: called when QEMU is about to get all that it needs to let the guest run.

    Raises:
        NotLoadedError: QEMU refused the stream.  It usually has ended then.
        CommandError: QEMU refused to load at all.
        QmpError: it is not known what became of it.
    """
    # Sent at once, answered in order. The capability stays on: QEMU then reports its migrations.
    with qmp.listen("MIGRATION", "RESUME") as listener:
        begins()
        await asyncio.gather(
            qmp.execute(*EVENTS_QUESTION),
            qmp.send_descriptor(DESCRIPTOR_NAME, descriptor),
            qmp.execute("migrate-incoming", {"uri": f"fd:{DESCRIPTOR_NAME}"}),
        )
        return await _loaded(listener)


async def load_through(
    qmp: Monitor, gate: Gate, descriptor: int, begin: int, begins: Callable[[], None]
) -> bool:
    """The same for a QEMU whose stream waits behind a gate: lets in what is behind ``begin``.

    Returns and raises as :func:`load`.
    """
    # QEMU tells by itself: to be asked now would keep it from the guest's first steps.
    await qmp.execute(*EVENTS_QUESTION)
    with qmp.listen("MIGRATION", "RESUME") as listener:
        begins()
        await in_time(gate.let_in(descriptor, begin, os.fstat(descriptor).st_size))
        gate.close()
        return await _loaded(listener)


async def in_time(letting_in: Awaitable[None]) -> None:
    """Raises QmpError where QEMU does not take what it is given."""
    try:
        async with asyncio.timeout(LOAD_SECONDS):
            await letting_in
    except TimeoutError:
        raise QmpError(
            f"QEMU did not take its device state within {LOAD_SECONDS:g} seconds",
            hint="its log, and the sidecar's, say why; a page that cannot be had holds it up",
        ) from None


async def _loaded(listener: EventListener) -> bool:
    """Whether the guest runs already when its state is loaded: QEMU 7.2 to 10.0 let it run before
    they call the migration completed (process_incoming_migration_bh)."""
    event = await listener.wait(
        lambda e: e["event"] == "RESUME" or _status(e) in ENDED, timeout=LOAD_SECONDS
    )
    if event["event"] == "RESUME":
        return True
    if _status(event) != "completed":
        raise NotLoadedError("QEMU failed to load the device state", hint="its log says why")
    return False


async def save(
    qmp: Monitor,
    write_fd: int,
    drain: Callable[[], Awaitable[None]],
    *,
    max_downtime_ms: int | None = None,
    under_way: threading.Event | None = None,
) -> None:
    """Makes QEMU send its whole state into ``write_fd`` while ``drain`` reads the other end.

    QEMU itself stops the guest for the end of the stream, and lets it run on if anything fails
    before: so a killed tool costs the guest nothing.  Afterwards the guest stands in `postmigrate`;
    going on is the caller's.  Capabilities and parameters of the guest are put back in every case.

    Args:
        write_fd: owned, and closed here as soon as QEMU has its copy, so that ``drain`` sees the
            end of the stream.
        drain: reads until then; raises to give up; ends promptly when cancelled.
        max_downtime_ms: pages are sent while the guest runs until what is left takes no longer
            than this; None: the guest is stopped (almost) at once.
        under_way: set as soon as QEMU may have begun; where it is not set it has done nothing, and
            the state of the guest is somebody else's doing.

    Raises:
        QmpError: QEMU refused, or failed; or whatever ``drain`` raised.  The migration was
            cancelled then and the guest runs on.
        asyncio.CancelledError: likewise.
    """
    under_way = under_way or threading.Event()
    with os.fdopen(write_fd, "wb", buffering=0) as sending:
        known = {e["capability"] for e in await qmp.execute("query-migrate-capabilities")}
        off = {name: False for name in FORMAT_CAPABILITIES if name in known}
        downtime = LONGEST_DOWNTIME_MS if max_downtime_ms is None else max_downtime_ms
        async with (
            qmp.migration_capabilities(events=True, **off),
            qmp.migration_parameters(max_bandwidth=NO_BANDWIDTH_LIMIT, downtime_limit=downtime),
        ):
            with qmp.listen("MIGRATION") as listener:
                try:
                    # The reader first: whoever gives up after `migrate` must have one to end.
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(_drained(drain))
                        tasks.create_task(_completed(qmp, listener))
                        await qmp.send_descriptor(DESCRIPTOR_NAME, write_fd)
                        under_way.set()
                        try:
                            await qmp.execute("migrate", {"uri": f"fd:{DESCRIPTOR_NAME}"})
                        except CommandError:
                            under_way.clear()  # another migration may be, and is not ours to end
                            raise
                        sending.close()
                except BaseException as error:
                    if under_way.is_set():
                        await asyncio.shield(_abandon(qmp))
                    if isinstance(error, BaseExceptionGroup):
                        raise _plainest(error) from error
                    raise


async def passes_lose_writes(qmp: Monitor) -> bool:
    """Whether what this guest writes now could be missing after a migration of several passes."""
    if qmp.version >= PASSES_KEEP_WRITES:
        return False
    return not (await qmp.execute("query-kvm"))["enabled"] and await qmp.status() == "running"


async def _drained(drain: Callable[[], Awaitable[None]]) -> None:
    await drain()


async def _completed(qmp: Monitor, listener: EventListener) -> None:
    event = await listener.wait(lambda e: _status(e) in ENDED)
    if _status(event) != "completed":
        raise QmpError(
            f"QEMU's migration {_status(event)}: {await _error_of(qmp)}",
            hint="the guest runs on; QEMU's log may say more",
        )


def _plainest(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first: our own end of the pipe, if it was that, else QEMU's report."""
    ours = [error for error in group.exceptions if not isinstance(error, QmpError)]
    return (ours or list(group.exceptions))[0]


async def _abandon(qmp: Monitor) -> None:
    """Cancels the migration and waits until QEMU is out of it, so that the guest runs on."""
    with suppress(PostcopyError):
        await qmp.execute("migrate_cancel", timeout=10)
        await settled(qmp)


async def settled(qmp: Monitor) -> None:
    """Waits until no migration is under way; QEMU reports each change while `events` is on."""
    while True:
        with qmp.listen("MIGRATION") as listener:
            info = await qmp.execute("query-migrate", timeout=10)
            if info.get("status") in (None, "none", *ENDED):
                return
            # Without the capability there are no events: ask again after a while.
            with suppress(QmpError):
                await listener.wait(timeout=0.2)


async def settings_of(qmp: Monitor) -> dict[str, dict[str, Any]]:
    """What :func:`save` changes and puts back, for somebody else to put it back."""
    capabilities = await qmp.execute("query-migrate-capabilities")
    parameters = await qmp.execute("query-migrate-parameters")
    changed = ("events", *FORMAT_CAPABILITIES)
    return {
        "capabilities": {
            entry["capability"]: entry["state"]
            for entry in capabilities
            if entry["capability"] in changed
        },
        "parameters": {name: parameters[name] for name in PARAMETERS if name in parameters},
    }


async def put_back(qmp: Monitor, settings: Mapping[str, Any]) -> None:
    """Makes the settings what :func:`settings_of` has found, where they are not."""
    now = await settings_of(qmp)
    entries = [
        {"capability": name, "state": state}
        for name, state in settings["capabilities"].items()
        if now["capabilities"].get(name) != state
    ]
    if entries:
        await qmp.execute("migrate-set-capabilities", {"capabilities": entries})
    if now["parameters"] != settings["parameters"]:
        await qmp.execute("migrate-set-parameters", settings["parameters"])


async def _error_of(qmp: Monitor) -> str:
    info = await qmp.execute("query-migrate")
    description: str = info.get("error-desc", "no reason given")
    return description


async def progress_of(qmp: Monitor) -> tuple[int, int]:
    """Bytes of RAM sent and in all, of the migration under way; (0, 0) before it counts."""
    try:
        ram = (await qmp.execute("query-migrate")).get("ram", {})
    except CommandError:
        return 0, 0
    total = int(ram.get("total", 0))
    return total - int(ram.get("remaining", 0)), total


async def has_loaded(qmp: Monitor) -> bool:
    """Whether a QEMU that was told to load a state by somebody who died since has done so.

    A command that it has received and not begun yet shows within NOT_BEGUN_SECONDS.
    """
    deadline = asyncio.get_running_loop().time() + NOT_BEGUN_SECONDS
    while await qmp.status() == "inmigrate":
        state: str = (await qmp.execute("query-migrate")).get("status", "none")
        if state in ENDED:
            # QEMU 10 stays in `inmigrate` after a load if it could not get its disks.
            return state == "completed"
        if state == "none" and asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)  # QEMU without the capability `events` tells nobody
    return True


async def let_run(qmp: Monitor) -> None:
    """Lets the guest go on after a migration that completed or failed.

    Raises:
        DiskHeldError: another process holds a disk.
        StateError: it cannot (shut down, crashed, waiting for a migration).
    """
    status = await qmp.status()
    if status == "running":
        return
    if status == "inmigrate":
        # QEMU 10 stays so after a completed load if it could not get its disks.
        info = await qmp.execute("query-migrate")
        if info.get("status") == "completed":
            raise _disk_held("its state is loaded, but QEMU stays in inmigrate (its log says why)")
    if status in ("shutdown", "guest-panicked", "internal-error", "inmigrate"):
        raise StateError(f"the guest cannot run on: it is {status}")
    try:
        await qmp.execute("cont")
    except CommandError as error:
        # QEMU 7.2 is `paused` then, and tries again at each `cont`.
        if all(word in error.message for word in LOCK_WORDS):
            raise _disk_held(error.message) from error
        raise
