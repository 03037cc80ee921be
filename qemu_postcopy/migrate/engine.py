"""What moves a guest, as the driver sees it: one protocol, so that others than QEMU's own can stand
behind the same command.

An engine is used by one task of one event loop.  It reports what is, also after its own daemon, or
the other host's, was away; it decides nothing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Protocol

from qemu_postcopy.errors import PostcopyError, StateError


class Phase(enum.StrEnum):
    """Where the guest and its memory are."""

    SETUP = "setup"  # asked for; nothing is copied yet
    PRECOPY = "pre-copy"  # it runs at the source
    POSTCOPY = "post-copy"  # it runs at the destination, without all of its memory
    INTERRUPTED = "interrupted"  # the same, but no page comes: what it misses it waits for
    COMPLETED = "completed"  # it is whole at the destination
    ENDED = "ended"  # no migration is under way; the guest is at the source
    UNREACHABLE = "unreachable"  # the source's daemon does not answer


@dataclass(frozen=True)
class Statistics:
    """Figures of a migration; 0 where the engine has none.

    Attributes:
        elapsed: seconds since it began.
        total, remaining, transferred: bytes of memory.
        rate: bytes per second; dirty_rate: bytes per second that the guest writes anew.
        passes: number of the pass under way.
        downtime: seconds that the guest stood still; before that an estimate.
        requests: pages that the destination has asked for.
        raw: the engine's own words.
    """

    elapsed: float = 0.0
    total: int = 0
    remaining: int = 0
    transferred: int = 0
    rate: int = 0
    dirty_rate: int = 0
    passes: int = 0
    downtime: float = 0.0
    setup: float = 0.0
    requests: int = 0
    raw: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """A look at a migration.

    Attributes:
        passes: number of the pass under way; more exact than the statistics.
        error: why it ended or was interrupted, or what cannot be reached.
        busy: a step that was asked for has not returned.
        stopped: seconds between the guest's stop at the source and its going on at the
            destination, as the hosts' daemons have told it; None: not seen.
        daemon_lost: the host, "source" or "destination", whose daemon went away since the
            begin; empty: neither, as far as is known.
    """

    phase: Phase
    passes: int = 0
    statistics: Statistics = Statistics()
    error: PostcopyError | None = None
    busy: bool = False
    stopped: float | None = None
    daemon_lost: str = ""


@dataclass(frozen=True)
class Blocktime:
    """For how long virtual CPUs waited for pages in post-copy, where that was counted.

    Attributes:
        all_ms: milliseconds for which all of them waited at once.
        cpu_ms: the same for each, by its number.
        latency_ns: mean latency of a page that was asked for; None: not counted (QEMU 10.1 does).
        cpu_latency_ns: the same for each virtual CPU.
        latency_distribution: number of pages by latency: entry N of those from 2^N to 2^(N+1) us.
    """

    all_ms: int
    cpu_ms: tuple[int, ...]
    latency_ns: int | None = None
    cpu_latency_ns: tuple[int, ...] = ()
    latency_distribution: tuple[int, ...] = ()


class Engine(Protocol):
    """Moves one guest."""

    name: str

    async def start(self) -> None:
        """Begins; returns at once, what becomes of it is observed."""

    async def can_start(self) -> bool:
        """Whether both daemons answer, and the guest is active at the source and nowhere else."""

    async def observe(self, timeout: float) -> Observation:
        """The next look: at the next event, or after ``timeout`` seconds.  Never raises for what is
        merely away."""

    async def switch(self) -> None:
        """Has the guest go on at the destination.

        Returns also where the answer was lost: it may have been heard.

        Raises:
            NotYetError: not possible yet, or no longer.
            PostcopyError: it never will be.
        """

    async def cancel(self) -> None:
        """Gives up; during pre-copy only: the guest runs on at the source."""

    async def pause(self) -> None:
        """Has a post-copy that no longer moves count as interrupted, so that it can be resumed."""

    async def resume(self) -> None:
        """Takes an interrupted post-copy up again; returns at once, like :meth:`start`."""

    async def completed_statistics(self) -> Statistics:
        """After COMPLETED: the figures of the whole."""

    async def blocktime(self) -> Blocktime | None:
        """After COMPLETED: what the virtual CPUs waited; None where nobody has counted it."""

    async def close(self) -> None:
        """Ends connections; never fails, and leaves a migration as it is."""


class NotYetError(StateError):
    """The moment for this step has not come; it may in a while."""

    retryable = True
