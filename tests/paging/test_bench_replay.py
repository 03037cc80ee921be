"""Promise: a trace is replayed page by page through the real pager, and memory holds the image."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qemu_postcopy import cli
from qemu_postcopy.bench.replay import ReplayBench, _Block, compare
from qemu_postcopy.errors import ContentError, HostError, ImageError, MismatchError, UsageError
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.stream import BlockSummary, StreamSummary
from qemu_postcopy.image.writer import ImageWriter
from qemu_postcopy.paging.chaos import ChaosSchedule
from qemu_postcopy.paging.trace import (
    COUNTERS_OFFSET,
    RECORD,
    RECORDS_OFFSET,
    Answer,
    Trace,
    TraceBlock,
    TraceWriter,
)

PAGE = 4096
PAGES = 1024
BLOCKS = ("m0", "m1")
THREADS = (100, 101, 205)
SECOND = 10**9

pytestmark = pytest.mark.needs("uffd", "cc")


@pytest.fixture
def image(run_dir: Path) -> Image:
    """Two blocks of 4 MiB, every third page of them a hole."""
    content = random.Random(1)
    with ImageWriter(run_dir / "image") as writer:
        (writer.directory / "ram").mkdir()
        (writer.directory / "state.bin").write_bytes(b"QEVL\0\0\0\3 and the rest")
        summaries = []
        for name in BLOCKS:
            with (writer.directory / "ram" / name).open("wb") as file:
                file.truncate(PAGES * PAGE)
                for page in range(PAGES):
                    if page % 3:
                        file.seek(page * PAGE)
                        file.write(content.randbytes(PAGE))
            data = PAGES - len(range(0, PAGES, 3))
            summaries.append(
                BlockSummary(
                    name, PAGES * PAGE, True, data, PAGES - data, data, None, f"ram/{name}"
                )
            )
        summary = StreamSummary("plain", False, "pc", PAGE, (), tuple(summaries), (), (), 0)
        return writer.finish(summary, architecture="x86_64", source="a test")


def record(path: Path, faults: list[tuple[int, int, int, int]], length: int = PAGES * PAGE) -> Path:
    """A trace of (nanoseconds since it began, thread, block, page)."""
    blocks = [
        TraceBlock(name, (index + 1) << 32, length, PAGE) for index, name in enumerate(BLOCKS)
    ]
    writer = TraceWriter.create(path, blocks, max(1, len(faults)))
    with Trace(path) as trace:
        began = trace.started_ns
    records = b"".join(
        RECORD.pack(began + time, tid, page, 20_000, block, Answer.DATA, 0)
        for time, tid, block, page in faults
    )
    writer.mapping[RECORDS_OFFSET : RECORDS_OFFSET + len(records)] = records
    struct.pack_into("<QQ", writer.mapping, COUNTERS_OFFSET, max(1, len(faults)), len(faults))
    writer.close()
    return path


@pytest.fixture
def faults() -> list[tuple[int, int, int, int]]:
    """Every page once, in no order, by three threads."""
    pages = [(block, page) for block in range(len(BLOCKS)) for page in range(PAGES)]
    random.Random(2).shuffle(pages)
    return [
        (index * 10_000, THREADS[index % 3], block, page)
        for index, (block, page) in enumerate(pages)
    ]


@pytest.fixture
def trace(run_dir: Path, faults: list[tuple[int, int, int, int]]) -> Path:
    return record(run_dir / "trace", faults)


def replay(trace: Path, image: Image, *words: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """The results by name, and all that was said."""
    arguments = ["bench", "replay", trace, "--image", image.path, "--runs", 2, "--json", *words]
    done = CliRunner().invoke(cli.commands, [str(word) for word in arguments])
    if done.exception is not None:
        raise done.exception
    report = json.loads(done.stdout)
    return {entry["name"]: entry for entry in report["results"]}, report


def test_every_traced_page_is_touched_and_filled(trace: Path, image: Image) -> None:
    results, report = replay(trace, image, "--chunk", "4KiB")
    faults = results["as fast as it goes: faults"]
    assert faults["runs"] == 2
    # Short runs of zero pages between data are filled with it, so not every touch is a fault.
    assert PAGES < faults["min"] <= faults["max"] <= 2 * PAGES + 10
    assert results["as fast as it goes: touch, p50"]["min"] > 0
    assert results["in the trace: answer, p50"]["median"] == 20
    assert [entry["name"] for entry in report["ratios"]] == ["answer, p50", "answer, p99"]


def test_larger_chunks_leave_fewer_faults(trace: Path, image: Image) -> None:
    results, _ = replay(trace, image, "--chunk", "64KiB", "--background")
    assert 0 < results["as fast as it goes: faults"]["max"] < PAGES


def test_traced_times_are_kept(run_dir: Path, image: Image) -> None:
    touches = [(0, 1, 0, 1), (SECOND // 10, 2, 0, 2), (SECOND // 5, 1, 1, 5)]
    trace = record(run_dir / "trace", touches)
    results, _ = replay(trace, image, "--timed")
    assert 0 < results["at the traced times: touches"]["max"] <= 3 / 0.2
    assert "at the traced times: latest touch, behind its time" in results
    results, _ = replay(trace, image, "--fast")
    assert results["as fast as it goes: touches"]["max"] > 3 / 0.2


def test_page_data_may_fail_and_memory_is_right_all_the_same(
    trace: Path, image: Image, run_dir: Path
) -> None:
    schedule = run_dir / "chaos.json"
    schedule.write_text(
        json.dumps(
            {
                "seed": 5,
                "limit": 40,
                "fail": {"probability": 0.05, "errors": ["EIO"]},
                "truncate": {"probability": 0.05},
                "delay": {"probability": 0.1, "us": [1, 100]},
                "stall": {"probability": 0.01, "ms": [1, 2]},
            }
        )
    )
    results, _ = replay(trace, image, "--chunk", "4KiB", "--chaos", schedule)
    assert results["chaos: failed"]["max"] + results["chaos: truncated"]["max"] > 40
    assert results["chaos: delayed"]["max"] > 0 and results["chaos: stalled"]["max"] > 0


def test_stalls_without_an_end_are_refused(trace: Path, image: Image, run_dir: Path) -> None:
    chaos = ChaosSchedule(run_dir / "chaos", stall=0.1, stall_ms=None)
    bench = ReplayBench(
        trace=trace, image=image.path, timed=False, runs=1, directory=run_dir, chaos=chaos
    )
    with pytest.raises(UsageError, match="never go on"):
        bench.run()


def test_a_trace_of_another_guest_is_refused(run_dir: Path, image: Image) -> None:
    other = record(run_dir / "other", [(0, 1, 0, 0)], length=2 * PAGES * PAGE)
    with pytest.raises(MismatchError, match="block m0 of 8388608 bytes"):
        replay(other, image)


def test_a_trace_of_nothing_is_refused(run_dir: Path, image: Image) -> None:
    with pytest.raises(UsageError, match="no fault"):
        replay(record(run_dir / "empty", []), image)


def test_a_damaged_trace_is_refused(run_dir: Path, image: Image) -> None:
    with pytest.raises(ImageError, match="cannot be"):
        replay(record(run_dir / "damaged", [(0, 1, 0, PAGES)]), image)


def test_memory_that_cannot_be_had_is_told(
    run_dir: Path, image: Image, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qemu_postcopy.bench import replay as module

    monkeypatch.setattr(module, "write_schedule", lambda path, *rest: path.write_bytes(b""))
    with pytest.raises(HostError, match="stand-in"):
        replay(trace, image)
    assert not list(run_dir.glob("qpc-replay-*"))


@pytest.fixture
def filled(image: Image) -> Iterator[_Block]:
    """The first block as it must be, in a memfd."""
    data, offset = image.open_block("m0")
    memory = os.memfd_create("filled")
    os.truncate(memory, PAGES * PAGE)
    os.pwrite(memory, os.pread(data, PAGES * PAGE, offset), 0)
    block = TraceBlock("m0", 1 << 32, PAGES * PAGE, PAGE)
    yield _Block(block, 1 << 32, memory, data, offset, image.data_bitmap("m0"))
    os.close(memory)
    os.close(data)


@pytest.mark.parametrize("page", [0, 1, 300, 301, PAGES - 1])
def test_one_wrong_byte_is_found_in_data_and_zeros(filled: _Block, page: int) -> None:
    compare(filled, bytes([2]) * PAGES)
    before = os.pread(filled.memory, 1, page * PAGE + 77)
    os.pwrite(filled.memory, bytes([before[0] ^ 1]), page * PAGE + 77)
    with pytest.raises(ContentError, match=f"page {page} of block m0"):
        compare(filled, bytes([2]) * PAGES)
    # What the pager has not filled is not looked at.
    states = bytearray([2]) * PAGES
    states[page] = 0
    compare(filled, bytes(states))


def test_reading_memory_back_fills_none_of_it() -> None:
    memory = os.memfd_create("empty")
    os.truncate(memory, PAGES * PAGE)
    assert not any(os.pread(memory, PAGES * PAGE, 0))
    with pytest.raises(OSError) as error:
        os.lseek(memory, 0, os.SEEK_DATA)
    assert error.value.errno == errno.ENXIO
    os.close(memory)
