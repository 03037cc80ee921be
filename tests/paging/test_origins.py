"""Promise: every fault is counted for the thread that made it, also where there is no room left."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from paging.served_guest import KIB, ServedGuest

from qemu_postcopy.paging.account import OTHER, UNKNOWN

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")


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
