"""Chaos runs: a schedule of failures, read from a file, and the source that keeps to it.

Step "restore", on request only.  Page data then comes late, not at all or cut short, as the
schedule says, while the rest of the system is the real one: what must hold (the guest waits, never
sees a made-up page, goes on when data is back) can be tried on a real guest.  The failing itself is
in C (``_native/source_chaos.h``) and needs no GIL; what is here runs in the control plane.
"""

from __future__ import annotations

import errno
import json
import tomllib
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from qemu_postcopy._native import ffi, lib, new_error, raise_error
from qemu_postcopy.errors import UsageError
from qemu_postcopy.paging.source import Source

LONGEST_FILE_BYTES = 64 << 10
#: A number of microseconds, milliseconds or reads in a schedule is at most this.
LARGEST_NUMBER = 1_000_000
LARGEST_OFFSET = 1 << 60
SIZE_SHIFTS = {"K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class BlockRange:
    """Where chaos strikes: ``begin`` (included) to ``end`` (not) in bytes of a RAM block."""

    block: str
    begin: int = 0
    end: int = LARGEST_OFFSET


@dataclass(frozen=True)
class ChaosSchedule:
    """What happens to reads, and how often.

    ``fail``, ``truncate``, ``delay`` and ``stall`` are probabilities (0 to 1, together at most 1).
    Pairs are the least and the most; ``stall_ms`` None: until it is told to go on.  ``burst`` is
    the number of reads in a row that fail once one does; ``limit`` of failed and cut reads in each
    block (0: none).  Without ``ranges`` every block is meant.
    """

    path: Path
    seed: int = 0
    fail: float = 0.0
    errors: tuple[int, ...] = (errno.EIO,)
    truncate: float = 0.0
    delay: float = 0.0
    delay_us: tuple[int, int] = (100, 1000)
    stall: float = 0.0
    stall_ms: tuple[int, int] | None = (100, 1000)
    burst: tuple[int, int] = (1, 1)
    limit: int = 0
    ranges: tuple[BlockRange, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a schedule; TOML, or JSON if the name ends in ``.json``.

        Raises:
            UsageError: it cannot be read, or something in it is unknown or cannot be.
        """
        try:
            with path.open("rb") as file:
                text = file.read(LONGEST_FILE_BYTES + 1)
        except OSError as error:
            raise UsageError(
                f"the chaos schedule {path} cannot be read: {error.strerror}",
                hint="give the name of a TOML or JSON file to --chaos",
            ) from error
        if len(text) > LONGEST_FILE_BYTES:
            raise _bad(path, f"it has more than {LONGEST_FILE_BYTES} bytes")
        try:
            parse = json.loads if path.suffix == ".json" else tomllib.loads
            document = parse(text.decode())
        except (ValueError, RecursionError) as error:
            raise _bad(path, str(error)) from error
        return cls(path, **_Reader(path).schedule(document))


def _bad(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is no chaos schedule: {why}",
        hint="the section CHAOS of `man qemu-postcopy` has an example",
    )


class _Reader:
    """Turns a document into the arguments of a ChaosSchedule; unknown keys are errors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def schedule(self, document: Any) -> dict[str, Any]:
        entries = self._table("the file", document, {
            "seed", "limit", "fail", "truncate", "delay", "stall", "burst", "ranges",
        })  # fmt: skip
        result: dict[str, Any] = {
            "seed": self._integer("seed", entries.get("seed", 0), 0, (1 << 63) - 1),
            "limit": self._integer("limit", entries.get("limit", 0), 0, (1 << 63) - 1),
        }
        for kind, detail in (
            ("fail", "errors"), ("truncate", None), ("delay", "us"), ("stall", "ms"),
        ):  # fmt: skip
            if kind not in entries:
                continue
            keys = {"probability", *([detail] if detail else [])}
            table = self._table(kind, entries[kind], keys)
            if "probability" not in table:
                raise _bad(self._path, f"{kind} has no probability")
            result[kind] = self._probability(kind, table["probability"])
            if detail is None or detail not in table:
                continue
            value = table[detail]
            name = f"{kind}.{detail}"
            if kind == "fail":
                result["errors"] = self._errors(name, value)
            elif kind == "stall" and value == "until told":
                result["stall_ms"] = None
            else:
                result[f"{kind}_{detail}"] = self._pair(name, value)
        if "burst" in entries:
            result["burst"] = self._pair("burst", entries["burst"])
        if "ranges" in entries:
            result["ranges"] = self._ranges(entries["ranges"])
        total = sum(result.get(kind, 0.0) for kind in ("fail", "truncate", "delay", "stall"))
        if total == 0:
            raise _bad(self._path, "nothing in it ever happens: give a fail.probability")
        if total > 1:
            raise _bad(self._path, f"its probabilities add up to {total:g}, more than 1")
        return result

    def _table(self, name: str, value: Any, known: set[str]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _bad(self._path, f"{name} is not a table")
        unknown = sorted(set(value) - known)
        if unknown:
            raise _bad(
                self._path,
                f"{name} has {unknown[0]!r}, which is none of {', '.join(sorted(known))}",
            )
        return value

    def _integer(self, name: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _bad(self._path, f"{name} is {value!r}, not a whole number {least} to {most}")
        return value

    def _probability(self, kind: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise _bad(self._path, f"{kind}.probability is {value!r}, not a number from 0 to 1")
        return float(value)

    def _pair(self, name: str, value: Any) -> tuple[int, int]:
        if not isinstance(value, list) or len(value) != 2:
            raise _bad(self._path, f"{name} is {value!r}, not a pair [least, most]")
        least = self._integer(name, value[0], 1, LARGEST_NUMBER)
        return least, self._integer(name, value[1], least, LARGEST_NUMBER)

    def _errors(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not 1 <= len(value) <= lib.QPC_CHAOS_ERRORS_MAX:
            raise _bad(self._path, f"{name} is not a list of 1 to {lib.QPC_CHAOS_ERRORS_MAX} names")
        numbers = {text: number for number, text in errno.errorcode.items()}
        for text in value:
            if text not in numbers:
                raise _bad(self._path, f"{name} has {text!r}, which is no error's name (as EIO is)")
        return tuple(numbers[text] for text in value)

    def _ranges(self, value: Any) -> tuple[BlockRange, ...]:
        if not isinstance(value, list) or not value:
            raise _bad(self._path, "ranges is not a list of tables")
        ranges = []
        for entry in value:
            table = self._table("a range", entry, {"block", "begin", "end"})
            block = table.get("block")
            if not isinstance(block, str) or not block:
                raise _bad(self._path, "a range does not name its block")
            begin = self._offset("begin", table.get("begin", 0))
            end = self._offset("end", table.get("end", LARGEST_OFFSET))
            if begin >= end:
                raise _bad(self._path, f"a range of {block} ends before it begins")
            ranges.append(BlockRange(block, begin, end))
            if [one.block for one in ranges].count(block) > lib.QPC_CHAOS_RANGES_MAX:
                raise _bad(self._path, f"{block} has more than {lib.QPC_CHAOS_RANGES_MAX} ranges")
        return tuple(ranges)

    def _offset(self, name: str, value: Any) -> int:
        if isinstance(value, str):
            digits = value.upper().removesuffix("IB").removesuffix("B")
            shift = SIZE_SHIFTS.get(digits[-1:], 0)
            digits = digits[:-1] if shift else digits
            if digits.isascii() and digits.isdigit():
                value = int(digits) << shift
        return self._integer(f"a range's {name}", value, 0, LARGEST_OFFSET)


@dataclass(frozen=True)
class ChaosCounts:
    """What was done to reads so far."""

    reads: int = 0
    failed: int = 0
    truncated: int = 0
    delayed: int = 0
    stalled: int = 0
    stalled_now: int = 0

    def __add__(self, other: ChaosCounts) -> ChaosCounts:
        return ChaosCounts(
            *(getattr(self, one.name) + getattr(other, one.name) for one in fields(self))
        )


class ChaosSource(Source):
    """Another source, with the failures of a schedule.

    Args:
        inner: taken over: closed with this one.
        block: the RAM block whose data it is, for the schedule's ranges and its own random numbers.
        offset: of the block's first byte in the source.
    """

    def __init__(self, inner: Source, schedule: ChaosSchedule, block: str, offset: int) -> None:
        raw = ffi.new("struct qpc_chaos_schedule *")
        raw.seed = schedule.seed ^ zlib.crc32(block.encode()) << 20
        for kind in ("fail", "truncate", "delay", "stall"):
            # Rounded down, so that probabilities that add up to 1 still do.
            setattr(raw, kind, int(getattr(schedule, kind) * (1 << 32)))
        raw.error_count = len(schedule.errors)
        raw.errors[0 : len(schedule.errors)] = list(schedule.errors)
        raw.delay_us_first, raw.delay_us_last = schedule.delay_us
        if schedule.stall_ms is not None:
            raw.stall_us_first, raw.stall_us_last = (ms * 1000 for ms in schedule.stall_ms)
        raw.burst_first, raw.burst_last = schedule.burst
        raw.limit = schedule.limit
        ranges = [one for one in schedule.ranges if one.block == block]
        if schedule.ranges and not ranges:
            ranges = [BlockRange(block, 0, 0)]  # this block is not meant
        raw.range_count = len(ranges)
        for index, one in enumerate(ranges):
            raw.range_begin[index] = offset + one.begin
            raw.range_end[index] = offset + one.end
        error = new_error()
        handle = lib.qpc_source_open_chaos(inner.handle, raw, error)
        if handle == ffi.NULL:
            raise_error(error)
        inner.disown()
        super().__init__(handle)

    def enable(self, on: bool) -> None:
        """Turns the failures off (whoever is held up goes on) or on again."""
        lib.qpc_chaos_enable(self.handle, on)

    def release(self) -> None:
        """Reads that are held up go on."""
        lib.qpc_chaos_release(self.handle)

    def counts(self) -> ChaosCounts:
        """What was done so far."""
        raw = ffi.new("struct qpc_chaos_counts *")
        lib.qpc_chaos_read_counts(self.handle, raw)
        return ChaosCounts(*(int(getattr(raw, one.name)) for one in fields(ChaosCounts)))
