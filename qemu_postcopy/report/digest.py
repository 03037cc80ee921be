"""A trace of any length in one pass: what the page of a report is drawn from.

After the flow, in the command.  Trusts nothing in the file: records that cannot be are counted and
left out.  Keeps memory for each page that was asked for and 4 bytes for each fault, no record.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from qemu_postcopy.paging.trace import RECORD, Answer, Trace

#: Resolution of the pictures: so many steps of time, and of a block's addresses.
COLUMNS, ROWS = 800, 256
#: A restored guest asks for most of its pages at once: where so many of all faults came within so
#: many columns, these are shown for themselves as well.
BUSY_SHARE, BUSY_COLUMNS = 0.95, COLUMNS // 5


@dataclass
class Origin:
    """Faults of one origin; latencies in ns."""

    name: str
    latencies_ns: array[int] = field(default_factory=lambda: array("I"))

    @property
    def faults(self) -> int:
        return len(self.latencies_ns)

    @property
    def waited_ns(self) -> int:
        return sum(self.latencies_ns)


@dataclass
class Digest:
    """What a trace says, in numbers that do not grow with it.

    ``maps`` has for each block of the trace the faults by ``(row * COLUMNS + column) * origins +
    origin``, ``slow`` by ``bucket * COLUMNS + column``; ``growth`` the pages that were first asked
    for in each column, ``growth_bytes`` their bytes.  ``origins`` are by number of faults, most
    first.
    """

    begin_ns: int = 0
    span_ns: int = 1
    faults: int = 0
    refused: int = 0
    pages: int = 0
    put_off: int = 0
    answers: list[int] = field(default_factory=lambda: [0] * len(Answer))
    origins: list[Origin] = field(default_factory=list)
    maps: list[dict[int, int]] = field(default_factory=list)
    slow: dict[int, int] = field(default_factory=dict)
    growth: list[int] = field(default_factory=lambda: [0] * COLUMNS)
    growth_bytes: list[int] = field(default_factory=lambda: [0] * COLUMNS)


def busy_part(trace: Trace, found: Digest) -> Digest | None:
    """The beginning alone, where most faults came in a small part of the time; else None."""
    columns = [0] * COLUMNS
    for key, count in found.slow.items():
        columns[key % COLUMNS] += count
    seen, wanted = 0, BUSY_SHARE * found.faults
    for column, count in enumerate(columns):
        seen += count
        if seen >= wanted:
            if column >= BUSY_COLUMNS:
                return None
            end_ns = found.begin_ns + -(-found.span_ns * (column + 1) // COLUMNS)
            return _digest(trace, min(end_ns, found.begin_ns + found.span_ns - 1))[0]
    return None


def digest(trace: Trace) -> Digest:
    """Reads all records."""
    found, latest_ns = _digest(trace, None)
    if latest_ns < found.begin_ns + found.span_ns - 1:
        # The end was that of a damaged record; what is whole is to have the pictures for itself.
        found, _ = _digest(trace, latest_ns)
    return found


def _digest(trace: Trace, end_ns: int | None) -> tuple[Digest, int]:
    """Of the records up to that time; and when the last one is that can be."""
    ret = Digest(maps=[{} for _ in trace.blocks])
    records = memoryview(trace.records)
    pages_of = [block.length // block.page_size for block in trace.blocks]
    order = _origins_by_count(trace, records)
    ret.origins = [Origin(name) for name in order]
    number = {name: index for index, name in enumerate(order)}
    names = {thread.tid: thread.origin for thread in trace.threads}
    latencies: dict[int, tuple[int, array[int]]] = {}
    times = [time for time in records.cast("Q")[::3].tolist() if time >= trace.started_ns]
    if not times:
        ret.refused = trace.count
        return ret, ret.span_ns
    begin, end = min(times), end_ns if end_ns is not None else max(times)
    del times
    span = end - begin + 1
    ret.begin_ns, ret.span_ns = begin, span
    blocks, origins, slow, answers = len(pages_of), len(order), ret.slow, ret.answers
    first: list[dict[int, int]] = [{} for _ in pages_of]
    refused = put_off = latest = 0
    for time, tid, page, latency_ns, block, answer, attempts in RECORD.iter_unpack(records):
        if (
            block >= blocks
            or page >= pages_of[block]
            or answer > Answer.GONE
            or not begin <= time <= end
        ):
            refused += 1
            continue
        if time > latest:
            latest = time
        known = latencies.get(tid)
        if known is None:
            index = number[_name(names, tid)]
            known = latencies[tid] = (index, ret.origins[index].latencies_ns)
        index, own = known
        own.append(latency_ns)
        column = (time - begin) * COLUMNS // span
        key = (page * ROWS // pages_of[block] * COLUMNS + column) * origins + index
        counts = ret.maps[block]
        counts[key] = counts.get(key, 0) + 1
        key = (latency_ns // 1000).bit_length() * COLUMNS + column
        slow[key] = slow.get(key, 0) + 1
        seen = first[block]
        if seen.get(page, COLUMNS) > column:
            seen[page] = column
        answers[answer] += 1
        put_off += attempts > 0
    for counts, one in zip(first, trace.blocks, strict=True):
        ret.pages += len(counts)
        for column in counts.values():
            ret.growth[column] += 1
            ret.growth_bytes[column] += one.page_size
    ret.refused, ret.put_off = refused, put_off
    ret.faults = sum(origin.faults for origin in ret.origins)
    return ret, latest


def _name(names: dict[int, str], tid: int) -> str:
    return names.get(tid, "other" if tid else "unknown")


def _origins_by_count(trace: Trace, records: memoryview) -> list[str]:
    """Names of all origins, most faults first."""
    names = {thread.tid: thread.origin for thread in trace.threads}
    counts: dict[str, int] = {}
    by_tid: dict[int, int] = {}
    # The id is the third of the record's six 4-byte words.
    for tid in records.cast("I")[2::6].tolist():
        by_tid[tid] = by_tid.get(tid, 0) + 1
    for tid, count in by_tid.items():
        name = _name(names, tid)
        counts[name] = counts.get(name, 0) + count
    return sorted(counts, key=lambda name: -counts[name])
