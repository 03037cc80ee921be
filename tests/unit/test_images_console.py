"""The guest's console lines become typed records, whatever pieces they come in."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_postcopy.images.console import (
    Bad,
    ConsoleParser,
    Failure,
    Ready,
    Tick,
    Walk,
    parse_line,
)

STREAM = (
    "[    0.1] a kernel line\r\n"
    "QPC ready fill=512 pages=131072 zero=26476 time_ms=3277\r\n"
    "QPC tick=12 pass=3 generation=4 pages=65536 bad=0 time_ms=3339\r\n"
    "QPC BAD page=5 word=511 generation=3 want=0123456789abcdef got=0000000000000000\r\n"
    "QPC walk=7 pass=1 generation=0 touched=100 pages=200 bad=1 time_ms=4000\r\n"
    "QPC FAIL cannot mount /proc: No such file\r\n"
    "[    9.9] Kernel panic - not syncing: Attempted to kill init!\r\n"
)
RECORDS = [
    Ready(fill_mib=512, pages=131072, zero_pages=26476, time_ms=3277),
    Tick(number=12, passes=3, generation=4, pages=65536, bad_words=0, time_ms=3339),
    Bad(page_index=5, word_index=511, generation=3, want=0x0123456789ABCDEF, got=0),
    Walk(number=7, passes=1, generation=0, pages=200, bad_words=1, time_ms=4000, touched_pages=100),
    Failure("cannot mount /proc: No such file"),
    Failure("Kernel panic - not syncing: Attempted to kill init!"),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=20), st.booleans())
def test_records_do_not_depend_on_how_the_stream_is_cut(cuts: list[int], as_bytes: bool) -> None:
    parser = ConsoleParser()
    edges = [0, *sorted(cuts), len(STREAM)]
    records = []
    for start, end in itertools.pairwise(edges):
        piece = STREAM[start:end]
        records += parser.feed(piece.encode() if as_bytes else piece)
    assert records == RECORDS
    assert parser.damaged_lines == 0


def test_a_line_cut_off_by_the_restore_is_passed_over() -> None:
    parser = ConsoleParser()
    assert parser.feed("4 pages=65536 bad=0 time_ms=3339\n") == []
    assert parser.damaged_lines == 0


def test_a_kernel_message_in_the_midst_of_our_line_is_counted_not_believed() -> None:
    parser = ConsoleParser()
    assert parser.feed("QPC tick=12 pass=3 gene[ 12.3] clocksource: tsc\n") == []
    assert parser.damaged_lines == 1


def test_a_kernel_message_before_our_line_does_not_hide_it() -> None:
    line = "[   12.3] clocksource: tscQPC ready fill=1 pages=256 zero=0 time_ms=5"
    assert parse_line(line) == Ready(1, 256, 0, 5)


@pytest.mark.parametrize("line", ["", "QPC", "QPC tick=x pass=1", "QPC tick=1 pass=1 bad=0 junk"])
def test_other_lines_are_no_records(line: str) -> None:
    assert parse_line(line) is None


def test_noise_without_line_breaks_is_not_kept() -> None:
    parser = ConsoleParser()
    for _ in range(100):
        parser.feed(b"\xff" * 65536)
    assert len(parser._partial) <= ConsoleParser.LONGEST_LINE
    assert parser.feed("\nQPC FAIL x\n") == [Failure("x")]
