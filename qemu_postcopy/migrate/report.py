"""The final report of a migration: what it took, what the guest felt, as text and as JSON.

Figures are the engine's; what it has none of is None, with the reason in ``notes``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qemu_postcopy.migrate.engine import Blocktime, Observation, Statistics

#: QEMU counts only with its capability `postcopy-blocktime`, set at the destination before the
#: switch.  libvirt (9.0, 11.3) never sets it, and its monitor pass-through there is closed from the
#: start of that QEMU until the guest is whole (tests/libvirtd/test_migrate_blocktime.py).
NO_BLOCKTIME = (
    "blocked time per virtual CPU and latencies: QEMU counts them only when told at the "
    "destination before the switch, which libvirt neither does nor lets others do"
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
        started_over: how often a lost daemon had ended pre-copy, and it was begun anew.
        stopped: seconds between the stop at the source and the start at the destination, as this
            process saw the daemons' events; None: not seen.
        seconds: how long each stage took.
    """

    domain: str
    engine: str
    switch_reason: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    interruptions: list[Interruption] = field(default_factory=list)
    started_over: int = 0
    passes: int = 0
    watched: float = 0.0
    stopped: float | None = None
    statistics: Statistics = field(default_factory=Statistics)
    blocktime: Blocktime | None = None
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

    def note_blocktime(self, blocktime: Blocktime | None) -> None:
        """What the virtual CPUs waited, or why that is not known."""
        self.blocktime = blocktime
        if blocktime is None:
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
            "started_over": self.started_over,
            "blocktime": None if self.blocktime is None else asdict(self.blocktime),
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
        if self.blocktime is not None:
            waits = ", ".join(f"{number}: {ms}" for number, ms in enumerate(self.blocktime.cpu_ms))
            mean = self.blocktime.latency_ns
            lines.append(
                f"  virtual CPUs waited for pages, in ms: {waits}"
                + (f"; {mean / 1e6:.1f} ms for a page" if mean is not None else "")
            )
        if self.started_over:
            lines.append(f"  begun anew {self.started_over} times: a libvirtd had ended pre-copy")
        for one in self.interruptions:
            lines.append(
                f"  interrupted for {one.seconds or 0.0:.1f} s, resumed at attempt {one.attempts}"
            )
        return "\n".join(lines)
