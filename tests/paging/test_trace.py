"""Promise: a trace has every fault with its thread, page and answer, or counts it as lost."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from paging.mapper_process import wait_until
from paging.served_guest import KIB, ServedGuest, is_hole

from qemu_postcopy.errors import ImageError
from qemu_postcopy.paging.trace import Answer, Trace, TraceThread, TraceWriter

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

PAGES = 40


def settled(guest: ServedGuest) -> Trace:
    """The trace once nothing is left to be noted: a thread is woken before that."""
    assert guest.trace is not None
    path = guest.trace.path

    def noted() -> bool:
        with Trace(path) as trace:
            return len(trace) + trace.lost == guest.statistics.faults

    wait_until(noted, "every answer is noted")
    return Trace(path)


def test_the_trace_tells_thread_page_and_answer_of_every_fault(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, trace_capacity=2000)
    guest.check_content()
    with settled(guest) as trace:
        faults = list(trace)
    account = {thread.tid: thread for thread in guest.pager.threads()}
    assert len(faults) == guest.statistics.faults > 500
    assert trace.lost == 0
    for tid, thread in account.items():
        own = [fault for fault in faults if fault.tid == tid]
        assert len(own) == thread.faults
        assert sum(fault.latency_ns for fault in own) == thread.blocked_ns
    for fault in faults:
        assert fault.answer == (Answer.ZERO if is_hole(fault.page) else Answer.DATA)


def test_a_full_trace_stays_and_counts_what_is_lost(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, trace_capacity=10)
    for page in range(PAGES):
        guest.mapper.first_word(page)
    assert guest.trace is not None
    guest.trace.set_threads({7: "vCPU 0"})
    with settled(guest) as trace:
        assert len(list(trace)) == 10
        assert trace.lost == guest.statistics.faults - 10 > 0
        assert trace.threads == [TraceThread(7, "vCPU 0")]
    guest.check_content()


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, b"X"), (8, b"\2"), (12, b"\3"), (24, b"\xff" * 8), (56, b"\xff" * 4), (4096 + 16, b"\1")],
    ids=["magic", "version", "record size", "count", "blocks", "page size"],
)
def test_a_damaged_trace_is_refused(
    serve: Serve, tmp_path: Path, offset: int, value: bytes
) -> None:
    guest = serve(start=False, trace_capacity=10)
    assert guest.trace is not None
    data = bytearray(guest.trace.path.read_bytes())
    data[offset : offset + len(value)] = value
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    with pytest.raises(ImageError):
        Trace(damaged)


def test_a_record_outside_of_its_block_is_refused(serve: Serve, tmp_path: Path) -> None:
    guest = serve(chunk_size=4 * KIB, trace_capacity=10)
    guest.mapper.first_word(0)
    settled(guest).close()
    assert guest.trace is not None
    data = bytearray(guest.trace.path.read_bytes())
    struct.pack_into("<I", data, 32768 + 12, 1 << 30)
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    with Trace(damaged) as trace, pytest.raises(ImageError):
        list(trace)


def test_a_trace_is_gone_on_with_where_its_writer_was_killed(serve: Serve) -> None:
    guest = serve(chunk_size=4 * KIB, trace_capacity=100)
    for page in range(4, 7):
        guest.mapper.first_word(page)
    assert guest.trace is not None
    path, blocks = guest.trace.path, settled(guest).blocks
    guest.trace.set_threads({7: "vCPU 0", 8: "main loop"})
    before = list(Trace(path))
    guest.pager.stop()
    resumed = TraceWriter.resume(path, blocks)
    assert resumed.trace.count == len(before) > 0 and resumed.trace.capacity == 100
    resumed.set_threads({8: "worker", 9: "vCPU 1"})
    resumed.close()
    with Trace(path) as trace:
        assert list(trace) == before
        named = {thread.tid: thread.origin for thread in trace.threads}
    assert named == {7: "vCPU 0", 8: "worker", 9: "vCPU 1"}
    with pytest.raises(ImageError, match="other memory"):
        TraceWriter.resume(path, [])
    other = path.with_name("other")
    with pytest.raises(ImageError, match="cannot be read"):
        TraceWriter.resume(other, blocks)
    other.write_bytes(b"something else")
    with pytest.raises(ImageError, match="no trace"):
        TraceWriter.resume(other, blocks)
