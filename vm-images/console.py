"""The guest's console lines as typed records.

The last step of every check: tests, demo and benches read the guest's verdict from here.  Nothing
in the stream is trusted; what is not one of our lines is passed over.  Pure computation; one parser
belongs to one reader.  The lines are described in guest/report.h.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """Memory is filled; from here on the guest verifies.  `time_ms` is guest time since boot."""

    fill_mib: int
    pages: int
    zero_pages: int
    time_ms: int


@dataclass(frozen=True)
class Tick:
    """A report of the checker or of the idle guest.

    `passes` are finished; `pages` were verified and `bad_words` found since ready.
    """

    number: int
    passes: int
    generation: int
    pages: int
    bad_words: int
    time_ms: int


@dataclass(frozen=True)
class Walk(Tick):
    """A report of the walker; `touched_pages` since the report before."""

    touched_pages: int


@dataclass(frozen=True)
class Bad:
    """One wrong word of 8 bytes.  `page_index` counts pages of the checked area, not of RAM."""

    page_index: int
    word_index: int
    generation: int
    want: int
    got: int


@dataclass(frozen=True)
class Failure:
    """The guest gave up, or its kernel panicked."""

    reason: str


Record = Ready | Tick | Walk | Bad | Failure

_NUMBERS = r"pass=(\d+) generation=(\d+) pages=(\d+) bad=(\d+) time_ms=(\d+)"
_WALK_NUMBERS = _NUMBERS.replace(" pages=", r" touched=(\d+) pages=")
_HEX = "([0-9a-f]{16})"


def _walk(match: re.Match[str]) -> Walk:
    number, passes, generation, touched, pages, bad, time_ms = map(int, match.groups())
    return Walk(number, passes, generation, pages, bad, time_ms, touched)


def _bad(match: re.Match[str]) -> Bad:
    page, word, generation, want, got = match.groups()
    return Bad(int(page), int(word), int(generation), int(want, 16), int(got, 16))


_PATTERNS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], Record]], ...] = (
    (re.compile(rf"QPC tick=(\d+) {_NUMBERS}$"), lambda m: Tick(*map(int, m.groups()))),
    (re.compile(rf"QPC walk=(\d+) {_WALK_NUMBERS}$"), _walk),
    (
        re.compile(r"QPC ready fill=(\d+) pages=(\d+) zero=(\d+) time_ms=(\d+)$"),
        lambda m: Ready(*map(int, m.groups())),
    ),
    (
        re.compile(rf"QPC BAD page=(\d+) word=(\d+) generation=(\d+) want={_HEX} got={_HEX}$"),
        _bad,
    ),
    (re.compile(r"QPC FAIL (.+)$"), lambda m: Failure(m[1])),
    (re.compile(r"(Kernel panic - .+)$"), lambda m: Failure(m[1])),
)


def parse_line(line: str) -> Record | None:
    """The record of one line, or None.  A kernel message may stand before ours on the line."""
    line = line.rstrip("\r\n")
    for pattern, convert in _PATTERNS:
        if match := pattern.search(line):
            return convert(match)
    return None


class ConsoleParser:
    """Makes records of a stream that comes in arbitrary pieces.

    A restored guest's stream may begin in the middle of a line: such a line is passed over, and
    `damaged_lines` counts the lines that name us but cannot be read.
    """

    #: longest line kept: more without a line break is noise, not one of our lines
    LONGEST_LINE = 4096

    def __init__(self) -> None:
        self.damaged_lines = 0
        self._partial = ""

    def feed(self, text: str | bytes) -> list[Record]:
        """The records that `text` completes, in order."""
        if isinstance(text, bytes):
            text = text.decode("latin-1")  # never fails, never splits; our lines are ASCII
        *lines, self._partial = (self._partial + text).split("\n")
        self._partial = self._partial[-self.LONGEST_LINE :]
        records = []
        for line in lines:
            record = parse_line(line)
            if record is not None:
                records.append(record)
            elif "QPC " in line and "QPC shell " not in line:
                self.damaged_lines += 1
        return records
