"""The job "snapshot": a running guest becomes an image.

    connect -> refuse what cannot be paged -> migrate into a pipe, taken apart as it comes
    -> let the guest go on -> checksums and manifest -> rename into place

The guest is stopped by QEMU itself and only for the stream; whatever fails, is interrupted or
killed leaves the guest running and no image under the final name.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qemu_postcopy.errors import (
    MismatchError,
    OperationCancelledError,
    PostcopyError,
    StateError,
    UsageError,
)
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.stream import Demultiplexer, StreamSummary
from qemu_postcopy.image.writer import ImageWriter
from qemu_postcopy.progress import ByteProgress
from qemu_postcopy.vm import migration
from qemu_postcopy.vm.guard import SETTLE_SECONDS, Guard
from qemu_postcopy.vm.launch import OPERATOR_ID
from qemu_postcopy.vm.layout import block_of, parse_ramblocks
from qemu_postcopy.vm.memory_devices import current_arguments, require_migratable
from qemu_postcopy.vm.monitor import Monitor
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.qmp import Qmp
from qemu_postcopy.vm.refusals import refusals

log = logging.getLogger(__name__)

PIPE_BYTES = 1 << 20
PROGRESS_SECONDS = 0.1
THEN = ("as-before", "run", "stop", "quit")


@dataclass(frozen=True)
class SnapshotOptions:
    """What to save, and how.

    Attributes:
        qmp: the guest's monitor, a UNIX socket (its peer must be QEMU itself); or a domain's name
            or UUID, where ``connect`` is given.
        image: directory to make.
        connect: URI of the libvirt that runs the domain.
        accept_lost_writes: with ``max_downtime_ms``, where QEMU is known to lose writes then.
        then: what the guest does afterwards: `as-before`, `run`, `stop` or `quit`.
        max_downtime_ms: copy while the guest runs until stopping it takes no longer; None: stop it
            (almost) at once, which is soonest over.
    """

    qmp: Path | str
    image: Path
    then: str = "as-before"
    max_downtime_ms: int | None = None
    connect: str | None = None
    accept_lost_writes: bool = False


@dataclass(frozen=True)
class SnapshotResult:
    """What became of it; sizes in bytes, times in milliseconds."""

    image: Path
    ram_bytes: int
    data_bytes: int
    downtime_ms: int
    total_ms: int

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {**asdict(self), "image": str(self.image)}


async def snapshot(
    options: SnapshotOptions, progress: ByteProgress | None = None
) -> SnapshotResult:
    """Saves a guest.  Cancelling the task is safe at any point: the guest runs on.

    Raises:
        QmpError: the monitor cannot be reached, or QEMU refused.
        MismatchError: a guest whose memory cannot be paged (VFIO, encrypted), or of whose writes
            QEMU would lose some.
        HostError: disk full, or no right to write there.
        UsageError: the image exists already; an unknown ``then``.
        StateError: the guest stands still since an earlier snapshot.
    """
    if options.then not in THEN:
        raise UsageError(f"then={options.then!r} is unknown", hint=f"one of {', '.join(THEN)}")
    began = time.monotonic()
    with ImageWriter(options.image) as writer:
        async with _reach(options) as (qmp, address, describe):
            before = await qmp.status()
            if before == "postmigrate":
                # QEMU refuses to migrate from this state (migration/migration.c, migrate_prepare).
                raise StateError(
                    "the guest stands still since an earlier snapshot or migration (postmigrate), "
                    "and QEMU does not save it from that state",
                    hint="let it run first: cont in its monitor",
                )
            await _require_pageable(qmp)
            if options.max_downtime_ms is not None and not options.accept_lost_writes:
                await _require_kept_writes(qmp)
            described = await describe()
            page_sizes = await _lazy_blocks(qmp)
            guard = Guard(address, await migration.settings_of(qmp))
            with guard if before == "running" else nullcontext():
                under_way = threading.Event()
                try:
                    summary = await _save(
                        qmp, writer, list(page_sizes), options.max_downtime_ms, progress, under_way
                    )
                    downtime = int((await qmp.execute("query-migrate")).get("downtime", 0))
                    if options.then == "run" or (
                        options.then == "as-before" and before == "running"
                    ):
                        await migration.let_run(qmp)
                    finish = partial(
                        writer.finish, summary, page_sizes_bytes=page_sizes, **described
                    )
                    image = await _in_thread(finish, progress)
                except BaseException:
                    # No image: whatever was to become of the guest afterwards, it runs on.  But
                    # where nothing was begun it is another's, whose snapshot may have stopped it.
                    if before == "running":
                        if not under_way.is_set() or await asyncio.shield(_runs_on(qmp)):
                            guard.dismiss()
                        else:  # the guard needs the monitor
                            await asyncio.shield(qmp.close())
                    raise
                guard.dismiss()
            # Not before the image is whole and in place.
            if options.then == "quit":
                await qmp.execute("quit")
    manifest = image.manifest
    return SnapshotResult(
        image=options.image,
        ram_bytes=sum(block.size_bytes for block in manifest.blocks),
        data_bytes=sum(block.data_bytes for block in manifest.blocks),
        downtime_ms=downtime,
        total_ms=int((time.monotonic() - began) * 1000),
    )


async def _save(
    qmp: Monitor,
    writer: ImageWriter,
    names: list[str],
    max_downtime_ms: int | None,
    progress: ByteProgress | None,
    under_way: threading.Event,
) -> StreamSummary:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    stream = os.fdopen(read_end, "rb", buffering=0)
    demultiplexer = Demultiplexer(read_end, writer.directory, names)
    summaries: list[StreamSummary] = []

    async def drain() -> None:
        running = asyncio.ensure_future(asyncio.to_thread(demultiplexer.run))
        try:
            summaries.append(await asyncio.shield(running))
        except asyncio.CancelledError:
            demultiplexer.cancel()
            await asyncio.wait({running})
            running.exception()  # seen: it is the interruption that matters
            raise
        finally:
            # QEMU may be blocked in a write to the full pipe, out of which migrate_cancel does not
            # get it (it shuts sockets down); the end of the last reader does (EPIPE, pipe(7)).
            stream.close()

    reporter = asyncio.ensure_future(_report(qmp, progress)) if progress else None
    try:
        await migration.save(
            qmp, write_end, drain, max_downtime_ms=max_downtime_ms, under_way=under_way
        )
    finally:
        stream.close()
        if reporter is not None:
            reporter.cancel()
    return summaries[0]


async def _runs_on(qmp: Monitor) -> bool:
    """Lets the guest go on after a snapshot that failed; False where that is not known."""
    try:
        async with asyncio.timeout(SETTLE_SECONDS):
            await migration.settled(qmp)
            await migration.let_run(qmp)
    except (PostcopyError, TimeoutError) as error:
        log.info("not known to run on: %s", error)
        return False
    return True


async def _in_thread(finish: Callable[..., Image], progress: ByteProgress | None) -> Image:
    """Runs ``finish`` in a thread; a cancellation ends it before the rename, if it still can."""
    cancelled = threading.Event()

    def report(done: int, total: int) -> None:
        if cancelled.is_set():
            raise OperationCancelledError("the snapshot was interrupted")
        if progress is not None:
            progress(done, total)

    running = asyncio.ensure_future(asyncio.to_thread(finish, progress=report))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait({running})
        running.exception()  # seen: it is the interruption that matters
        raise


async def _report(qmp: Monitor, progress: ByteProgress) -> None:
    with suppress(PostcopyError):  # a lost connection is for the snapshot itself to report
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            progress(*await migration.progress_of(qmp))


async def _lazy_blocks(qmp: Monitor) -> dict[str, int]:
    """The RAM blocks that belong to memory back-ends, with their page sizes in bytes."""
    listed = parse_ramblocks(await qmp.human("info ramblock"))
    blocks = [
        block_of(backend["id"], backend["size"], listed) for backend in await qmp.memory_backends()
    ]
    return {block.name: block.page_size_bytes for block in blocks if block is not None}


async def _require_pageable(qmp: Monitor) -> None:
    """MismatchError where the guest's memory cannot be paged: the image would be of no use."""
    reasons = await refusals(qmp)
    if reasons:
        raise MismatchError("this guest cannot be resumed lazily: " + "; ".join(reasons))
    await require_migratable(qmp)


async def _require_kept_writes(qmp: Monitor) -> None:
    """MismatchError where an image made while the guest runs would lack some of its writes."""
    if await migration.passes_lose_writes(qmp):
        raise MismatchError(
            f"no image is made while this guest runs: {migration.LOST_WRITES}",
            hint="leave --max-downtime out, which stops it meanwhile; --accept-lost-writes does it "
            "all the same: the guest goes on unharmed, what is restored from the image may crash",
        )


#: What the manifest says of the guest, as :meth:`ImageWriter.finish` takes it.
Describe = Callable[[], Awaitable[dict[str, Any]]]


@asynccontextmanager
async def _reach(options: SnapshotOptions) -> AsyncIterator[tuple[Monitor, str, Describe]]:
    """The guest's monitor, its address for the guard, and what describes the guest."""
    if options.connect is not None:
        from qemu_postcopy.libvirt.snapshot import describe_domain, reach_domain

        async with reach_domain(options.connect, str(options.qmp)) as (monitor, address):
            yield monitor, address, partial(describe_domain, monitor)
    else:
        path = Path(options.qmp)
        async with await Qmp.connect(path) as qmp:
            yield qmp, str(Path.cwd() / path), partial(_describe, qmp)


async def _describe(qmp: Qmp) -> dict[str, Any]:
    with ProcessIdentity.open(qmp.peer_pid()) as identity:
        identity.require_qemu()
        argv = await current_arguments(qmp, identity.cmdline())
        pid = identity.pid
    run_directory = next(
        (str(Path(part).parent) for part in _monitor_paths(argv) if part.endswith("/qmp.sock")),
        None,
    )
    name = (await qmp.execute("query-name")).get("name")
    return {
        "architecture": await qmp.target(),
        "qemu_version": ".".join(map(str, qmp.version)),
        "source": f"snapshot of PID {pid}",
        "guest_name": name,
        "launch": {"argv": argv, "run_directory": run_directory},
        "disks": [asdict(disk) for disk in await qmp.disks()],
    }


def _monitor_paths(argv: list[str]) -> list[str]:
    return [
        prop.removeprefix("path=")
        for part in argv
        if part.startswith(f"socket,id={OPERATOR_ID},")
        for prop in part.split(",")
        if prop.startswith("path=")
    ]
