"""Promise: polling for faults is bounded, can be off, and an idle pager costs nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from paging.served_guest import KIB, ServedGuest

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

IDLE_SECONDS = 0.5


def cpu_ns(task: Path) -> int:
    """Time on a processor so far (Documentation/scheduler/sched-stats.rst)."""
    return int((task / "schedstat").read_text().split()[0])


def switches(task: Path) -> int:
    """How often the thread went to sleep or was put aside."""
    lines = (task / "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


@pytest.mark.parametrize("complete", [False, True], ids=["pages missing", "complete"])
def test_idle_it_uses_no_processor(serve: Serve, complete: bool) -> None:
    guest = serve(chunk_size=4 * KIB)
    guest.dump(0, None if complete else 500)
    task = guest.wait_asleep()
    before = cpu_ns(task), switches(task)
    time.sleep(IDLE_SECONDS)  # the interval that is measured
    assert (cpu_ns(task), switches(task)) == before


def test_without_a_limit_for_polling_it_never_polls(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, spin_limit_us=0)
    guest.check_content()
    assert guest.statistics.spins_hit == guest.statistics.spins_missed == 0


def test_it_polls_no_more_once_it_polled_in_vain(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB)
    guest.check_content()
    guest.wait_asleep()
    before = guest.statistics
    assert before.spins_missed > 0, "it never polled, so nothing can be shown"
    for _ in range(20):
        guest.pager.set_background(False)  # wakes the thread
        guest.wait_asleep()
    after = guest.statistics
    assert after.spins_hit == before.spins_hit
    # One poll may still be due: it is put off while others need the processor.
    assert after.spins_missed <= before.spins_missed + 1
