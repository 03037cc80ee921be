"""The final report of a migration: what it took, what the guest felt, as text and as JSON.

Figures are the engine's; what it has none of is None, with the reason in ``notes``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qemu_postcopy.migrate.engine import Observation, Statistics

#: QEMU counts blocked time only with its capability `postcopy-blocktime`, set before the migration
#: begins; libvirt (11.3) never sets it, and its monitor pass-through is closed during a migration.
NO_BLOCKTIME = (
    "blocked time per virtual CPU and latencies: QEMU counts them only when told before the "
    "migration begins, which libvirt does not do"
)


@dataclass
class Interruption:
    """A time without pages; in seconds of the driver's clock."""

    begun: float
    seconds: float | None = None
    attempts: int = 0

    def end(self, now: float) -> None:
        self.seconds = now - self.begun


@dataclass
class Report:
    """What is known of one migration; filled by the driver.

    Attributes:
        switch_reason: empty: it ended in pre-copy.
        stopped: seconds between the stop at the source and the start at the destination, as this
            process saw the daemons' events; None: not seen.
        seconds: how long each stage took.
    """

    domain: str
    engine: str
    switch_reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    interruptions: list[Interruption] = field(default_factory=list)
    passes: int = 0
    watched: float = 0.0
    stopped: float | None = None
    statistics: Statistics = field(default_factory=Statistics)
    notes: list[str] = field(default_factory=list)
    destination: str = ""

    def add_time(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def complete(self, statistics: Statistics, seen: Observation, watched: float) -> None:
        """Called once, when the guest is whole at the destination."""
        self.statistics = statistics
        self.passes = statistics.passes or seen.passes
        self.stopped = seen.stopped
        self.watched = watched
        for interruption in self.interruptions:
            if interruption.seconds is None:
                interruption.seconds = 0.0
        if not statistics.raw:
            self.notes.append("libvirt has kept no figures of this migration")
        self.notes.append(NO_BLOCKTIME)

    def as_json(self) -> dict[str, Any]:
        """Times in seconds unless their name says ms; sizes in bytes."""
        figures = self.statistics
        return {
            "domain": self.domain,
            "destination": self.destination,
            "engine": self.engine,
            "outcome": "completed",
            "mode": "post-copy" if self.used_postcopy else "pre-copy",
            "switch_reason": self.switch_reason or None,
            "total_seconds": round(figures.elapsed or self.watched, 3),
            "setup_ms": round(figures.setup * 1000),
            "downtime_ms": round(figures.downtime * 1000) if figures.raw else None,
            "stopped_ms": None if self.stopped is None else round(self.stopped * 1000, 1),
            "passes": self.passes,
            "memory_bytes": figures.total,
            "transferred_bytes": figures.transferred,
            "postcopy_requests": figures.requests,
            "stage_seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "interruptions": [
                {"seconds": round(one.seconds or 0.0, 3), "attempts": one.attempts}
                for one in self.interruptions
            ],
            "blocktime": None,
            "notes": self.notes,
        }

    @property
    def used_postcopy(self) -> bool:
        return any(name in self.seconds for name in ("post-copy", "interrupted", "recovering")) or (
            self.statistics.requests > 0
        )

    def as_text(self) -> str:
        """A few lines for an operator."""
        figures, result = self.statistics, self.as_json()
        lines = [
            f"{self.domain}: moved in {result['total_seconds']:.1f} s by {result['mode']}"
            + (f" ({self.switch_reason})" if self.switch_reason else ""),
            f"  {self.passes} passes, {figures.transferred >> 20} MiB sent for "
            f"{figures.total >> 20} MiB of memory, {figures.requests} pages asked for",
        ]
        if figures.raw:
            stopped = f"; {result['stopped_ms']:.0f} ms as seen from here" if self.stopped else ""
            lines.append(f"  the guest stood still for {result['downtime_ms']} ms{stopped}")
        for one in self.interruptions:
            lines.append(
                f"  interrupted for {one.seconds or 0.0:.1f} s, resumed at attempt {one.attempts}"
            )
        return "\n".join(lines)
