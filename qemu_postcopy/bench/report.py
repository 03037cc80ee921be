"""What every bench reports: measured values, ratios between them, and the host they were taken on.

Pure data, a table and JSON.  The JSON is the same for all benches::

    {"bench": ..., "host": {...},
     "results": [{"name", "unit", "runs", "min", "median", "max"}, ...],
     "ratios": [{"name", "of", "to", "median"}, ...]}

A ratio is the median of the ratios of each round: both sides of one were measured within moments,
so a machine that slows down meanwhile changes it little.  No bench asserts anything about time.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Result:
    """One measured quantity; ``values`` in ``unit``, one per run."""

    name: str
    unit: str
    values: Sequence[float]

    def as_json(self) -> dict[str, Any]:
        """The entry of the report."""
        return {
            "name": self.name,
            "unit": self.unit,
            "runs": len(self.values),
            "min": min(self.values),
            "median": median(self.values),
            "max": max(self.values),
        }


@dataclass(frozen=True)
class Ratio:
    """``of`` divided by ``to``; ``values`` has one per round."""

    name: str
    of: str
    to: str
    values: Sequence[float]

    @classmethod
    def by_round(
        cls, name: str, of: str, to: str, above: Sequence[float], below: Sequence[float]
    ) -> Ratio:
        """From the values of both sides, in the order of the rounds."""
        return cls(name, of, to, [a / b for a, b in zip(above, below, strict=True)])

    def as_json(self) -> dict[str, Any]:
        """The entry of the report."""
        return {"name": self.name, "of": self.of, "to": self.to, "median": median(self.values)}


@dataclass
class Report:
    """What a bench found out.  ``notes`` are for the reader of the table only."""

    bench: str
    host: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The whole report, ready for json.dumps()."""
        return {
            "bench": self.bench,
            "host": self.host,
            "results": [result.as_json() for result in self.results],
            "ratios": [ratio.as_json() for ratio in self.ratios],
        }

    def print(self, console: Console) -> None:
        """Two tables and the notes."""
        from rich.table import Table

        console.print(
            ", ".join(f"{key}: {value}" for key, value in self.host.items()), markup=False
        )
        for note in self.notes:
            console.print(note, markup=False)
        results = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("measured", "unit"):
            results.add_column(heading, overflow="fold")
        for heading in ("runs", "min", "median", "max"):
            results.add_column(heading, justify="right", no_wrap=True)
        for result in self.results:
            row = result.as_json()
            numbers = [_number(row[key]) for key in ("min", "median", "max")]
            results.add_row(result.name, result.unit, str(row["runs"]), *numbers)
        console.print(results)
        if not self.ratios:
            return
        ratios = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("ratio", "of", "to"):
            ratios.add_column(heading, overflow="fold")
        ratios.add_column("median", justify="right", no_wrap=True)
        for ratio in self.ratios:
            ratios.add_row(ratio.name, ratio.of, ratio.to, f"{median(ratio.values):.3f}")
        console.print(ratios)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _read(path: str, found: Callable[[str], str]) -> str:
    """A fact from a file of the kernel's; "unknown" where this kernel does not tell."""
    try:
        return found(Path(path).read_text())
    except (OSError, IndexError, StopIteration):
        return "unknown"


def _field(name: str) -> Callable[[str], str]:
    def find(text: str) -> str:
        line = next(line for line in text.splitlines() if line.startswith(name))
        return line.split(":", 1)[1].strip()

    return find


def describe_host() -> dict[str, Any]:
    """What a figure depends on: processor, kernel, memory, huge pages, and how busy it is."""
    return {
        "cpu": _read("/proc/cpuinfo", _field("model name")),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "memory": _read("/proc/meminfo", _field("MemTotal")),
        "thp": _read(
            "/sys/kernel/mm/transparent_hugepage/enabled",
            lambda text: text.split("[")[1].split("]")[0],
        ),
        "load_average": os.getloadavg()[0],
    }
