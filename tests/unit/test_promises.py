"""The table of the proposal's promises names tests that exist, or says why there is none yet."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = (ROOT / "docs" / "promises.md").read_text()
#: What a part of a row says that names no test.
REASON = re.compile(r"\bnot yet\b|\bnot measured here\b|\bare refused\b")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TABLE)


def test_every_promise_has_a_row_with_a_test_or_a_reason() -> None:
    rows = re.findall(r"^\| (S\d+) \|.*\| ([^|]+) \|$", TABLE, re.M)
    assert [number for number, _ in rows] == [f"S{number}" for number in range(1, 17)]
    for number, shown in rows:
        # Several parts are told one after the other: each has tests of its own, or a reason.
        for part in shown.split("; "):
            assert "`tests/" in part or REASON.search(part), (number, part)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_named_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.M)
