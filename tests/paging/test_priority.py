"""Promise: the pager has a real-time priority only while it waits for a moment between removals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from paging.mapper_process import wait_until
from paging.test_take_over import KilledServer

pytestmark = pytest.mark.needs("uffd", "cc", "root")

REMOVERS = 8


@pytest.fixture
def unprivileged(mapper_binary: Path, run_dir: Path) -> Iterator[KilledServer]:
    """All of it on one processor, where removers are hardly ever caught between two removals."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        server = KilledServer(mapper_binary, run_dir, "unprivileged")
    finally:
        os.sched_setaffinity(0, processors)
    yield server
    server.close()


def pager_thread(pid: int) -> int:
    def named() -> list[int]:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(task.name) for task in tasks if (task / "comm").read_text() == "qpc-pager\n"]

    wait_until(lambda: len(named()) == 1, "it has its name")
    return named()[0]


def test_it_is_given_back_also_by_a_user_who_may_only_take_it(unprivileged: KilledServer) -> None:
    mapper = unprivileged.mapper
    tid = pager_thread(unprivileged.server.pid)
    assert os.sched_getscheduler(tid) == os.SCHED_OTHER
    storms = [mapper.send("storm", 8 * number, 8) for number in range(REMOVERS)]
    pages = iter(range(200, 1100))

    def taken() -> bool:
        mapper.first_word(next(pages))
        # Nobody without CAP_SYS_NICE can take the flag back, nor leave without it (sched(7)).
        return bool(os.sched_getscheduler(tid) & os.SCHED_RESET_ON_FORK)

    wait_until(taken, "it has had a real-time priority")
    mapper.do("calm", 0)
    for storm in storms:
        mapper.result(storm)
    mapper.first_word(next(pages))
    wait_until(
        lambda: os.sched_getscheduler(tid) == os.SCHED_OTHER | os.SCHED_RESET_ON_FORK,
        "it is a thread like any other again",
    )
