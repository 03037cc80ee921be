"""Promise: every fault is counted for the thread that made it, also where there is no room left."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paging.mapper_process import wait_until
from paging.served_guest import KIB, ServedGuest

from qemu_postcopy.paging.account import OTHER, UNKNOWN
from qemu_postcopy.paging.chaos import ChaosSchedule

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

STALLING = ChaosSchedule(Path("stall"), stall=1.0, stall_ms=None)


def test_each_thread_has_its_own_count(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, start=False)
    readers = [guest.mapper.send("read", page) for page in (5, 200, 300)]
    guest.mapper.wait_blocked(len(readers))
    guest.pager.start()
    for reader in readers:
        guest.mapper.result(reader)
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    threads = guest.pager.threads()
    assert statistics.faults == sum(thread.faults for thread in threads) == 3
    assert len(threads) == 3
    assert not {thread.tid for thread in threads} & {OTHER, UNKNOWN}
    assert guest.mapper.process.pid not in {thread.tid for thread in threads}
    for thread in threads:
        assert sum(thread.latency_us) == thread.faults == 1
        assert thread.blocked_ns > 0


def test_one_thread_that_faults_often_is_one_entry(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB)
    guest.dump()
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    (thread,) = guest.pager.threads()
    assert thread.faults == statistics.faults > 500
    assert thread.latency_us == statistics.latency_us


def test_threads_that_find_no_room_are_counted_together(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, holes=lambda page: False)
    for page in range(0, 400):
        guest.mapper.do("read", page)
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    threads = {thread.tid: thread for thread in guest.pager.threads()}
    assert len(threads) <= 257
    assert threads[OTHER].faults >= 400 - 256
    assert sum(thread.faults for thread in threads.values()) == statistics.faults == 400
    guest.pager.close()
    assert {thread.tid: thread for thread in guest.pager.threads()} == threads


def test_who_waits_is_told_while_it_waits(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, chaos=STALLING)
    before = time.monotonic_ns()
    reader = guest.mapper.send("read", 5)
    guest.mapper.wait_blocked(1)
    statistics = guest.wait(lambda s: s.reading_since_ns > 0, "the source is being read")
    (thread,) = guest.pager.threads()
    (block,) = guest.pager.block_counts()
    assert before < statistics.reading_since_ns <= time.monotonic_ns()
    assert (statistics.reading_block, statistics.reading_page) == (0, 5)
    assert (thread.waiting, block.waiting, block.faults) == (1, 1, 1)
    assert before < thread.waiting_since_ns <= time.monotonic_ns()
    assert thread.blocked_ns == 0
    assert guest.chaos is not None
    guest.chaos.enable(False)
    guest.mapper.result(reader)
    wait_until(lambda: guest.pager.threads()[0].waiting == 0, "the answer is counted")
    (thread,) = guest.pager.threads()
    (block,) = guest.pager.block_counts()
    assert thread.waiting_since_ns == 0 and thread.blocked_ns > 0
    assert (block.waiting, block.pages_data - block.pages_data_missing) == (0, 1)
    assert guest.statistics.reading_since_ns == 0


def test_time_in_which_all_virtual_cpus_wait_is_counted_as_qemu_does(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, start=False)
    readers = [guest.mapper.send("read", page) for page in (5, 200)]
    guest.mapper.wait_blocked(len(readers))
    tids = guest.mapper.blocked_tids()
    guest.pager.name_vcpus(tids)
    assert guest.chaos is None
    guest.image.cut(5)  # both of them wait until the data is back
    guest.pager.start()
    wait_until(lambda: guest.pager.vcpus().stopped == 2, "both are stopped")
    vcpus = guest.pager.vcpus()
    assert vcpus.count == 2 and vcpus.all_stopped_since_ns > 0 and vcpus.all_stopped_ns == 0
    guest.image.grow_back()
    for reader in readers:
        guest.mapper.result(reader)
    wait_until(lambda: guest.pager.vcpus().stopped == 0, "both run")
    vcpus = guest.pager.vcpus()
    each = [thread.blocked_ns for thread in guest.pager.threads()]
    assert vcpus.all_stopped_since_ns == 0
    assert 0 < vcpus.all_stopped_ns <= min(each)

    # One that waits alone does not stop the other.
    guest.mapper.do("read", 300)
    settled = guest.pager.vcpus()
    assert (settled.stopped, settled.all_stopped_ns) == (0, vcpus.all_stopped_ns)


def test_more_virtual_cpus_than_there_is_room_for_are_not_guessed_at(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB)
    guest.pager.name_vcpus(range(1, 1000))
    guest.check_content()
    assert guest.pager.vcpus().count == 0


def test_blocks_add_up_to_the_whole(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB)
    guest.mapper.do("remove", 30, 10)
    guest.check_content(zero_pages=range(30, 40))
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    (block,) = guest.pager.block_counts()
    for name in ("faults", "pages_data", "pages_data_missing", "pages_removed"):
        assert getattr(block, name) == getattr(statistics, name), name
    guest.pager.close()
    assert guest.pager.block_counts() == [block]
