"""Promise: where data cannot be had the guest waits and the operator is told; never zeros."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paging.mapper_process import Mapper, wait_until
from paging.served_guest import KIB, SOURCE_OFFSET, Image, ServedGuest

from qemu_postcopy.paging.ledger import Ledger, LedgerBlock
from qemu_postcopy.paging.pager import Pager, PagerBlock
from qemu_postcopy.paging.source import FileSource

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

FIRST_RETRY_SECONDS = 0.01


def no_hole(page: int) -> bool:
    return False


@pytest.mark.parametrize("bytes_left", [0, 1, 1000, 4095])
def test_a_source_cut_short_makes_the_fault_wait(serve: Serve, bytes_left: int) -> None:
    guest = serve(holes=no_hole)
    guest.image.cut(701, bytes_left)
    reader = guest.mapper.send("read", 701)
    statistics = guest.wait(lambda s: s.source_errors > 0, "the error was counted")
    assert statistics.last_error == errno.ENODATA
    assert (statistics.last_error_block, statistics.last_error_page) == (0, 701)
    assert statistics.faults_waiting == 1
    assert guest.notified()

    # What is before the cut is served, also in the same chunk and meanwhile.
    assert guest.mapper.first_word(700) == guest.image.expected[700][:8]
    assert guest.mapper.first_word(20) == guest.image.expected[20][:8]
    assert guest.mapper.is_waiting(reader)
    assert guest.ledger.states("m0")[701] == 0

    guest.notified()
    guest.image.grow_back()
    assert guest.mapper.result(reader).to_bytes(8, "little") == guest.image.expected[701][:8]
    guest.check_content()
    guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")


def test_background_fills_what_is_left_of_a_cut_source(serve: Serve) -> None:
    guest = serve(holes=no_hole, start=False)
    guest.image.cut(512)
    guest.pager.set_background(True)
    guest.pager.start()
    statistics = guest.wait(lambda s: s.pages_background == 512, "the rest is there")
    assert statistics.pages_data_missing == 1100 - 512
    guest.wait(lambda s: s.last_error == errno.ENODATA, "the error was told")
    assert statistics.complete_ns == 0
    guest.image.grow_back()
    guest.wait_complete()
    guest.check_content()


class TwoSources:
    """Two blocks of one mapper, of which the first one's reads fail while ``fail`` is on.

    pread(2) of a descriptor with O_DIRECT at an odd offset ends with EINVAL (open(2)), and the flag
    can be set and cleared while the pager runs.
    """

    PAGES = 64

    def __init__(self, binary: Path, run_dir: Path) -> None:
        self.mapper = Mapper(binary, "memfd", 2 * self.PAGES)
        self.images = [Image(run_dir / f"ram{i}", self.PAGES + i, 4096, no_hole) for i in (0, 1)]
        self.descriptors = [os.open(image.path, os.O_RDONLY) for image in self.images]
        self.sources = [FileSource(descriptor) for descriptor in self.descriptors]
        half = self.mapper.length // 2
        self.ledger = Ledger.create(
            run_dir / "ledger", [LedgerBlock(f"m{i}", 4096, half) for i in (0, 1)]
        )
        blocks = [
            PagerBlock(
                name=f"m{i}",
                address=self.mapper.address + i * half,
                length=half,
                page_size=4096,
                source=self.sources[i],
                source_offset=SOURCE_OFFSET,
                data_bitmap=self.images[i].bitmap,
            )
            for i in (0, 1)
        ]
        self.pager = Pager(
            self.mapper.userfaultfd, blocks, self.ledger, chunk_size=4 * KIB, background=False
        )

    def fail(self, on: bool) -> None:
        fcntl.fcntl(self.descriptors[0], fcntl.F_SETFL, os.O_DIRECT if on else 0)

    def close(self) -> None:
        self.mapper.close()
        self.pager.close()
        self.ledger.close()
        for source in self.sources:
            source.close()
        os.close(self.mapper.userfaultfd)


@pytest.fixture
def two_sources(mapper_binary: Path, run_dir: Path) -> Iterator[TwoSources]:
    sources = TwoSources(mapper_binary, run_dir)
    sources.fail(True)
    with pytest.raises(OSError, match="Invalid argument"):
        os.pread(sources.descriptors[0], 4096, SOURCE_OFFSET)
    yield sources
    sources.close()


@pytest.mark.needs("disk")
def test_a_read_error_is_retried_and_holds_up_nobody_else(two_sources: TwoSources) -> None:
    mapper, pager, images = two_sources.mapper, two_sources.pager, two_sources.images
    pager.start()
    started = time.monotonic()
    blocked = [mapper.send("read", page) for page in range(8)]
    mapper.wait_blocked(8)
    for page in range(64):
        assert mapper.first_word(64 + page) == images[1].expected[page][:8]
    while pager.statistics().source_errors < 8 * 5:
        assert time.monotonic() < started + 30
        time.sleep(0.001)
    wait_until(lambda: pager.statistics().faults_waiting == 8, "only these wait")
    statistics = pager.statistics()
    attempts_each = math.log2((time.monotonic() - started) / FIRST_RETRY_SECONDS + 1) + 2
    assert statistics.source_errors <= 8 * attempts_each, "no backoff"
    assert statistics.last_error == errno.EINVAL
    assert statistics.last_error_block == 0
    assert all(mapper.is_waiting(command) for command in blocked)

    two_sources.fail(False)
    for page, command in enumerate(blocked):
        assert mapper.result(command).to_bytes(8, "little") == images[0].expected[page][:8]
    wait_until(lambda: pager.statistics().faults_waiting == 0, "nobody waits")
