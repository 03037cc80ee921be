"""Promise: what guests want first is noted exactly, and filled ahead, faithfully, never first."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from paging.mapper_process import wait_until
from paging.served_guest import KIB, ServedGuest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.paging.pager import FIRST_FAULTS, PagerState

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

WANTED = [501, 3, 502, 7, 120, 1099]  # 3 is a hole, 120 in the middle of a run of holes


def missing(guest: ServedGuest) -> set[int]:
    return {page for page, state in enumerate(guest.ledger.states("m0")) if state == 0}


def test_first_faults_are_noted_in_their_order_and_page_by_page(serve: Serve) -> None:
    guest = serve(note_first_faults=True, chunk_size=64 * KIB)
    for page in WANTED:
        guest.mapper.first_word(page)
    assert guest.pager.first_faults() == [(0, page) for page in WANTED]
    statistics = guest.wait(lambda s: sum(s.latency_us) == s.faults, "all answers are counted")
    assert statistics.pages_demand == 4, "neighbours would hide what the guest wants next"


def test_after_a_tenth_of_a_second_whole_chunks_are_filled_and_nothing_more_is_noted(
    serve: Serve,
) -> None:
    guest = serve(note_first_faults=True, chunk_size=64 * KIB)
    pages = iter(range(0, 1088, 16))
    guest.mapper.first_word(next(pages))
    until = guest.statistics.first_fault_ns + 100_000_000
    wait_until(lambda: time.monotonic_ns() > until, "a tenth of a second passes")

    def chunk_filled() -> bool:
        before = guest.statistics.pages_demand
        guest.mapper.first_word(next(pages) + 5)
        return guest.statistics.pages_demand > before + 1

    wait_until(chunk_filled, "the first tenth of a second is over")
    noted = guest.pager.first_faults()
    guest.mapper.first_word(1098)
    assert guest.pager.first_faults() == noted
    guest.check_content()


def test_nothing_is_noted_unless_asked_for(serve: Serve) -> None:
    guest = serve()
    guest.mapper.first_word(5)
    assert guest.pager.first_faults() == []


@pytest.mark.parametrize("memory", ["memfd", "anonymous", "hugetlb"])
def test_pages_are_filled_ahead_and_no_other(serve: Serve, memory: str) -> None:
    pages = [5, 3, 6] if memory == "hugetlb" else WANTED
    guest = serve(memory=memory, start=False, **({"pages": 8} if memory == "hugetlb" else {}))
    everything = missing(guest)
    guest.pager.prefetch([(0, page) for page in pages])
    guest.pager.start()
    wait_until(lambda: everything - missing(guest) == set(pages), "the pages are there")
    guest.wait_asleep()
    assert everything - missing(guest) == set(pages)
    before = guest.statistics
    for page in pages:
        guest.mapper.first_word(page)
    assert guest.statistics.faults == before.faults == 0
    guest.check_content()


def test_pages_that_cannot_be_read_ahead_are_left_to_the_faults(serve: Serve) -> None:
    guest = serve(start=False, holes=lambda page: False)
    guest.pager.prefetch([(0, 1050), (0, 4), (0, 1060)])
    guest.image.cut(1000)
    guest.pager.start()
    guest.wait(lambda s: s.pages_prefetched == 1 and s.source_errors >= 2, "all were tried")
    guest.wait_asleep()
    assert guest.statistics.failing == 0, "nobody waits for them"
    guest.image.grow_back()
    guest.check_content()


def test_removed_page_is_not_filled_ahead_from_the_image(serve: Serve) -> None:
    guest = serve()
    guest.mapper.do("remove", 40, 2)
    guest.wait(lambda s: s.pages_removed == 2, "the removal is noted")
    guest.pager.stop()
    guest.pager.prefetch([(0, 40), (0, 41), (0, 42)])
    guest.pager.start()
    guest.wait(lambda s: s.pages_prefetched == 1, "the page behind is there")
    guest.check_content(zero_pages=range(40, 42))


def test_a_guest_is_complete_with_pages_filled_ahead(serve: Serve) -> None:
    guest = serve(start=False, background=True)
    guest.pager.prefetch([(0, page) for page in range(1099, 600, -1)])
    guest.pager.start()
    statistics = guest.wait_complete()
    assert statistics.pages_prefetched > 0
    assert (
        statistics.pages_prefetched + statistics.pages_background + statistics.pages_demand
        == statistics.pages_data
    )
    guest.check_content()


@pytest.mark.parametrize(
    "pages", [[(1, 0)], [(0, 1100)], [(0, 0)] * (FIRST_FAULTS + 1)], ids=["block", "page", "many"]
)
def test_pages_that_cannot_be_are_refused(serve: Serve, pages: list[tuple[int, int]]) -> None:
    guest = serve(start=False)
    with pytest.raises(UsageError):
        guest.pager.prefetch(pages)


def test_what_to_fill_ahead_is_said_before_the_start(serve: Serve) -> None:
    guest = serve()
    with pytest.raises(UsageError, match="before the start"):
        guest.pager.prefetch([(0, 0)])
    assert guest.statistics.state == PagerState.SERVING
