"""Promises S7 and S8: pages are moved, not copied; strictly; and huge pages stay whole."""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from userfaultfd.faulting import PAGE, WAIT_SECONDS, next_fault, page_of, word_of

from qemu_postcopy.errors import Outcome, UserfaultfdError
from qemu_postcopy.region import HUGE_BYTES, Region
from qemu_postcopy.userfaultfd import Feature, Userfaultfd

pytestmark = pytest.mark.needs("uffd", "root")

#: Linux 6.1: makes huge pages of what is there (madvise(2)); Python has no name for it yet.
MADV_COLLAPSE = 25

Background = Callable[..., Future[Any]]


def filled(pages: int, alignment: int = PAGE) -> Region:
    """Pages of 1, 2, 3 ..."""
    memory = Region.anonymous(pages * PAGE, alignment=alignment)
    for page in range(pages):
        memory.fill(page % 250 + 1, page * PAGE, PAGE)
    return memory


def fill_huge(memory: Region, value: int) -> None:
    """Huge pages from begin to end, though the kernel may have had none at hand."""
    memory.advise(mmap.MADV_HUGEPAGE)
    memory.fill(value)
    if memory.huge_bytes() != memory.length:
        memory.advise(MADV_COLLAPSE)
    assert memory.huge_bytes() == memory.length


def test_a_fault_is_answered_by_the_very_page_that_lay_elsewhere(background: Background) -> None:
    with (
        filled(1) as source,
        Region.anonymous(PAGE) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        ours.register(memory.address, PAGE)
        frame = source.page_frame(0)
        touched = background(memory.load, 0)
        next_fault(ours)
        assert ours.move(memory.address, source.address, PAGE) == PAGE
        assert touched.result(WAIT_SECONDS) == word_of(1)
        assert frame is not None
        assert memory.page_frame(0) == frame
        assert source.page_frame(0) is None
        assert source.load(0) == 0


def test_a_filled_destination_is_not_overwritten() -> None:
    with (
        filled(2) as source,
        Region.anonymous(2 * PAGE) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        ours.register(memory.address, memory.length)
        ours.copy(memory.at(PAGE), page_of(9))
        with pytest.raises(UserfaultfdError) as caught:
            ours.move(memory.at(PAGE), source.address, PAGE)
        assert caught.value.outcome is Outcome.PRESENT
        assert (memory.load(PAGE), source.load(0)) == (word_of(9), word_of(1))
        # Both pages: the first is moved, then the kernel stops.
        with pytest.raises(UserfaultfdError) as caught:
            ours.move(memory.address, source.address, 2 * PAGE)
        assert (caught.value.outcome, caught.value.done) == (Outcome.PARTIAL, PAGE)
        assert (memory.load(0), memory.load(PAGE)) == (word_of(1), word_of(9))
        assert (source.load(0), source.load(PAGE)) == (0, word_of(2))


def test_a_hole_in_the_source_is_refused_unless_holes_are_allowed(background: Background) -> None:
    with (
        filled(3) as source,
        Region.anonymous(3 * PAGE) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        source.advise(mmap.MADV_DONTNEED, 0, PAGE)
        source.advise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
        ours.register(memory.address, memory.length)
        with pytest.raises(UserfaultfdError) as caught:
            ours.move(memory.address, source.address, PAGE)
        assert caught.value.outcome is Outcome.HOLE
        assert ours.move(memory.address, source.address, 3 * PAGE, allow_holes=True) == 3 * PAGE
        assert memory.load(PAGE) == word_of(2)
        # A hole that was moved is a hole: its fault is told.
        touched = background(memory.load, 0)
        assert next_fault(ours).address == memory.address
        ours.zeropage(memory.address, PAGE)
        assert touched.result(WAIT_SECONDS) == 0


def test_a_range_is_moved_up_to_what_stops_it_and_the_reason_is_told() -> None:
    with (
        filled(5) as source,
        Region.anonymous(5 * PAGE) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        source.advise(mmap.MADV_DONTNEED, 2 * PAGE, PAGE)
        ours.register(memory.address, memory.length)
        ours.copy(memory.at(4 * PAGE), page_of(9))
        with pytest.raises(UserfaultfdError) as caught:
            ours.move_range(memory.address, source.address, 5 * PAGE)
        assert (caught.value.outcome, caught.value.errno) == (Outcome.HOLE, errno.ENOENT)
        assert (caught.value.done, caught.value.address) == (2 * PAGE, memory.at(2 * PAGE))
        with pytest.raises(UserfaultfdError) as caught:
            ours.move_range(memory.at(2 * PAGE), source.at(2 * PAGE), 3 * PAGE, allow_holes=True)
        assert (caught.value.outcome, caught.value.errno) == (Outcome.PRESENT, errno.EEXIST)
        assert (caught.value.done, caught.value.address) == (2 * PAGE, memory.at(4 * PAGE))
        found = [memory.load(page * PAGE) for page in (0, 1, 3, 4)]
        assert found == [word_of(1), word_of(2), word_of(4), word_of(9)]
        assert source.load(4 * PAGE) == word_of(5)


def test_a_page_that_a_child_has_too_is_refused_and_one_kept_from_it_is_moved() -> None:
    with (
        filled(1) as shared,
        filled(1) as kept,
        Region.anonymous(2 * PAGE) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        kept.advise(mmap.MADV_DONTFORK)
        ours.register(memory.address, memory.length)
        child = os.fork()
        if child == 0:
            signal.pause()
            os._exit(0)
        try:
            with pytest.raises(UserfaultfdError) as caught:
                ours.move(memory.address, shared.address, PAGE)
            assert caught.value.outcome is Outcome.BUSY
            assert ours.move(memory.at(PAGE), kept.address, PAGE) == PAGE
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert shared.load(0) == word_of(1)
        assert memory.load(PAGE) == word_of(1)


@pytest.mark.needs("thp")
def test_a_huge_page_is_moved_whole() -> None:
    with (
        Region.anonymous(HUGE_BYTES, alignment=HUGE_BYTES) as source,
        Region.anonymous(HUGE_BYTES, alignment=HUGE_BYTES) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        memory.advise(mmap.MADV_HUGEPAGE)
        fill_huge(source, 3)
        frames = [source.page_frame(offset) for offset in range(0, HUGE_BYTES, PAGE)]
        ours.register(memory.address, memory.length)
        assert ours.move(memory.address, source.address, HUGE_BYTES) == HUGE_BYTES
        assert (memory.huge_bytes(), source.huge_bytes()) == (HUGE_BYTES, 0)
        assert [memory.page_frame(offset) for offset in range(0, HUGE_BYTES, PAGE)] == frames
        assert memory.first_difference(0, b"\3" * HUGE_BYTES) is None


@pytest.mark.needs("thp")
def test_a_part_of_a_huge_page_is_moved_as_small_pages() -> None:
    with (
        Region.anonymous(HUGE_BYTES, alignment=HUGE_BYTES) as source,
        Region.anonymous(HUGE_BYTES, alignment=HUGE_BYTES) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        fill_huge(source, 3)
        ours.register(memory.address, memory.length)
        moved = 0
        while moved < HUGE_BYTES // 2:
            left = HUGE_BYTES // 2 - moved
            try:
                moved += ours.move(memory.at(moved), source.at(moved), left)
            except UserfaultfdError as error:  # splitting waits for whoever looks at the page
                assert error.retryable, error
                moved += max(0, error.done)
        assert (memory.huge_bytes(), source.huge_bytes()) == (0, 0)
        assert memory.first_difference(0, b"\3" * (HUGE_BYTES // 2)) is None


@pytest.mark.needs("thp")
def test_dropping_a_huge_range_keeps_its_neighbour_whole() -> None:
    with Region.anonymous(2 * HUGE_BYTES, alignment=HUGE_BYTES) as memory:
        fill_huge(memory, 1)
        memory.advise(mmap.MADV_DONTNEED, 0, HUGE_BYTES)
        assert memory.huge_bytes() == HUGE_BYTES
        assert memory.load(HUGE_BYTES) == word_of(1)


def test_memory_that_is_not_private_and_anonymous_is_refused() -> None:
    with (
        Region.memfd(PAGE) as source,
        Region.anonymous(PAGE) as memory,
        Userfaultfd.open(Feature.MOVE) as ours,
    ):
        source.fill(1)
        ours.register(memory.address, PAGE)
        with pytest.raises(UserfaultfdError) as caught:
            ours.move(memory.address, source.address, PAGE)
        assert caught.value.outcome is Outcome.INVALID
