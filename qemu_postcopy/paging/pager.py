"""The pager as Python sees it: built from blocks, started, asked, stopped.

Step "serve" of the flow.  The work is done by one C thread (``_native/pager.c``) that needs no GIL;
everything here runs in the control plane and only hands integers and buffers across.  Methods may
be called from any thread, but not two at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, Self

from qemu_postcopy._native import check, ffi, lib, new_error, raise_error
from qemu_postcopy.errors import StateError, UsageError
from qemu_postcopy.paging.account import (
    BlockCounts,
    ThreadFaults,
    VcpuCounts,
    read_blocks,
    read_threads,
    read_vcpus,
)
from qemu_postcopy.paging.ledger import Ledger
from qemu_postcopy.paging.source import Source
from qemu_postcopy.paging.trace import TraceWriter

#: Bytes filled around a fault unless told otherwise; `qemu-postcopy bench restore` chose it.
DEFAULT_CHUNK_SIZE = 64 << 10
#: Longest poll for the next fault before sleeping, in microseconds.
DEFAULT_SPIN_LIMIT_US = 500
#: Most pages that are noted as the first ones, and filled ahead.
FIRST_FAULTS: int = lib.QPC_PAGER_FIRST_FAULTS
TIMELINE_BUCKET_SECONDS = 0.01


class PagerState(IntEnum):
    """What the pager is doing."""

    IDLE = lib.QPC_PAGER_IDLE
    SERVING = lib.QPC_PAGER_SERVING
    COMPLETE = lib.QPC_PAGER_COMPLETE
    MAPPER_GONE = lib.QPC_PAGER_MAPPER_GONE


@dataclass(frozen=True)
class PagerBlock:
    """One RAM block to serve.

    Sizes and ``source_offset`` are in bytes, ``address`` is the mapper's.  ``source`` holds the
    block's bytes from ``source_offset`` on and stays the caller's; ``data_bitmap`` has one bit per
    page, least significant first, 0 where the page is known to be zero.
    """

    name: str
    address: int
    length: int
    page_size: int
    source: Source
    source_offset: int
    data_bitmap: bytes | bytearray | memoryview


@dataclass(frozen=True)
class Statistics:
    """Counters since the pager was made; see ``struct qpc_pager_statistics`` for each.

    Times ending in ``_ns`` are CLOCK_MONOTONIC nanoseconds, 0 for "not yet".  ``latency_us[i]``
    counts faults answered in less than 2**i microseconds (and at least half of that) after they
    were read; ``timeline[i]`` the faults read in the i-th hundredth of a second.
    """

    state: PagerState
    faults: int
    faults_waiting: int
    pages_total: int
    pages_data: int
    pages_data_missing: int
    pages_demand: int
    pages_background: int
    pages_prefetched: int
    pages_zero: int
    pages_removed: int
    bytes_read: int
    already_present: int
    pages_foreign: int
    foreign_block: int
    foreign_page: int
    retries: int
    events_remove: int
    events_unmap: int
    events_other: int
    wakes: int
    source_errors: int
    fill_errors: int
    last_error: int
    last_error_block: int
    last_error_page: int
    failing: int
    reading_since_ns: int
    reading_block: int
    reading_page: int
    spins_hit: int
    spins_missed: int
    started_ns: int
    first_fault_ns: int
    last_fault_ns: int
    complete_ns: int
    latency_us: tuple[int, ...]
    timeline: tuple[int, ...]

    @property
    def present_share(self) -> float:
        """Share of the data pages that are present, 0.0 to 1.0."""
        if not self.pages_data:
            return 1.0
        return 1.0 - self.pages_data_missing / self.pages_data


SCALARS = [
    name for name in Statistics.__dataclass_fields__ if name not in ("latency_us", "timeline")
]


class Pager:
    """Serves the faults of one userfaultfd from the moment of :meth:`start`.

    Args:
        userfaultfd: registered for all the blocks, non-blocking; stays the caller's.
        blocks: what to serve; the ledger has an entry for each.
        chunk_size: bytes filled around a fault, a power of two from 4 KiB to 2 MiB (a page of the
            block where that is larger).
        background: fill the rest while nobody waits.
        background_rate: bytes per second, 0 for no limit.
        spin_limit_us: longest poll for the next fault, 0 for none.
        note_first_faults: for :meth:`first_faults`; the first tenth of a second is served page by
            page then.

    Raises:
        UsageError: a size or address that cannot be.

    After :meth:`close` what it has counted can still be asked for; all else is a StateError.
    """

    def __init__(
        self,
        userfaultfd: int,
        blocks: Sequence[PagerBlock],
        ledger: Ledger,
        *,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        background: bool = True,
        background_rate: int = 0,
        spin_limit_us: int = DEFAULT_SPIN_LIMIT_US,
        note_first_faults: bool = False,
    ) -> None:
        self.blocks = list(blocks)
        structs = ffi.new("struct qpc_pager_block[]", len(self.blocks))
        options = ffi.new("struct qpc_pager_options *")
        with ExitStack() as buffers:
            states = ffi.from_buffer("uint8_t[]", ledger.mapping, require_writable=True)
            buffers.callback(ffi.release, states)
            for struct, block in zip(structs, self.blocks, strict=True):
                bitmap = ffi.from_buffer("uint8_t[]", block.data_bitmap)
                buffers.callback(ffi.release, bitmap)
                entry = ledger.block(block.name)
                if (entry.page_size, entry.length) != (block.page_size, block.length):
                    raise UsageError(
                        f"the ledger {ledger.path} has block {block.name} with other sizes",
                        hint="a ledger belongs to one guest; give each its own run directory",
                    )
                if len(bitmap) * 8 < entry.page_count:
                    raise UsageError(
                        f"the bitmap of block {block.name} is too short: {len(bitmap)} bytes",
                        hint="it has one bit for each page of the block",
                    )
                struct.address = block.address
                struct.length = block.length
                struct.page_size = block.page_size
                struct.source = block.source.handle
                struct.source_offset = block.source_offset
                struct.data_bitmap = bitmap
                struct.ledger = states + entry.offset
            options.userfaultfd = userfaultfd
            options.chunk_size = chunk_size
            options.background = background
            options.background_rate = background_rate
            options.spin_limit_us = spin_limit_us
            options.note_first_faults = note_first_faults
            options.journal = states + ledger.journal_offset
            error = new_error()
            self._pager = lib.qpc_pager_create(options, structs, len(self.blocks), error)
            if self._pager == ffi.NULL:
                raise_error(error)
            self._buffers = buffers.pop_all()
        self._last: Statistics | None = None
        self._last_threads: list[ThreadFaults] = []
        self._last_blocks: list[BlockCounts] = []
        self._last_vcpus = VcpuCounts(0, 0, 0, 0)
        self._last_first_faults: list[tuple[int, int]] = []

    def _open(self) -> Any:
        if self._pager == ffi.NULL:
            raise StateError("the pager is closed")
        return self._pager

    def prefetch(self, pages: Sequence[tuple[int, int]]) -> None:
        """Has these pages (indices of block and page) filled first of all.

        Before :meth:`start`, once, at most FIRST_FAULTS of them.  Faults still come first.
        """
        structs = ffi.new("struct qpc_pager_page[]", pages)
        error = new_error()
        check(lib.qpc_pager_prefetch(self._open(), structs, len(pages), error), error)

    def first_faults(self) -> list[tuple[int, int]]:
        """Indices of block and page of the first faults, in their order, at most FIRST_FAULTS.

        Only where ``note_first_faults`` was asked for: see ``qpc_pager_first_faults``.  After
        :meth:`close`: as they were.
        """
        if self._pager == ffi.NULL:
            return self._last_first_faults
        structs = ffi.new("struct qpc_pager_page[]", FIRST_FAULTS)
        count = lib.qpc_pager_first_faults(self._pager, structs)
        return [(int(structs[i].block), int(structs[i].page)) for i in range(count)]

    def record(self, trace: TraceWriter) -> None:
        """Has every fault recorded.  Before :meth:`start`; ``trace`` is closed after the pager."""
        lib.qpc_pager_record(self._open(), trace.trace, trace.records)

    def start(self) -> None:
        """Starts the thread; faults are served from now on."""
        error = new_error()
        check(lib.qpc_pager_start(self._open(), error), error)

    def stop(self) -> None:
        """Ends the thread; faults wait until :meth:`start` is called again.  No data is lost."""
        if self._pager == ffi.NULL:
            return
        error = new_error()
        check(lib.qpc_pager_stop(self._pager, error), error)

    def close(self) -> None:
        """Stops and frees.  Does not unregister: faults wait for whoever takes over."""
        if self._pager != ffi.NULL:
            self._last = self.statistics()
            self._last_threads = self.threads()
            self._last_blocks = self.block_counts()
            self._last_vcpus = self.vcpus()
            self._last_first_faults = self.first_faults()
            lib.qpc_pager_destroy(self._pager)
            self._pager = ffi.NULL
            self._buffers.close()

    def set_background(self, enabled: bool, rate: int = 0, *, at_once: bool = False) -> None:
        """Turns filling in the background on or off; ``rate`` in bytes per second, 0 = no limit.

        Args:
            at_once: it does not wait for moments without faults either, which slows the guest.
        """
        mode = lib.QPC_BACKGROUND_AT_ONCE if enabled and at_once else int(enabled)
        lib.qpc_pager_set_background(self._open(), mode, rate)

    def notify_fd(self) -> int:
        """Readable when the state changed, errors began or ended, or a thread faulted for the first
        time; read 8 bytes to reset."""
        return int(lib.qpc_pager_notify_fd(self._open()))

    def thread_id(self) -> int:
        """For ``os.sched_setaffinity``; 0 while stopped."""
        if self._pager == ffi.NULL:
            return 0
        return int(lib.qpc_pager_thread_id(self._pager))

    def statistics(self) -> Statistics:
        """The counters, each right by itself; cheap, and never waits for the pager.

        After :meth:`close`: as they were last.
        """
        if self._last is not None:
            return self._last
        raw = ffi.new("struct qpc_pager_statistics *")
        lib.qpc_pager_read_statistics(self._pager, raw)
        values = {name: int(getattr(raw, name)) for name in SCALARS}
        timeline = list(raw.timeline)
        while timeline and timeline[-1] == 0:
            timeline.pop()
        return Statistics(
            **{**values, "state": PagerState(values["state"])},  # type: ignore[arg-type]
            latency_us=tuple(raw.latency_us),
            timeline=tuple(timeline),
        )

    def threads(self) -> list[ThreadFaults]:
        """Whose faults were answered; after :meth:`close` as it was last."""
        if self._pager == ffi.NULL:
            return self._last_threads
        return read_threads(self._pager)

    def block_counts(self) -> list[BlockCounts]:
        """What became of each block, in their order; after :meth:`close` as it was last."""
        if self._pager == ffi.NULL:
            return self._last_blocks
        return read_blocks(self._pager, len(self.blocks))

    def name_vcpus(self, tids: Sequence[int]) -> None:
        """Says which threads run virtual CPUs, so that :meth:`vcpus` can tell when all wait.

        ``tids`` as :meth:`threads` has them.  Again whenever that changes.
        """
        lib.qpc_pager_name_vcpus(self._open(), list(tids), len(tids))

    def vcpus(self) -> VcpuCounts:
        """The virtual CPUs as a whole; after :meth:`close` as it was last."""
        if self._pager == ffi.NULL:
            return self._last_vcpus
        return read_vcpus(self._pager)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
