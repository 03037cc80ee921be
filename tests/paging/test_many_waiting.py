"""Promise: faults that wait together are answered together, each with its own page."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from paging.served_guest import KIB, ServedGuest

from qemu_postcopy.paging.chaos import ChaosSchedule

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

#: Far apart, in one chunk, twice the same, single holes (7n + 3) and one in a long run of them.
PAGES = [*range(0, 480, 12), 33, 34, 34, 35, 3, 3, 10, 120, 700, 701, 702]


@pytest.mark.parametrize("chunk_size", [4 * KIB, 64 * KIB])
def test_all_go_on_with_what_is_theirs(serve: Serve, chunk_size: int) -> None:
    guest = serve(start=False, chunk_size=chunk_size)
    readers = [(page, guest.mapper.send("read", page)) for page in PAGES]
    guest.mapper.wait_blocked(len(PAGES))
    guest.pager.start()
    for page, command in readers:
        word = guest.mapper.result(command).to_bytes(8, "little")
        assert word == guest.image.expected[page][:8], f"page {page}"
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    assert sum(statistics.latency_us) == statistics.faults >= len(PAGES)
    guest.check_content()


def test_those_whose_data_is_missing_hold_up_no_others(serve: Serve) -> None:
    guest = serve(start=False, chunk_size=4 * KIB, holes=lambda page: False)
    guest.image.cut(240, 100)
    readers = {page: guest.mapper.send("read", page) for page in range(0, 480, 12)}
    guest.mapper.wait_blocked(len(readers))
    guest.pager.start()
    for page in range(0, 240, 12):
        word = guest.mapper.result(readers[page]).to_bytes(8, "little")
        assert word == guest.image.expected[page][:8]
    assert all(guest.mapper.is_waiting(readers[page]) for page in range(240, 480, 12))
    statistics = guest.wait(lambda s: s.failing == 20, "the rest is known to fail")
    assert statistics.last_error == errno.ENODATA
    guest.image.grow_back()
    for page in range(240, 480, 12):
        word = guest.mapper.result(readers[page]).to_bytes(8, "little")
        assert word == guest.image.expected[page][:8]
    guest.check_content()


def test_a_source_that_reads_one_by_one_does_as_well(serve: Serve) -> None:
    chaos = ChaosSchedule(Path("half"), fail=0.4, truncate=0.1)
    guest = serve(start=False, chunk_size=4 * KIB, chaos=chaos)
    readers = [(page, guest.mapper.send("read", page)) for page in PAGES]
    guest.mapper.wait_blocked(len(PAGES))
    guest.pager.start()
    for page, command in readers:
        word = guest.mapper.result(command).to_bytes(8, "little")
        assert word == guest.image.expected[page][:8], f"page {page}"


def test_memory_that_was_removed_reads_as_zero_for_all_of_them(serve: Serve) -> None:
    guest = serve(start=False, chunk_size=4 * KIB, holes=lambda page: False)
    remove = guest.mapper.send("remove", 100, 50)  # waits until its event is read
    readers = {page: guest.mapper.send("read", page) for page in range(60, 180, 4)}
    guest.mapper.wait_blocked(len(readers))
    guest.pager.start()
    guest.mapper.result(remove)
    for page, command in readers.items():
        word = guest.mapper.result(command).to_bytes(8, "little")
        if 100 <= page < 150:
            assert word in (guest.image.expected[page][:8], bytes(8))  # before it or after
        else:
            assert word == guest.image.expected[page][:8]
    guest.check_content(zero_pages=range(100, 150))
