"""Promise: what the mapper sees is what the source has, and zeros in its holes, nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from paging.served_guest import KIB, MIB, ServedGuest

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

MEMORIES = [
    pytest.param("memfd", 1100),
    pytest.param("anonymous", 1100),
    pytest.param("hugetlb", 9, marks=pytest.mark.needs("hugetlb")),
]


@pytest.mark.parametrize("background", [False, True], ids=["demand", "background"])
@pytest.mark.parametrize("chunk_size", [4 * KIB, 64 * KIB, 2 * MIB])
@pytest.mark.parametrize(("memory", "pages"), MEMORIES)
def test_content_is_the_source_s_and_holes_are_zero(
    serve: Serve, memory: str, pages: int, chunk_size: int, background: bool
) -> None:
    guest = serve(memory=memory, pages=pages, chunk_size=chunk_size, background=background)
    guest.check_content()
    guest.wait_complete()
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "all is counted")
    assert statistics.pages_data == guest.image.data_pages
    assert statistics.pages_data_missing == 0
    assert statistics.pages_demand + statistics.pages_background == guest.image.data_pages
    assert statistics.pages_zero == guest.image.holes.count(True)
    assert statistics.source_errors == statistics.fill_errors == 0


@pytest.mark.parametrize(("memory", "pages"), MEMORIES)
def test_background_alone_brings_every_data_page(serve: Serve, memory: str, pages: int) -> None:
    guest = serve(memory=memory, pages=pages, background=True)
    statistics = guest.wait_complete()
    assert statistics.faults == statistics.pages_zero == 0
    assert statistics.pages_background == guest.image.data_pages
    guest.check_content()


@pytest.mark.parametrize(("memory", "pages"), MEMORIES)
def test_a_write_to_a_missing_page_changes_nothing_but_what_was_written(
    serve: Serve, memory: str, pages: int
) -> None:
    guest = serve(memory=memory, pages=pages)
    for page in (0, 3, 5):  # 3 is a hole
        guest.mapper.do("write", page, 0x1234567890)
        before = guest.image.expected[page]
        guest.image.expected[page] = (0x1234567890).to_bytes(8, "little") + before[8:]
    guest.check_content()


def test_threads_that_wait_for_one_page_all_go_on(serve: Serve) -> None:
    guest = serve(start=False)
    readers = [guest.mapper.send("read", 50) for _ in range(8)]
    guest.mapper.wait_blocked(len(readers))
    guest.pager.start()
    wanted = int.from_bytes(guest.image.expected[50][:8], "little")
    assert [guest.mapper.result(reader) for reader in readers] == [wanted] * len(readers)


def test_pages_of_a_chunk_are_filled_together(serve: Serve) -> None:
    guest = serve(chunk_size=64 * KIB, holes=lambda page: False)
    guest.mapper.first_word(37)
    # The page itself comes first, and wakes whoever waits for it.
    guest.wait(lambda s: s.pages_demand == 16, "its neighbours are filled")
    states = guest.ledger.states("m0")
    assert states[32:48] == bytes([2]) * 16
    assert not any(states[:32] + states[48:])
