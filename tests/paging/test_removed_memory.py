"""Promise: what the guest gave back reads as zero ever after, and never as the image again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from paging.served_guest import KIB, MIB, ServedGuest

from qemu_postcopy.paging.ledger import RETURNED, UNMAPPED

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

ZERO = bytes(8)
MEMORIES = [
    pytest.param("memfd", 64),
    pytest.param("anonymous", 64),
    pytest.param("hugetlb", 9, marks=pytest.mark.needs("hugetlb")),
]


def no_hole(page: int) -> bool:
    return False


@pytest.mark.parametrize("chunk_size", [4 * KIB, 2 * MIB])
@pytest.mark.parametrize(("memory", "pages"), MEMORIES)
def test_removed_after_it_was_filled(
    serve: Serve, memory: str, pages: int, chunk_size: int
) -> None:
    guest = serve(memory=memory, pages=pages, chunk_size=chunk_size, holes=no_hole)
    guest.check_content()
    guest.mapper.do("remove", 4, 3)
    guest.check_content(zero_pages=range(4, 7))
    assert guest.statistics.events_remove == 1
    assert guest.statistics.pages_removed == 3


@pytest.mark.parametrize("chunk_size", [4 * KIB, 2 * MIB])
@pytest.mark.parametrize(("memory", "pages"), MEMORIES)
def test_removed_before_it_was_ever_filled(
    serve: Serve, memory: str, pages: int, chunk_size: int
) -> None:
    guest = serve(memory=memory, pages=pages, chunk_size=chunk_size, holes=no_hole)
    guest.mapper.do("remove", 4, 3)
    guest.check_content(zero_pages=range(4, 7))
    guest.wait_complete()


@pytest.mark.parametrize(("memory", "pages"), MEMORIES)
def test_removed_after_the_fault_was_read(serve: Serve, memory: str, pages: int) -> None:
    guest = serve(memory=memory, pages=pages, chunk_size=4 * KIB, holes=no_hole)
    guest.image.cut(5)
    reader = guest.mapper.send("read", 5)
    guest.wait(lambda s: s.faults_waiting == 1 and s.source_errors > 0, "the fault was read")
    guest.image.grow_back()
    guest.mapper.do("remove", 5, 1)
    # The retry may have come before the REMOVE; what is read after it is zero in any case.
    guest.mapper.result(reader)
    assert guest.mapper.first_word(5) == ZERO


def test_removed_while_its_source_fails(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, holes=no_hole)
    guest.image.cut(5)
    reader = guest.mapper.send("read", 5)
    guest.wait(lambda s: s.faults_waiting == 1 and s.source_errors > 0, "the fault was read")
    guest.mapper.do("remove", 5, 1)
    assert guest.mapper.result(reader) == 0


def test_removed_again_and_again(serve: Serve) -> None:
    guest = serve(chunk_size=64 * KIB, holes=no_hole)
    for _ in range(20):
        guest.mapper.do("remove", 8, 4)
        assert guest.mapper.first_word(9) == ZERO
        guest.mapper.do("write", 9, 0x77)
        assert guest.mapper.first_word(9) == b"\x77" + bytes(7)
    guest.mapper.do("remove", 8, 4)
    guest.check_content(zero_pages=range(8, 12))


def test_a_touch_of_removed_memory_does_not_bring_its_neighbours_back(serve: Serve) -> None:
    guest = serve(memory="anonymous", chunk_size=2 * MIB, holes=no_hole)
    guest.mapper.do("remove", 0, 512)
    assert guest.mapper.first_word(100) == ZERO
    assert guest.wait(lambda s: s.faults_waiting == 0, "all is counted").pages_zero == 1


def test_background_leaves_removed_memory_alone(serve: Serve) -> None:
    guest = serve(start=False, background=True, holes=no_hole)
    removal = guest.mapper.send("remove", 200, 100)
    guest.mapper.wait_removing()
    guest.pager.start()
    guest.mapper.result(removal)
    guest.wait_complete()
    statistics = guest.wait(lambda s: s.pages_removed == 100, "the removal is counted")
    assert statistics.pages_zero == 0
    guest.check_content(zero_pages=range(200, 300))


@pytest.mark.parametrize(
    "memory", ["memfd", pytest.param("hugetlb", marks=pytest.mark.needs("hugetlb"))]
)
def test_a_hole_punched_without_an_event_reads_as_zero(serve: Serve, memory: str) -> None:
    guest = serve(memory=memory, pages=9, holes=no_hole)
    guest.check_content()
    guest.mapper.do("punch", 2, 3)
    faults = guest.statistics.faults
    guest.check_content(zero_pages=range(2, 5))
    assert guest.statistics.events_remove == 0
    # No more than a fault for each, or two where the kernel repeats one: nothing goes in circles.
    assert guest.statistics.faults - faults <= 6


@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
def test_unmapped_memory_is_let_go(serve: Serve, memory: str) -> None:
    guest = serve(memory=memory, holes=no_hole)
    guest.mapper.do("unmap", 500, 600)
    guest.pager.set_background(True)
    statistics = guest.wait_complete()
    assert statistics.events_unmap == 1
    assert statistics.fill_errors == 0
    assert statistics.pages_background == 500
    assert guest.dump(0, 500) == b"".join(guest.image.expected[:500])


@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
def test_memory_between_two_unmapped_parts_is_served(serve: Serve, memory: str) -> None:
    guest = serve(memory=memory, chunk_size=2 * MIB, holes=no_hole)
    guest.mapper.do("unmap", 100, 50)
    guest.mapper.do("unmap", 300, 50)
    assert guest.dump(150, 150) == b"".join(guest.image.expected[150:300])
    guest.pager.set_background(True)
    statistics = guest.wait_complete()
    assert statistics.fill_errors == 0
    (counts,) = guest.pager.block_counts()
    assert counts.pages_unmapped == 100
    assert counts.pages_data_missing == 0
    assert guest.ledger.pages_in("m0", UNMAPPED) == [*range(100, 150), *range(300, 350)]


@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
def test_other_memory_at_an_unmapped_place_is_never_written_to(serve: Serve, memory: str) -> None:
    """The kernel would do it: COPY asks for a userfaultfd of the memory, not for which."""
    guest = serve(memory=memory, chunk_size=64 * KIB, holes=no_hole)
    guest.image.cut(500)
    waiting = guest.mapper.send("read", 500)
    guest.wait(lambda s: s.faults_waiting == 1 and s.source_errors > 0, "the fault was read")
    guest.mapper.do("reuse", 400, 300)
    guest.image.grow_back()
    guest.pager.set_background(True)
    guest.wait_complete()
    guest.wait(lambda s: s.faults_waiting == 0, "who waited is let go")
    assert guest.mapper.do("resident", 400, 300) == 0
    assert guest.dump(0, 400) == b"".join(guest.image.expected[:400])
    assert guest.dump(700) == b"".join(guest.image.expected[700:])
    assert guest.mapper.is_waiting(waiting), "nobody serves what lies there now"


def test_a_fault_beside_unmapped_memory_is_answered(serve: Serve) -> None:
    guest = serve(memory="anonymous", chunk_size=2 * MIB, holes=no_hole)
    guest.mapper.do("remove", 0, 32)
    guest.mapper.do("unmap", 8, 8)
    assert guest.mapper.first_word(16) == ZERO
    assert guest.mapper.first_word(7) == ZERO
    assert guest.mapper.first_word(32) == guest.image.expected[32][:8]


@pytest.mark.parametrize("background", [False, True], ids=["demand", "background"])
@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
def test_faults_are_served_through_a_storm_of_removals(
    serve: Serve, memory: str, background: bool
) -> None:
    guest = serve(memory=memory, chunk_size=4 * KIB, holes=no_hole, background=background)
    storm = guest.mapper.send("storm", 0, 8)
    guest.wait(lambda s: s.events_remove > 100, "the storm has begun")
    content = guest.dump(8)
    assert content == b"".join(guest.image.expected[8:])
    guest.mapper.do("calm", 0)
    removals = guest.mapper.result(storm)
    guest.wait_complete()
    # What was given back to the kernel for a while is removed without an event.
    assert removals >= guest.statistics.events_remove
    guest.check_content(zero_pages=range(8))


@contextlib.contextmanager
def on_one_processor() -> Iterator[None]:
    """For whatever is started meanwhile: the mapper, and the pager's thread."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, processors)


@pytest.mark.parametrize("removers", [1, 2, 8])
@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
@pytest.mark.parametrize("placed", ["on the pager's processor", "anywhere"])
def test_every_fault_is_answered_while_threads_remove_memory_in_a_loop(
    serve: Serve, placed: str, memory: str, removers: int
) -> None:
    with contextlib.nullcontext() if placed == "anywhere" else on_one_processor():
        guest = serve(memory=memory, chunk_size=4 * KIB, holes=no_hole)
        storms = [guest.mapper.send("storm", 8 * number, 8) for number in range(removers)]
        guest.wait(lambda s: s.events_remove > 100 * removers, "the storm has begun")
        for page in range(100, 130):
            assert guest.mapper.first_word(page) == guest.image.expected[page][:8]
        # Removed memory is zero also where the kernel has been given it back.
        assert guest.mapper.first_word(3) == ZERO
        guest.pager.set_background(True)
        guest.wait_complete()
        guest.mapper.do("calm", 0)
        removals = sum(guest.mapper.result(storm) for storm in storms)
        assert removals >= guest.statistics.events_remove
        guest.check_content(zero_pages=range(8 * removers))
        states = guest.ledger.states("m0")
        assert states.count(RETURNED) < len(states), "a range, not everything, was given back"


def test_memory_that_was_given_back_is_left_alone_by_whoever_takes_over(serve: Serve) -> None:
    with on_one_processor():
        guest = serve(memory="anonymous", chunk_size=4 * KIB, holes=no_hole)
        storms = [guest.mapper.send("storm", 8 * number, 8) for number in range(8)]
        guest.wait(lambda s: s.events_remove > 800, "the storm has begun")
        pages = iter(range(100, 1100))
        while RETURNED not in guest.ledger.states("m0"):
            guest.mapper.first_word(next(pages))
        guest.mapper.do("calm", 0)
        for storm in storms:
            guest.mapper.result(storm)
    guest.take_over()
    guest.pager.set_background(True)
    guest.wait_complete()
    guest.check_content(zero_pages=range(64))
