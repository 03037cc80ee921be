"""A mapper, the image its memory comes from, a ledger and a pager, put together for one test."""

from __future__ import annotations

import contextlib
import os
import random
import select
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from paging.mapper_process import Mapper, wait_until

from qemu_postcopy.paging import registration
from qemu_postcopy.paging.chaos import ChaosSchedule, ChaosSource
from qemu_postcopy.paging.ledger import Ledger, LedgerBlock
from qemu_postcopy.paging.pager import Pager, PagerBlock, PagerState, Statistics
from qemu_postcopy.paging.source import FileSource, Source
from qemu_postcopy.paging.trace import TraceBlock, TraceWriter

#: The block does not begin at the beginning of the file, and not on a page border.
SOURCE_OFFSET = 4096 + 96
KIB = 1024
MIB = 1024 * KIB


def is_hole(page: int) -> bool:
    """Single holes, and runs of them."""
    return page % 7 == 3 or 100 <= page < 164


class Image:
    """Page data in a file.  Where the bitmap says 'hole' the file has rubbish, never to be seen."""

    def __init__(
        self,
        path: Path,
        pages: int,
        page_size: int,
        holes: Callable[[int], bool] = is_hole,
    ) -> None:
        self.path = path
        self.page_size = page_size
        self.holes = [holes(page) for page in range(pages)]
        self.bitmap = bytearray(-(-pages // 8))
        random_bytes = random.Random(pages).randbytes
        stored = [random_bytes(page_size) for _ in range(pages)]
        for page, hole in enumerate(self.holes):
            if not hole:
                self.bitmap[page >> 3] |= 1 << (page & 7)
        zero = bytes(page_size)
        self.expected = [zero if self.holes[page] else stored[page] for page in range(pages)]
        path.write_bytes(bytes(SOURCE_OFFSET) + b"".join(stored))
        self._tail = b""

    @property
    def data_pages(self) -> int:
        """Pages that are not holes."""
        return self.holes.count(False)

    def cut(self, page: int, bytes_left: int = 0) -> None:
        """Cuts the file short: of ``page`` the first ``bytes_left`` bytes stay."""
        size = SOURCE_OFFSET + page * self.page_size + bytes_left
        self._tail = self.path.read_bytes()[size:]
        os.truncate(self.path, size)

    def grow_back(self) -> None:
        """Appends what was cut off."""
        with self.path.open("ab") as file:
            file.write(self._tail)


class ServedGuest:
    """Everything running.  Closed in the right order at the end of the test."""

    def __init__(
        self,
        binary: Path,
        run_dir: Path,
        *,
        memory: str = "memfd",
        pages: int = 1100,
        holes: Callable[[int], bool] = is_hole,
        start: bool = True,
        chunk_size: int = 64 * KIB,
        background: bool = False,
        background_rate: int = 0,
        spin_limit_us: int = 200,
        chaos: ChaosSchedule | None = None,
        note_first_faults: bool = False,
        trace_capacity: int = 0,
    ) -> None:
        self.run_dir = run_dir
        self.mapper = Mapper(binary, memory, pages)
        self.page_size = self.mapper.page_size
        self.image = Image(run_dir / "ram", pages, self.page_size, holes)
        self.ledger_path = run_dir / "ledger"
        self.source: Source = FileSource(os.open(self.image.path, os.O_RDONLY | os.O_CLOEXEC))
        self.chaos: ChaosSource | None = None
        if chaos is not None:
            self.source = self.chaos = ChaosSource(self.source, chaos, "m0", SOURCE_OFFSET)
        self.ledger = Ledger.create(
            self.ledger_path, [LedgerBlock("m0", self.page_size, self.mapper.length)]
        )
        self.trace: TraceWriter | None = None
        if trace_capacity:
            traced = TraceBlock("m0", self.mapper.address, self.mapper.length, self.page_size)
            self.trace = TraceWriter.create(run_dir / "trace", [traced], trace_capacity)
        self.pager = Pager(
            self.mapper.userfaultfd,
            [self.pager_block()],
            self.ledger,
            chunk_size=chunk_size,
            background=background,
            background_rate=background_rate,
            spin_limit_us=spin_limit_us,
            note_first_faults=note_first_faults,
        )
        if self.trace is not None:
            self.pager.record(self.trace)
        if start:
            self.pager.start()

    def pager_block(self) -> PagerBlock:
        """The one block, as a pager takes it."""
        return PagerBlock(
            name="m0",
            address=self.mapper.address,
            length=self.mapper.length,
            page_size=self.page_size,
            source=self.source,
            source_offset=SOURCE_OFFSET,
            data_bitmap=self.image.bitmap,
        )

    def take_over(self) -> None:
        """Another pager goes on from the ledger, as after the death of a sidecar."""
        self.pager.close()
        self.pager = Pager(self.mapper.userfaultfd, [self.pager_block()], self.ledger)
        self.pager.start()
        registration.wake(self.mapper.userfaultfd, self.mapper.address, self.mapper.length)

    @property
    def statistics(self) -> Statistics:
        """Of this moment."""
        return self.pager.statistics()

    def dump(self, first: int = 0, count: int | None = None) -> bytes:
        """Guest memory, read by a system call of the mapper: pages fault from within the kernel."""
        path = self.run_dir / "dump"
        self.mapper.do("dump", first, self.mapper.pages - first if count is None else count, path)
        return path.read_bytes()

    def check_content(self, zero_pages: range = range(0)) -> None:
        """Compares all of the memory with the image; ``zero_pages`` were removed."""
        content = self.dump()
        for page, expected in enumerate(self.image.expected):
            wanted = bytes(self.page_size) if page in zero_pages else expected
            found = content[page * self.page_size : (page + 1) * self.page_size]
            assert found == wanted, (
                f"page {page} is wrong"
                + (" (all zero)" if not any(found) else "")
                + (" (should be zero)" if not any(wanted) else "")
            )

    def wait(self, condition: Callable[[Statistics], bool], what: str) -> Statistics:
        """Until the counters say so; returns them."""
        wait_until(lambda: condition(self.pager.statistics()), what)
        return self.pager.statistics()

    def wait_complete(self) -> Statistics:
        """Until every data page is present."""
        return self.wait(lambda s: s.state == PagerState.COMPLETE, "the pager is complete")

    def wait_asleep(self) -> Path:
        """Until the pager's thread sleeps in poll; returns its folder under /proc."""
        wait_until(lambda: self.pager.thread_id() > 0, "the pager thread runs")
        task = Path(f"/proc/self/task/{self.pager.thread_id()}")
        wait_until(lambda: "poll" in (task / "wchan").read_text(), "the pager sleeps")
        return task

    def notified(self) -> bool:
        """Whether the notify descriptor was signalled since the last call."""
        descriptor = self.pager.notify_fd()
        if not select.select([descriptor], [], [], 0)[0]:
            return False
        os.read(descriptor, 8)
        return True

    def close(self) -> None:
        """Leaves the counters behind as evidence, kills the mapper, frees the rest."""
        with contextlib.suppress(OSError):
            (self.run_dir / "statistics.txt").write_text(f"{self.pager.statistics()}\n")
        self.mapper.close()
        self.pager.close()
        if self.trace is not None:
            self.trace.close()
        self.ledger.close()
        self.source.close()
        os.close(self.mapper.userfaultfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
