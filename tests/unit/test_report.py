"""Promise: the report of a trace has all of its faults, and needs nothing from elsewhere."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from qemu_postcopy import cli
from qemu_postcopy.paging.trace import (
    COUNTERS_OFFSET,
    RECORD,
    RECORDS_OFFSET,
    TraceBlock,
    TraceWriter,
)


@pytest.mark.parametrize("count", [0, 1, 100])
def test_the_page_stands_alone(tmp_path: Path, count: int) -> None:
    path = tmp_path / "t"
    writer = TraceWriter.create(path, [TraceBlock("<m0>", 1 << 32, 16 * 4096, 4096)], 100)
    writer.set_threads({7: "vCPU 0", 8: "main loop"})
    for i in range(count):
        record = RECORD.pack(10**9 + i * 1000, 7 + i % 2, i % 16, i * 1000, 0, 0, 0)
        start = RECORDS_OFFSET + i * RECORD.size
        writer.mapping[start : start + RECORD.size] = record
    struct.pack_into("<QQQ", writer.mapping, COUNTERS_OFFSET, 100, count, 5)
    writer.close()
    done = CliRunner().invoke(cli.commands, ["report", str(path)])
    assert done.exit_code == 0, done.output
    assert f"{count} faults, 5 lost" in done.output
    page = path.with_name("t.html").read_text()
    assert f"{count} faults" in page and "5 later faults" in page
    assert "http" not in page and "<script" not in page and "<m0>" not in page
    assert ("<td>vCPU 0<td>" in page) == (count > 0)
    if count == 100:
        assert "<td>vCPU 0<td>50<td>50.0 %" in page
        assert "on 16 different pages" in page
