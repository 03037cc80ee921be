"""Promise: the report of a trace has all of its faults, and needs nothing from elsewhere."""

from __future__ import annotations

import re
import struct
import zlib
from base64 import b64decode
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qemu_postcopy import cli
from qemu_postcopy.paging.trace import (
    COUNTERS_OFFSET,
    RECORD,
    RECORDS_OFFSET,
    Trace,
    TraceBlock,
    TraceWriter,
)
from qemu_postcopy.report.digest import COLUMNS, busy_part, digest
from qemu_postcopy.report.picture import LEVELS, level_of, png, ticks

#: Far more faults than a page has points: what is shown must not grow with them.
MANY = 100_000


def write_trace(path: Path, count: int, lost: int = 5) -> Path:
    """Two threads touch 16 pages one after the other, each time a microsecond slower."""
    block = TraceBlock("<m0>", 1 << 32, 16 * 4096, 4096)
    writer = TraceWriter.create(path, [block], max(count, 100))
    writer.set_threads({7: "vCPU 0", 8: "<main loop>"})
    with Trace(path) as trace:
        began = trace.started_ns
    for i in range(count):
        record = RECORD.pack(began + i * 1000, 7 + i % 2, i % 16, i * 1000 % 10**9, 0, i % 2, 0)
        start = RECORDS_OFFSET + i * RECORD.size
        writer.mapping[start : start + RECORD.size] = record
    struct.pack_into("<QQQ", writer.mapping, COUNTERS_OFFSET, max(count, 100), count, lost)
    writer.close()
    return path


def report(path: Path) -> Result:
    return CliRunner().invoke(cli.commands, ["report", str(path)])


@pytest.mark.parametrize("count", [0, 1, 100, MANY])
def test_the_page_stands_alone(tmp_path: Path, count: int) -> None:
    path = write_trace(tmp_path / "t", count)
    done = report(path)
    assert done.exit_code == 0, done.output
    assert f"{count} faults, 5 lost" in done.output
    page = path.with_name("t.html").read_text()
    assert f"{count:,} faults" in page and "5 later faults" in page
    assert "http" not in page and "<script" not in page and "url(" not in page
    assert "<m0>" not in page and "<main loop>" not in page
    assert set(re.findall(r'href="([a-z:/]+)', page)) <= {"data:image/png"}
    assert ("vCPU 0<td>" in page) == (count > 0)
    assert len(page) < 100_000
    if count > 1:
        assert f"vCPU 0<td>{count // 2:,}<td>50.0 %" in page
        assert "on 16 different pages (64 KiB)" in page
        assert f"{count // 2:,} got data, {count // 2:,} zeros" in page
        for title in ("addresses over time", "Working set", "Latency:", "Latency over time"):
            assert title in page


def test_numbers_are_those_of_the_faults(tmp_path: Path) -> None:
    with Trace(write_trace(tmp_path / "t", 100)) as trace:
        found = digest(trace)
    assert (found.faults, found.pages, found.span_ns, found.refused) == (100, 16, 99_001, 0)
    assert {origin.name: sum(origin.latencies_ns) for origin in found.origins} == {
        "vCPU 0": sum(range(0, 100, 2)) * 1000,
        "<main loop>": sum(range(1, 100, 2)) * 1000,
    }
    assert sum(found.growth) == 16 and sum(found.growth_bytes) == 16 * 4096
    # All pages were asked for within the first 16 of 99 microseconds.
    assert sum(found.growth[: 17 * COLUMNS // 99]) == 16
    assert sum(found.maps[0].values()) == sum(found.slow.values()) == 100


def test_a_busy_beginning_is_shown_for_itself(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", 1000)
    with Trace(path) as trace:
        assert busy_part(trace, digest(trace)) is None
        began = trace.started_ns
    last = RECORD.pack(began + 5 * 10**9, 7, 3, 1000, 0, 0, 0)
    with path.open("rb+") as file:
        file.seek(RECORDS_OFFSET + 999 * RECORD.size)
        file.write(last)
    with Trace(path) as trace:
        found = digest(trace)
        busy = busy_part(trace, found)
    assert busy is not None
    assert (found.faults, found.span_ns) == (1000, 5 * 10**9 + 1)
    assert (busy.faults, busy.begin_ns, busy.span_ns < 10**8) == (999, found.begin_ns, True)
    assert report(path).exit_code == 0
    page = path.with_name("t.html").read_text()
    assert "100 % of the faults" in page and "All 5 s" in page


def test_a_trace_cut_short_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", 100)
    with path.open("rb+") as file:
        file.truncate(RECORDS_OFFSET + 60 * RECORD.size + 11)
    done = report(path)
    assert done.exit_code == 0, done.output
    assert "40 faults are missing" in done.output and "60 faults, 5 lost" in done.output
    assert "the last 40 faults are missing" in path.with_name("t.html").read_text()


def test_damaged_records_are_left_out_and_told(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", 100)
    damaged = [
        RECORD.pack(2**63, 7, 16, 0, 0, 0, 0),  # no such page
        RECORD.pack(2**63, 7, 0, 0, 1, 0, 0),  # no such block
        RECORD.pack(2**63, 7, 0, 0, 0, 3, 0),  # no such answer
        RECORD.pack(1, 7, 0, 0, 0, 0, 0),  # before the trace was made
    ]
    with path.open("rb+") as file:
        file.seek(RECORDS_OFFSET + 20 * RECORD.size)
        file.write(b"".join(damaged))
    done = report(path)
    assert done.exit_code == 0, done.output
    assert "4 records are damaged" in done.output and "96 faults" in done.output
    page = path.with_name("t.html").read_text()
    assert "4 records are damaged" in page
    assert "Within 99 µs" in page, "a damaged record's time counts"


@pytest.mark.parametrize("size", [0, 7, 4095, RECORDS_OFFSET - 1])
def test_what_is_no_trace_is_refused(tmp_path: Path, size: int) -> None:
    path = write_trace(tmp_path / "t", 1)
    with path.open("rb+") as file:
        file.truncate(size)
    done = report(path)
    assert done.exit_code != 0 and not path.with_name("t.html").exists()


def test_a_picture_is_what_was_drawn() -> None:
    points = {0: (0, 0), 5: (1, LEVELS - 1)}
    data = png(3, 2, points)
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, rest = {}, data[8:]
    while rest:
        length, kind = struct.unpack_from(">I4s", rest)
        assert struct.unpack_from(">I", rest, 8 + length)[0] == zlib.crc32(rest[4 : 8 + length])
        chunks[kind] = rest[8 : 8 + length]
        rest = rest[12 + length :]
    assert list(chunks) == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (3, 2, 8, 3, 0, 0, 0)
    rows = zlib.decompress(chunks[b"IDAT"])
    assert rows == bytes([0, 1, 0, 0, 0, 0, 0, 2 * LEVELS])
    assert len(chunks[b"PLTE"]) == 3 * len(chunks[b"tRNS"])
    assert chunks[b"tRNS"][0] == 0, "what is not drawn is transparent"
    assert chunks[b"tRNS"][1] < chunks[b"tRNS"][LEVELS] == 255


def test_pictures_in_the_page_are_whole(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "t", 100)
    assert report(path).exit_code == 0
    found = re.findall(r"base64,([^\"]+)", path.with_name("t.html").read_text())
    assert len(found) == 2
    assert all(b64decode(one, validate=True).startswith(b"\x89PNG") for one in found)


@pytest.mark.parametrize("highest", [1, 7, 99, 1000, 12345, 3.5e9])
@pytest.mark.parametrize("binary", [False, True])
def test_marks_are_few_and_cover_the_axis(highest: float, binary: bool) -> None:
    marks = ticks(highest, 8, binary=binary)
    assert marks[0] == 0 and marks[-1] <= highest
    assert len(marks) <= 9
    assert highest - marks[-1] < marks[1]


def test_levels_are_within_the_palette() -> None:
    assert [level_of(count, 1000) for count in (1, 1000)] == [0, LEVELS - 1]
    assert level_of(1, 1) == 0
