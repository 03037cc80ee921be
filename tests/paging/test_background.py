"""Promise: the background fills what nobody asked for: when it may, no faster, and never first."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from paging.served_guest import KIB, MIB, ServedGuest

from qemu_postcopy.paging.pager import PagerState

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

#: What may be filled at once, whatever the rate (BACKGROUND_UNIT in C, or a 20th of a second).
UNIT_BYTES = 128 * KIB


def no_hole(page: int) -> bool:
    return False


def test_off_it_fills_nothing(serve: Serve) -> None:
    guest = serve(holes=no_hole, chunk_size=64 * KIB)
    guest.mapper.first_word(100)
    guest.wait_asleep()
    statistics = guest.statistics
    assert statistics.pages_background == 0
    assert statistics.pages_demand == 16
    assert statistics.pages_data_missing == 1100 - 16


def test_it_can_be_turned_on_while_the_pager_sleeps(serve: Serve) -> None:
    guest = serve(holes=no_hole)
    guest.wait_asleep()
    guest.pager.set_background(True)
    guest.wait_complete()
    guest.check_content()


def test_it_can_be_turned_off_in_the_middle(serve: Serve) -> None:
    guest = serve(holes=no_hole, background=True, background_rate=4 * MIB)
    guest.wait(lambda s: s.pages_background > 0, "it has begun")
    guest.pager.set_background(False)
    guest.wait_asleep()
    filled = guest.statistics.pages_background
    assert guest.statistics.state == PagerState.SERVING
    guest.mapper.first_word(1099)
    guest.wait_asleep()
    assert guest.statistics.pages_background == filled


@pytest.mark.parametrize(
    ("rate", "memory", "pages"),
    [
        (2 * MIB, "memfd", 1100),
        (8 * MIB, "memfd", 1100),
        pytest.param(8 * MIB, "hugetlb", 9, marks=pytest.mark.needs("hugetlb")),
    ],
)
def test_it_keeps_to_its_rate(serve: Serve, rate: int, memory: str, pages: int) -> None:
    guest = serve(memory=memory, pages=pages, holes=no_hole, background=True, background_rate=rate)
    at_once = max(UNIT_BYTES, guest.page_size, rate // 20)
    deadline = time.monotonic() + 60
    while True:
        statistics = guest.statistics
        # The clock is that of complete_ns.
        seconds = ((statistics.complete_ns or time.monotonic_ns()) - statistics.started_ns) / 1e9
        filled = statistics.pages_background * guest.page_size
        assert filled <= 1.2 * rate * seconds + 2 * at_once
        if statistics.state == PagerState.COMPLETE:
            break
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_where_time_is_short_it_fills_between_any_two_faults(serve: Serve) -> None:
    """Else it waits for a moment without one: a thread that faults all the time keeps it back."""
    guest = serve(pages=16 * 1024, holes=no_hole, chunk_size=4 * KIB)
    guest.pager.set_background(True, at_once=True)
    guest.check_content()
    guest.wait_complete()
    statistics = guest.statistics
    assert statistics.pages_background > statistics.pages_demand


def test_a_fault_does_not_wait_for_it(serve: Serve) -> None:
    pages = 32 * 1024
    guest = serve(pages=pages, holes=no_hole, chunk_size=4 * KIB, background=True, start=False)
    # The last ones in its order. (How many are faults of their own is a matter of time: it goes on
    # after the last fault when none has come for a millisecond.)
    dump = guest.mapper.send("dump", pages - 20, 20, guest.run_dir / "dump")
    guest.mapper.wait_blocked(1)
    guest.pager.start()
    guest.mapper.result(dump)
    statistics = guest.statistics
    assert statistics.state == PagerState.SERVING, "the background came first"
    guest.pager.set_background(False)


def test_it_goes_on_where_the_guest_is(serve: Serve) -> None:
    guest = serve(holes=no_hole, chunk_size=64 * KIB, background_rate=0)
    guest.mapper.first_word(512)
    guest.pager.set_background(True, 1 * MIB)
    guest.wait(lambda s: s.pages_background > 0, "it has begun")
    states = guest.ledger.states("m0")
    assert states[528:560] == bytes([2]) * 32
    assert not any(states[:512])
