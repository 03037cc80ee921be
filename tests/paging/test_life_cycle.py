"""Promise: no stop and start loses a fault; the mapper's end and the last page are announced."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from paging.mapper_process import wait_until
from paging.served_guest import KIB, MIB, ServedGuest

from qemu_postcopy.errors import StateError, UsageError
from qemu_postcopy.paging.pager import PagerState

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")


@pytest.mark.parametrize("background", [False, True], ids=["demand", "background"])
def test_stop_and_start_lose_nothing(serve: Serve, background: bool) -> None:
    guest = serve(chunk_size=4 * KIB, background=background, background_rate=1 * MIB)
    dump = guest.mapper.send("dump", 0, 1100, guest.run_dir / "dump")
    stops = faults = 0
    while guest.mapper.is_waiting(dump):
        if guest.statistics.faults == faults:
            time.sleep(0.0005)
            continue
        guest.pager.stop()
        assert guest.statistics.state == PagerState.IDLE
        stops += 1
        faults = guest.statistics.faults
        guest.pager.start()
    assert stops > 1
    guest.check_content()


def test_a_fault_waits_while_the_pager_is_stopped(serve: Serve) -> None:
    guest = serve()
    guest.pager.stop()
    reader = guest.mapper.send("read", 5)
    guest.mapper.wait_blocked(1)
    assert guest.mapper.is_waiting(reader)
    guest.pager.start()
    assert guest.mapper.result(reader).to_bytes(8, "little") == guest.image.expected[5][:8]


def test_a_fault_that_was_read_is_answered_after_a_restart(serve: Serve) -> None:
    guest = serve()
    guest.image.cut(5)
    reader = guest.mapper.send("read", 5)
    guest.wait(lambda s: s.source_errors > 0, "the fault was read")
    guest.pager.stop()
    guest.image.grow_back()
    guest.pager.start()
    assert guest.mapper.result(reader).to_bytes(8, "little") == guest.image.expected[5][:8]


def test_a_second_start_is_refused(serve: Serve) -> None:
    guest = serve()
    with pytest.raises(UsageError, match="running already"):
        guest.pager.start()


def test_the_end_of_the_mapper_is_noticed_in_the_background(serve: Serve) -> None:
    guest = serve(background=True, background_rate=256 * KIB)
    guest.mapper.process.kill()
    guest.mapper.process.wait()
    guest.wait(lambda s: s.state == PagerState.MAPPER_GONE, "the end was noticed")
    assert guest.notified()
    assert guest.statistics.complete_ns == 0
    guest.pager.stop()
    assert guest.statistics.state == PagerState.MAPPER_GONE


def test_the_end_of_the_mapper_with_a_fault_waiting_is_noticed(serve: Serve) -> None:
    guest = serve()
    guest.image.cut(5)
    guest.mapper.send("read", 5)
    guest.wait(lambda s: s.source_errors > 0, "the fault was read")
    guest.mapper.process.kill()
    guest.mapper.process.wait()
    guest.image.grow_back()
    guest.wait(lambda s: s.state == PagerState.MAPPER_GONE, "the end was noticed")


def test_a_pager_whose_mapper_has_ended_can_be_stopped(serve: Serve) -> None:
    guest = serve()
    guest.mapper.first_word(0)
    guest.mapper.process.kill()
    guest.mapper.process.wait()
    guest.pager.stop()


def test_complete_is_announced_with_the_last_data_page_and_not_before(serve: Serve) -> None:
    guest = serve(pages=64, chunk_size=4 * KIB)
    data = [page for page in range(64) if not guest.image.holes[page]]
    for missing, page in zip(range(len(data) - 1, -1, -1), data, strict=True):
        assert guest.statistics.state == PagerState.SERVING
        # Each of the mapper's threads is announced as well, when it faults for the first time.
        guest.notified()
        guest.mapper.first_word(page)
        guest.wait(lambda s, n=missing: s.pages_data_missing == n, "the page is counted")  # type: ignore[misc]
    statistics = guest.wait_complete()
    assert statistics.complete_ns >= statistics.last_fault_ns
    wait_until(guest.notified, "it was announced")
    # Holes that nobody touched are served on.
    assert guest.mapper.first_word(3) == bytes(8)


def test_complete_counts_what_the_guest_removed(serve: Serve) -> None:
    guest = serve(pages=64)
    guest.mapper.do("remove", 0, 64)
    statistics = guest.wait_complete()
    assert statistics.pages_demand == statistics.pages_background == 0


def test_an_image_without_data_is_complete_at_once(serve: Serve) -> None:
    guest = serve(pages=64, holes=lambda page: True)
    guest.wait_complete()
    assert guest.mapper.first_word(7) == bytes(8)


def test_a_closed_pager_says_so(serve: Serve) -> None:
    """Or what it said last; but it never takes the process with it."""
    pager = serve(start=False, note_first_faults=True).pager
    pager.close()
    assert pager.thread_id() == 0
    assert pager.first_faults() == []
    pager.stop()
    pager.close()
    for call in (
        pager.start,
        pager.notify_fd,
        lambda: pager.set_background(True),
        lambda: pager.name_vcpus([1]),
        lambda: pager.prefetch([(0, 0)]),
        lambda: pager.record(None),  # type: ignore[arg-type]
    ):
        with pytest.raises(StateError, match="closed"):
            call()


def test_first_faults_are_known_after_the_end(serve: Serve) -> None:
    guest = serve(note_first_faults=True)
    guest.mapper.first_word(7)
    before = guest.pager.first_faults()
    guest.pager.close()
    assert guest.pager.first_faults() == before == [(0, 7)]
