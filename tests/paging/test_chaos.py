"""Promise: under a chaos schedule the guest waits and goes on; no word of it is ever wrong."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from paging.served_guest import KIB, ServedGuest

from qemu_postcopy.paging.chaos import BlockRange, ChaosCounts, ChaosSchedule

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

FAILING = ChaosSchedule(
    Path("failing"),
    seed=3,
    fail=0.15,
    errors=(errno.EIO, errno.ETIMEDOUT),
    truncate=0.1,
    delay=0.1,
    delay_us=(1, 200),
    stall=0.02,
    stall_ms=(1, 3),
    burst=(1, 3),
)


def no_hole(page: int) -> bool:
    return False


def counts_of(guest: ServedGuest) -> ChaosCounts:
    assert guest.chaos is not None
    return guest.chaos.counts()


@pytest.mark.parametrize("background", [False, True], ids=["demand", "background"])
@pytest.mark.parametrize("chunk_size", [4 * KIB, 64 * KIB])
def test_content_is_right_whatever_the_reads_did(
    serve: Serve, chunk_size: int, background: bool
) -> None:
    pages = 300 if chunk_size == 4 * KIB else 2200
    guest = serve(pages=pages, chunk_size=chunk_size, background=background, chaos=FAILING)
    guest.check_content()
    guest.wait_complete()
    counts = counts_of(guest)
    assert counts.failed and counts.truncated and counts.delayed
    statistics = guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    assert statistics.fill_errors == 0
    assert statistics.pages_data_missing == 0


def test_the_same_schedule_does_the_same_again(mapper_binary: Path, run_dir: Path) -> None:
    seen = []
    for run, seed in enumerate((5, 5, 6)):
        place = run_dir / str(run)
        place.mkdir()
        chaos = replace(FAILING, seed=seed)
        with ServedGuest(
            mapper_binary, place, pages=60, holes=no_hole, chunk_size=4 * KIB, chaos=chaos
        ) as guest:
            for page in range(60):  # one after the other: then the reads come in the same order
                guest.mapper.first_word(page)
            seen.append(counts_of(guest))
    assert seen[0] == seen[1] != seen[2]


def test_only_what_the_ranges_name_fails(serve: Serve) -> None:
    ranges = (BlockRange("m0", 10 * 4096, 12 * 4096), BlockRange("other"))
    chaos = ChaosSchedule(Path("ranges"), fail=1.0, ranges=ranges)
    guest = serve(pages=40, holes=no_hole, chunk_size=4 * KIB, chaos=chaos)
    waiting = [guest.mapper.send("read", page) for page in (10, 11)]
    for page in (*range(10), *range(12, 40)):
        assert guest.mapper.first_word(page) == guest.image.expected[page][:8]
    assert all(guest.mapper.is_waiting(command) for command in waiting)
    assert guest.statistics.last_error == errno.EIO
    assert guest.chaos is not None
    guest.chaos.enable(False)
    guest.check_content()


def test_the_limit_ends_the_failures(serve: Serve) -> None:
    chaos = ChaosSchedule(Path("limit"), fail=1.0, limit=5)
    guest = serve(pages=40, holes=no_hole, chunk_size=4 * KIB, chaos=chaos)
    guest.check_content()
    assert counts_of(guest).failed == 5


def test_a_stalled_read_goes_on_when_it_is_told(serve: Serve) -> None:
    chaos = ChaosSchedule(Path("stall"), stall=1.0, stall_ms=None)
    guest = serve(pages=40, chunk_size=4 * KIB, chaos=chaos)
    reader = guest.mapper.send("read", 20)
    guest.wait(lambda _: counts_of(guest).stalled_now == 1, "the read stalls")
    assert guest.mapper.is_waiting(reader)
    assert guest.chaos is not None
    guest.chaos.release()
    assert guest.mapper.result(reader).to_bytes(8, "little") == guest.image.expected[20][:8]
    guest.chaos.enable(False)
    guest.check_content()


def test_a_pager_is_stopped_in_the_middle_of_a_stall(serve: Serve) -> None:
    chaos = ChaosSchedule(Path("stall"), stall=1.0, stall_ms=None)
    guest = serve(pages=40, chunk_size=4 * KIB, chaos=chaos)
    reader = guest.mapper.send("read", 20)
    guest.wait(lambda _: counts_of(guest).stalled_now == 1, "the read stalls")
    began = time.monotonic()
    guest.pager.stop()
    assert time.monotonic() - began < 10
    assert guest.statistics.source_errors == 0
    assert guest.mapper.is_waiting(reader)
    assert guest.chaos is not None
    guest.chaos.enable(False)
    guest.pager.start()
    assert guest.mapper.result(reader).to_bytes(8, "little") == guest.image.expected[20][:8]
    guest.check_content()
