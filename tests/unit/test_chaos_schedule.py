"""Promise: a chaos schedule is taken as it is written, or refused with the entry that is wrong."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.paging.chaos import BlockRange, ChaosSchedule, ChaosSource
from qemu_postcopy.paging.source import FileSource

WHOLE = """
seed = 7
limit = 100
burst = [1, 4]
[fail]
probability = 0.2
errors = ["EIO", "ETIMEDOUT"]
[truncate]
probability = 0.05
[delay]
probability = 0.1
us = [100, 5000]
[stall]
probability = 0.001
ms = "until told"
[[ranges]]
block = "pc.ram"
begin = "1M"
end = "64MiB"
[[ranges]]
block = "m0"
"""


def written(run_dir: Path, text: str, name: str = "chaos.toml") -> Path:
    path = run_dir / name
    path.write_text(text)
    return path


def test_every_entry_is_taken(run_dir: Path) -> None:
    path = written(run_dir, WHOLE)
    assert ChaosSchedule.load(path) == ChaosSchedule(
        path,
        seed=7,
        limit=100,
        burst=(1, 4),
        fail=0.2,
        errors=(errno.EIO, errno.ETIMEDOUT),
        truncate=0.05,
        delay=0.1,
        delay_us=(100, 5000),
        stall=0.001,
        stall_ms=None,
        ranges=(BlockRange("pc.ram", 1 << 20, 64 << 20), BlockRange("m0")),
    )


def test_json_does_as_well(run_dir: Path) -> None:
    path = written(run_dir, json.dumps({"fail": {"probability": 1}}), "chaos.json")
    assert ChaosSchedule.load(path) == ChaosSchedule(path, fail=1.0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "nothing in it ever happens"),
        ("seed = ", "Invalid value"),
        ("sed = 1", "'sed'"),
        ("seed = -1\nfail.probability = 1", "seed is -1"),
        ("seed = true\nfail.probability = 1", "seed is True"),
        ("fail = 0.5", "fail is not a table"),
        ("fail.errors = ['EIO']", "fail has no probability"),
        ("fail.probability = 1.5", "fail.probability is 1.5"),
        ("fail.probability = nan", "fail.probability is nan"),
        ("fail.probability = '1'", "fail.probability is '1'"),
        ("fail = {probability = 1, errors = []}", "1 to 16 names"),
        ("fail = {probability = 1, errors = ['EWHAT']}", "'EWHAT'"),
        ("fail.probability = 0.6\ntruncate.probability = 0.5", "add up to 1.1"),
        ("fail.probability = 1\nburst = [0, 1]", "burst is 0"),
        ("fail.probability = 1\nburst = [3, 2]", "burst is 2"),
        ("fail.probability = 1\nburst = 3", "not a pair"),
        ("delay = {probability = 1, us = [0, 5]}", "delay.us is 0"),
        ("stall = {probability = 1, ms = 'for ever'}", "not a pair"),
        ("fail.probability = 1\nranges = []", "ranges is not a list"),
        ("fail.probability = 1\nranges = [{begin = 1}]", "does not name its block"),
        ("fail.probability = 1\nranges = [{block = 'm', begin = 2, end = 2}]", "ends before"),
        ("fail.probability = 1\nranges = [{block = 'm', begin = '2 apples'}]", "2 apples"),
    ],
)
def test_what_is_wrong_is_named(run_dir: Path, text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as refused:
        ChaosSchedule.load(written(run_dir, text))
    assert "chaos.toml" in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 60000, b"#" * 100_000])
def test_rubbish_is_refused(run_dir: Path, content: bytes) -> None:
    for name in ("chaos.toml", "chaos.json"):
        (run_dir / name).write_bytes(content)
        with pytest.raises(UsageError, match="no chaos schedule"):
            ChaosSchedule.load(run_dir / name)


def test_a_schedule_that_is_not_there_is_told(run_dir: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        ChaosSchedule.load(run_dir / "none.toml")


def test_the_inner_source_stays_the_caller_s_where_the_schedule_is_refused(run_dir: Path) -> None:
    inner = FileSource(os.open("/dev/null", os.O_RDONLY))
    with pytest.raises(UsageError, match="contradicts"):
        ChaosSource(inner, ChaosSchedule(run_dir, fail=0.7, delay=0.7), "m0", 0)
    assert inner.handle
    inner.close()
