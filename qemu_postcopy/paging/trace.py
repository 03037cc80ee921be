"""The trace of faults: a file that the pager thread writes as it answers, and its strict reader.

Step "account" of the flow.  The file is reserved in full when it is made and mapped shared, so
that the pager writes a record without a system call and what was written survives a sidecar that is
killed (not a host that fails).  When it is full it stays as it is; later faults count as lost.
It must not be truncated while it is written: the pager would be ended by SIGBUS.  Put it on a tmpfs
where the least delay matters.  The reader trusts nothing in the file.

Format, version 1, little-endian, offsets in bytes:

    0       magic "QPCTRACE", u32 version, u32 size of a record
    16      u64 capacity, u64 count, u64 lost (``struct qpc_trace`` of ``_native/pager_trace.h``)
    40      u64 CLOCK_MONOTONIC and u64 CLOCK_REALTIME of its making, in ns
    56      u32 count of blocks, u32 count of threads
    4096    blocks, 64 of them: u64 address, u64 length, u64 page size, name (104 bytes, NUL-padded)
    12288   threads, 513 at most: u32 tid, who it is (28 bytes, NUL-padded)
    32768   records (``struct qpc_trace_record``), in the order of the answers
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from qemu_postcopy._native import ffi, lib
from qemu_postcopy.errors import HostError, ImageError, UsageError

MAGIC = b"QPCTRACE"
VERSION = 1
HEADER = struct.Struct("<8sIIQQQQQII")
COUNTERS_OFFSET = 16
THREAD_COUNT_OFFSET = 60
BLOCK = struct.Struct("<QQQ104s")
BLOCKS_OFFSET = 4096
MOST_BLOCKS = 64
THREAD = struct.Struct("<I28s")
THREADS_OFFSET = 12288
MOST_THREADS = 513
RECORD = struct.Struct("<QIIIHBB")
RECORDS_OFFSET = 32768
#: Faults that a trace has room for unless told otherwise (24 MB).
DEFAULT_CAPACITY = 1_000_000
MOST_RECORDS = 1 << 32


class Answer(IntEnum):
    """How a fault was answered."""

    DATA = lib.QPC_TRACE_DATA
    ZERO = lib.QPC_TRACE_ZERO
    GONE = lib.QPC_TRACE_GONE


class Fault(NamedTuple):
    """One record.  Times in ns: ``read_ns`` is CLOCK_MONOTONIC when the pager read the message,
    ``latency_ns`` from then to the answer (2**32 - 1: as much or more); ``page`` and ``block`` are
    indices; ``attempts`` counts how often it was put off (255: as often or more)."""

    read_ns: int
    tid: int
    page: int
    latency_ns: int
    block: int
    answer: int
    attempts: int


@dataclass(frozen=True)
class TraceBlock:
    """A RAM block; sizes in bytes, ``address`` is the mapper's."""

    name: str
    address: int
    length: int
    page_size: int


@dataclass(frozen=True)
class TraceThread:
    """A thread that faulted: ``origin`` as :meth:`qemu_postcopy.vm.origin.Origins.name` has it."""

    tid: int
    origin: str


class TraceWriter:
    """A trace for one pager.  It must be closed after the pager.

    Made by :meth:`create` or :meth:`resume`.  ``set_threads`` is for one thread of the control
    plane; the records are the pager thread's.
    """

    def __init__(
        self, path: Path, mapping: mmap.mmap, threads: Mapping[int, str] | None = None
    ) -> None:
        self.path = path
        self._threads = dict(threads or {})
        self.mapping = mapping
        self.buffer = ffi.from_buffer("uint8_t[]", mapping, require_writable=True)
        self.trace = ffi.cast("struct qpc_trace *", self.buffer + COUNTERS_OFFSET)
        self.records = ffi.cast("struct qpc_trace_record *", self.buffer + RECORDS_OFFSET)

    @classmethod
    def create(
        cls, path: Path, blocks: Sequence[TraceBlock], capacity: int = DEFAULT_CAPACITY
    ) -> Self:
        """Makes the file (0600; there must be none yet) with room for ``capacity`` faults.

        Raises:
            UsageError: the file exists, or there are more than 64 blocks.
            HostError: it cannot be made, or there is no room for it.
        """
        if len(blocks) > MOST_BLOCKS or not 0 < capacity <= MOST_RECORDS:
            raise UsageError(
                f"a trace holds at most {MOST_BLOCKS} blocks and {MOST_RECORDS} faults",
                hint="restore without --trace",
            )
        size = RECORDS_OFFSET + capacity * RECORD.size
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise UsageError(f"{path} exists", hint="give the trace another name") from error
        except OSError as error:
            raise HostError(
                f"the trace {path} cannot be made: {error.strerror}",
                hint="choose a place that can be written",
            ) from error
        try:
            os.posix_fallocate(descriptor, 0, size)
            mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            path.unlink()
            what = "there is no room" if error.errno == errno.ENOSPC else error.strerror
            raise HostError(
                f"the trace {path} needs {size} bytes: {what}",
                hint="choose another place",
            ) from error
        finally:
            os.close(descriptor)
        for index, block in enumerate(blocks):
            BLOCK.pack_into(
                mapping,
                BLOCKS_OFFSET + index * BLOCK.size,
                block.address,
                block.length,
                block.page_size,
                block.name.encode()[:104],
            )
        now = time.monotonic_ns(), time.time_ns()
        HEADER.pack_into(
            mapping, 0, MAGIC, VERSION, RECORD.size, capacity, 0, 0, *now, len(blocks), 0
        )
        return cls(path, mapping)

    @classmethod
    def resume(cls, path: Path, blocks: Sequence[TraceBlock]) -> Self:
        """Goes on with a trace of the same guest whose writer was killed, where it had ended.

        Raises:
            ImageError: it is damaged, or of other blocks.
            HostError: it is gone, or not ours.
        """
        with Trace(path) as trace:
            if trace.blocks != [replace(block, name=block.name[:104]) for block in blocks]:
                raise ImageError(
                    f"the trace {path} is of other memory", hint="was it moved or replaced?"
                )
            size = RECORDS_OFFSET + trace.capacity * RECORD.size
            threads = {thread.tid: thread.origin for thread in trace.threads}
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                # Room that is not there would end the pager with SIGBUS.
                os.posix_fallocate(descriptor, 0, size)
                mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise HostError(
                f"the trace {path} cannot be gone on with: {error.strerror}",
                hint="what it holds so far is whole",
            ) from error
        return cls(path, mapping, threads)

    def set_threads(self, threads: Mapping[int, str]) -> None:
        """Notes who the threads are, by their ids; what was noted before stays."""
        self._threads.update(threads)
        for index, (tid, origin) in enumerate(list(self._threads.items())[:MOST_THREADS]):
            THREAD.pack_into(
                self.mapping, THREADS_OFFSET + index * THREAD.size, tid, origin.encode()[:28]
            )
        count = min(len(self._threads), MOST_THREADS)
        struct.pack_into("<I", self.mapping, THREAD_COUNT_OFFSET, count)

    def close(self) -> None:
        """Unmaps.  The file keeps its size."""
        ffi.release(self.buffer)
        self.mapping.close()


class Trace:
    """A trace as it lies in a file, which may be written meanwhile: of the moment it was opened.

    Usable as a context manager.  Iterating gives :class:`Fault`; ``records`` are the same as bytes,
    for those who want them by the million.
    """

    def __init__(self, path: Path, *, cut_allowed: bool = False) -> None:
        """Opens and checks everything but the records.

        ``cut_allowed``: where the end of the file is missing, the records that are there are those
        of the trace, and ``cut`` says how many are not.

        Raises:
            ImageError: it is no trace, of a version that is not known, or damaged.
        """
        self.path = path
        self._cut_allowed = cut_allowed
        self.cut = 0
        try:
            with path.open("rb") as file:
                self._mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:  # ValueError: empty
            raise ImageError(
                f"the trace {path} cannot be read: {error}", hint="is it a file of --trace?"
            ) from error
        try:
            self._read()
        except ImageError:
            self._mapping.close()
            raise

    def _read(self) -> None:
        size = len(self._mapping)
        if size < RECORDS_OFFSET or self._mapping[:8] != MAGIC:
            raise self._damaged("it is no trace of faults")
        fields: tuple[int, ...] = HEADER.unpack_from(self._mapping)[1:]
        version, record_size, capacity, count, self.lost, *rest = fields
        self.started_ns, self.realtime_ns, blocks, threads = rest
        if (version, record_size) != (VERSION, RECORD.size):
            raise self._damaged(f"its version {version} is not known here")
        if (
            count > capacity
            or not 0 < capacity <= MOST_RECORDS
            or blocks > MOST_BLOCKS
            or threads > MOST_THREADS
        ):
            raise self._damaged("its header is damaged")
        there = max(0, size - RECORDS_OFFSET) // RECORD.size
        if count > there:
            if not self._cut_allowed:
                raise self._damaged(f"it was cut short: {count - there} of {count} faults are lost")
            self.cut, count = count - there, there
        self.blocks = [self._block(index) for index in range(blocks)]
        self.threads = [self._thread(index) for index in range(threads)]
        self.count = count
        self.capacity = capacity

    def _damaged(self, what: str) -> ImageError:
        return ImageError(f"{self.path}: {what}", hint="give a file of `restore --trace`")

    def _block(self, index: int) -> TraceBlock:
        offset = BLOCKS_OFFSET + index * BLOCK.size
        address, length, page_size, name = BLOCK.unpack_from(self._mapping, offset)
        if page_size < 4096 or page_size & (page_size - 1) or not length or length % page_size:
            raise self._damaged(f"block {index} has impossible sizes")
        return TraceBlock(_text(name), address, length, page_size)

    def _thread(self, index: int) -> TraceThread:
        offset = THREADS_OFFSET + index * THREAD.size
        tid, origin = THREAD.unpack_from(self._mapping, offset)
        return TraceThread(tid, _text(origin))

    @property
    def records(self) -> bytes:
        """All records as they lie in the file; see ``RECORD``.  Not checked."""
        return self._mapping[RECORDS_OFFSET : RECORDS_OFFSET + self.count * RECORD.size]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Fault]:
        """Raises ImageError at a record that cannot be."""
        pages = [block.length // block.page_size for block in self.blocks]
        for fields in RECORD.iter_unpack(self.records):
            fault = Fault._make(fields)
            if (
                fault.block >= len(pages)
                or fault.page >= pages[fault.block]
                or fault.answer > Answer.GONE
            ):
                raise self._damaged(f"a record of it cannot be: {fault}")
            yield fault

    def close(self) -> None:
        """Unmaps the file."""
        self._mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode(errors="replace")
