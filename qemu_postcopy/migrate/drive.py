"""The state machine of a migration: pre-copy passes, the switch, post-copy, and recovery.

Looks at the engine again and again (it waits for events in between), and takes the one step that
fits.  One task of one event loop; nothing else steers the engine meanwhile.  What it must never do:
end a guest, or give up a post-copy, for then the guest's memory is on two hosts.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from qemu_postcopy.errors import (
    GuestEndedError,
    LeftRunningError,
    LibvirtError,
    MigrationInterruptedError,
    MismatchError,
    OperationCancelledError,
    PostcopyError,
    StateError,
)
from qemu_postcopy.migrate.engine import Engine, NotYetError, Observation, Phase, Statistics
from qemu_postcopy.migrate.policy import Passes, Policy
from qemu_postcopy.migrate.report import Interruption, Report

#: How often the figures are looked at where no event comes first, in seconds.
INTERVAL = 0.5
#: Waits between attempts at recovery, in seconds; the last one repeats.
RETRIES = (1.0, 2.0, 5.0, 10.0)
#: So long an interruption is doubted that has figures, in seconds: libvirt speaks of one also where
#: it has lost the other host's daemon and QEMU goes on (seen with 9.0 and 11.3).
DOUBT_SECONDS = 5.0
#: How libvirt refuses a resume of what was not interrupted (qemuMigrationSrcResume).
STILL_RUNNING = "migration is still running"
#: A resume that has had no effect for so long is told, in seconds.
RESUME_SECONDS = 30.0


class Stage(enum.StrEnum):
    """Where a drive stands."""

    NEW = "new"
    SETUP = "setup"
    PRECOPY = "pre-copy"
    SWITCHING = "switching"
    POSTCOPY = "post-copy"
    INTERRUPTED = "interrupted"
    RECOVERING = "recovering"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    STARTING_OVER = "starting over"
    ENDED = "ended"


#: What may follow on what; a migration that is attached to enters where it is.
_ALL = frozenset(Stage)
NEXT: dict[Stage, frozenset[Stage]] = {
    Stage.NEW: _ALL - {Stage.NEW, Stage.CANCELLING, Stage.STARTING_OVER},
    Stage.SETUP: _ALL - {Stage.NEW, Stage.RECOVERING},
    Stage.PRECOPY: _ALL - {Stage.NEW, Stage.SETUP, Stage.RECOVERING},
    Stage.SWITCHING: _ALL - {Stage.NEW, Stage.SETUP, Stage.RECOVERING},
    Stage.CANCELLING: _ALL - {Stage.NEW, Stage.SETUP, Stage.PRECOPY, Stage.STARTING_OVER},
    # The guest runs at the source, no migration is under way: a new one begins.
    # Or a daemon that has just come back had not told yet what is.
    Stage.STARTING_OVER: _ALL - {Stage.NEW, Stage.SWITCHING, Stage.RECOVERING, Stage.CANCELLING},
    # From here on the guest is at the destination: back to pre-copy there is no way.
    Stage.POSTCOPY: frozenset({Stage.INTERRUPTED, Stage.COMPLETED, Stage.ENDED}),
    Stage.INTERRUPTED: frozenset({Stage.RECOVERING, Stage.POSTCOPY, Stage.COMPLETED, Stage.ENDED}),
    Stage.RECOVERING: frozenset({Stage.INTERRUPTED, Stage.POSTCOPY, Stage.COMPLETED, Stage.ENDED}),
    Stage.COMPLETED: frozenset(),
    Stage.ENDED: frozenset(),
}


@dataclass(frozen=True)
class DriveOptions:
    """What the driver may do.

    Attributes:
        policy: when to switch.
        begin: "start" a migration, "resume" an interrupted one, or "watch" what is under way.
        supervise: recover by itself, for as long as it takes; start over where a daemon that
            went away has ended pre-copy.
        stall: seconds without a page after which a post-copy counts as interrupted.
        unreachable: seconds for which the source's daemon may be away; no limit with supervise.
    """

    policy: Policy = field(default_factory=Policy)
    begin: str = "start"
    supervise: bool = False
    stall: float = 10.0
    unreachable: float = 120.0


@dataclass(frozen=True)
class News:
    """Told to the listener: a stage with its figures; ``text`` where there is something to say."""

    stage: Stage
    observation: Observation
    text: str = ""


@dataclass
class _Moving:
    """When the last page came, so that a post-copy that stands still is told from a slow one."""

    mark: tuple[int, int, int] = (0, 0, 0)
    since: float = field(default_factory=time.monotonic)
    elapsed: float = 0.0

    def still_for(self, statistics: Statistics) -> float:
        """Seconds without a page, by figures that are new; old ones say nothing."""
        if statistics.elapsed and statistics.elapsed == self.elapsed:
            return 0.0
        self.elapsed = statistics.elapsed
        mark = (statistics.remaining, statistics.transferred, statistics.requests)
        now = time.monotonic()
        if mark != self.mark:
            self.mark, self.since = mark, now
        return now - self.since


class Drive:
    """Drives one migration to its end.

    Args:
        domain: its name, for messages.
        listener: called in the event loop at each look.
    """

    def __init__(
        self,
        engine: Engine,
        domain: str,
        options: DriveOptions,
        listener: Callable[[News], None] = lambda news: None,
    ) -> None:
        self.engine = engine
        self.options = options
        self.stage = Stage.NEW
        self.report = Report(domain=domain, engine=engine.name)
        self._domain = domain
        self._listener = listener
        self._seen = Observation(Phase.SETUP)
        self._left: list[int] = []
        self._moving = _Moving()
        self._may_switch = True
        #: A switch was accepted, or may have been: nothing is aborted from now on.
        self._switched = False
        self._lost_sight = False
        #: Of an interruption that is doubted: the least bytes that were left, and since when.
        self._doubt: tuple[int, float] | None = None
        self._cancel = False
        self._attempts = 0
        self._next_attempt = 0.0
        self._resume_late = 0.0
        self._away_since: float | None = None
        self._since = time.monotonic()

    def request_cancel(self) -> None:
        """Ctrl-C: aborts during pre-copy; says why it cannot afterwards."""
        self._cancel = True

    async def run(self) -> Report:
        """Until the guest is whole at the destination.

        Raises:
            OperationCancelledError: it was aborted; the guest runs at the source.
            LeftRunningError: it was only watched, and goes on.
            MigrationInterruptedError: post-copy is interrupted and nobody is to recover it.
            PostcopyError: the migration failed; the guest runs at the source.
        """
        begun = time.monotonic()
        if self.options.begin == "start":
            await self.engine.start()
            self._enter(Stage.SETUP)
        while True:
            self._seen = await self.engine.observe(INTERVAL)
            self._note_pass()
            if await self._step():
                break
            self._tell()
        final = await self.engine.completed_statistics()
        self.report.complete(final, self._seen, time.monotonic() - begun)
        if self.report.used_postcopy:
            self.report.note_blocktime(await self.engine.blocktime())
        self._tell()
        return self.report

    # ---- one look ----

    async def _step(self) -> bool:
        """True when it is complete."""
        phase = self._seen.phase
        if phase is Phase.UNREACHABLE:
            self._bear_absence()
            return False
        self._away_since = None
        if phase is Phase.COMPLETED:
            self._enter(Stage.COMPLETED)
            return True
        if phase is Phase.ENDED:
            if not self._may_start_over():
                self._end()
            await self._start_over()
            return False
        if self.options.begin == "resume" and self.stage is Stage.NEW:
            self._begin_resume()
        if phase is Phase.INTERRUPTED and self._goes_on():
            self._say_no_to_cancel()
        elif phase is Phase.INTERRUPTED:
            await self._recover()
        elif phase is Phase.POSTCOPY:
            self._doubt, self._lost_sight = None, False
            await self._watch_postcopy()
        else:
            await self._watch_precopy(phase)
        return False

    def _bear_absence(self) -> None:
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            reason = self._seen.error.message if self._seen.error else ""
            before = self.stage in (Stage.SETUP, Stage.PRECOPY, Stage.STARTING_OVER)
            self._tell(
                "libvirt does not answer; "
                + ("the guest runs on at the source" if before else "QEMU goes on without it")
                + f" ({reason})"
            )
        elif not self.options.supervise and now - self._away_since > self.options.unreachable:
            raise MigrationInterruptedError(
                f"{self._domain}: libvirt has not answered for {self.options.unreachable:.0f} s",
                hint="QEMU goes on with the migration; start libvirtd on both hosts, then: "
                "qemu-postcopy migrate --watch",
            )
        if self._cancel:
            raise MigrationInterruptedError(
                f"no longer watching; what becomes of the migration of {self._domain} is not known",
                hint="QEMU goes on with it; look again: qemu-postcopy migrate --watch",
            )

    def _may_start_over(self) -> bool:
        """Whether it was a lost daemon that ended a pre-copy of ours, and all is to be repeated."""
        if self._cancel or not self.options.supervise or self.options.begin != "start":
            return False
        if isinstance(self._seen.error, GuestEndedError):
            return False
        return self.stage is Stage.STARTING_OVER or bool(
            self._seen.daemon_lost and self.stage in (Stage.SETUP, Stage.PRECOPY, Stage.SWITCHING)
        )

    async def _start_over(self) -> None:
        now = time.monotonic()
        if self.stage is not Stage.STARTING_OVER:
            self._enter(Stage.STARTING_OVER)
            self.report.started_over += 1
            self._tell(
                f"pre-copy ended because the {self._seen.daemon_lost}'s libvirtd went away; the "
                "guest runs at the source. Starting over"
            )
            self._attempts = 0
            self._next_attempt = now
        if now < self._next_attempt:
            return
        self._next_attempt = now + RETRIES[min(self._attempts, len(RETRIES) - 1)]
        self._attempts += 1
        if not await self.engine.can_start():
            return
        self._left.clear()
        self._may_switch, self._switched = True, False
        self.report.switch_reason = ""
        try:
            await self.engine.start()
        except LibvirtError as error:  # one of them has gone again
            self._tell(f"not yet: {error.message}")
            return
        self._attempts, self._next_attempt = 0, 0.0
        self._enter(Stage.SETUP)

    def _end(self) -> None:
        """No migration is under way, and the guest is not at the destination."""
        before = self.stage
        self._enter(Stage.ENDED)
        ended = isinstance(self._seen.error, GuestEndedError)
        if self._cancel and before is not Stage.NEW and not ended:
            raise OperationCancelledError(
                f"the migration of {self._domain} was aborted",
                hint="the guest runs on at the source, nothing is left at the destination",
            )
        lost = self._seen.daemon_lost
        if lost and before is not Stage.NEW and not ended:
            reason = f" ({self._seen.error.message})" if self._seen.error else ""
            raise LibvirtError(
                f"pre-copy of {self._domain} ended because the {lost}'s libvirtd went away{reason}",
                hint="nothing is lost: the guest runs on at the source. Start again when libvirtd "
                "runs on both hosts; --supervise does so by itself",
            )
        if self._seen.error is not None:
            raise explained(self._seen.error)
        if before is Stage.NEW:
            raise StateError(
                f"{self._domain} is not being migrated",
                hint="virsh domjobinfo says what libvirt does with it; to move it, leave --watch "
                "and --resume out",
            )
        raise StateError(
            f"the migration of {self._domain} ended before the guest had moved",
            hint="somebody aborted it, or libvirtd was restarted; the guest runs at the source: "
            "start again",
        )

    def _begin_resume(self) -> None:
        if self._seen.phase in (Phase.SETUP, Phase.PRECOPY):
            raise StateError(
                f"the migration of {self._domain} is in pre-copy: there is nothing to resume",
                hint="to watch and switch it: --watch",
            )

    async def _watch_precopy(self, phase: Phase) -> None:
        if self.stage not in (Stage.SWITCHING, Stage.CANCELLING):
            self._enter(Stage.PRECOPY if phase is Phase.PRECOPY else Stage.SETUP)
        if self._switched:
            # libvirt may still call it pre-copy: an abort now could let the guest run on both.
            self._say_no_to_cancel()
        elif self._cancel:
            await self._abort()
            return
        if not self._may_switch or self.stage is Stage.CANCELLING:
            return
        statistics = self._seen.statistics
        reason = self.report.switch_reason or self.options.policy.reason_to_switch(
            Passes(self._seen.passes, tuple(self._left), statistics.elapsed, statistics.dirty_rate)
        )
        if reason is None:
            return
        if self.stage is not Stage.SWITCHING:
            self.report.switch_reason = reason
            self._enter(Stage.SWITCHING)
            self._tell(f"switching to post-copy: {reason}")
        try:
            await self.engine.switch()
            self._switched = True
        except NotYetError:
            return  # asked again at the next look, while pre-copy lasts
        except PostcopyError as error:
            self._may_switch = False
            self.report.switch_reason = ""
            self._enter(Stage.PRECOPY)
            self._tell(f"it stays in pre-copy: {error.message}")

    async def _abort(self) -> None:
        if self.options.begin != "start":
            raise LeftRunningError(
                f"no longer watching; the migration of {self._domain} goes on",
                hint=f"virsh domjobabort {self._domain} aborts it",
            )
        if self.stage is not Stage.CANCELLING:
            self._enter(Stage.CANCELLING)
            self._tell("aborting; the guest runs on at the source")
        try:
            await self.engine.cancel()
        except PostcopyError as error:
            self._tell(f"not aborted yet: {error.message}")

    async def _watch_postcopy(self) -> None:
        if self.stage in (Stage.INTERRUPTED, Stage.RECOVERING):
            self.report.interruptions[-1].end(time.monotonic())
            self._attempts = 0
            self._tell("post-copy goes on")
        if self.stage is not Stage.POSTCOPY:
            self._moving = _Moving()
            self._enter(Stage.POSTCOPY)
        self._say_no_to_cancel()
        still = self._moving.still_for(self._seen.statistics)
        if still > self.options.stall and self._seen.statistics.total:
            self._moving.since = time.monotonic()
            self._tell(f"no page has come for {still:.0f} s: is the network between the hosts up?")
            if self.options.supervise:
                try:
                    await self.engine.pause()
                except PostcopyError as error:
                    self._tell(error.message)

    def _say_no_to_cancel(self) -> None:
        if not self._cancel:
            return
        self._cancel = False
        if self.options.begin == "watch" and not self.options.supervise:
            raise LeftRunningError(
                f"no longer watching; the migration of {self._domain} goes on",
                hint="qemu-postcopy migrate --watch looks at it again",
            )
        self._tell(
            "post-copy cannot be aborted: the guest goes on, or already runs, at the destination. "
            "Going on"
        )

    def _goes_on(self) -> bool:
        """Whether pages come, or may come, although libvirt takes it for interrupted."""
        figures, now = self._seen.statistics, time.monotonic()
        before = self._doubt
        if self._seen.busy or (before is None and not figures.total):
            return False
        # libvirt has no figures of a job that is just ending.
        if before is None or (figures.total and figures.remaining < before[0]):
            self._doubt = (figures.remaining, now)
            if before is None:
                self._tell("libvirt takes it for interrupted; looking whether pages come")
                return True
            if self.stage in (Stage.INTERRUPTED, Stage.RECOVERING):
                self.report.interruptions[-1].end(now)
            self._attempts = 0
            self._enter(Stage.POSTCOPY)
            if not self._lost_sight:
                self._lost_sight = True
                self._tell("libvirt has lost sight of it, and QEMU goes on: pages come")
            return True
        return now - before[1] < DOUBT_SECONDS

    async def _recover(self) -> None:
        now = time.monotonic()
        if self.stage is not Stage.RECOVERING or not self._seen.busy:
            if self.stage not in (Stage.INTERRUPTED, Stage.RECOVERING):
                self.report.interruptions.append(Interruption(now))
                reason = self._seen.error.message if self._seen.error else "no reason given"
                self._enter(Stage.INTERRUPTED)
                self._tell(f"post-copy is interrupted, the guest waits for its pages: {reason}")
            elif self.stage is Stage.RECOVERING:
                self._enter(Stage.INTERRUPTED)
                if self._seen.error is not None:
                    self._tell(f"not resumed yet: {self._seen.error.message}")
        self._say_no_to_cancel()
        if self._seen.busy and self.stage is Stage.RECOVERING and now > self._resume_late:
            self._resume_late = now + RESUME_SECONDS
            self._tell(
                "the resume does not begin: is the network up? If so, the destination's QEMU does "
                "not answer libvirt, because a thread that holds its lock waits for a page"
            )
        if self._seen.busy or now < self._next_attempt:
            return
        error = self._seen.error
        still = error is not None and STILL_RUNNING in error.message
        resuming = self.options.begin == "resume" and (self._attempts == 0 or still)
        if not self.options.supervise and not resuming:
            raise self._interrupted()
        self._next_attempt = now + RETRIES[min(self._attempts, len(RETRIES) - 1)]
        self._attempts += 1
        try:
            await self.engine.resume()
        except MismatchError:
            raise
        except PostcopyError as error:
            self._tell(f"not resumed yet: {error.message}")
            if not self.options.supervise:
                raise
        else:
            self.report.interruptions[-1].attempts += 1
            self._resume_late = now + RESUME_SECONDS
            self._enter(Stage.RECOVERING)
            self._tell("resuming")

    def _interrupted(self) -> MigrationInterruptedError:
        reason = f": {self._seen.error.message}" if self._seen.error else ""
        return MigrationInterruptedError(
            f"post-copy of {self._domain} is interrupted{reason}",
            hint="nothing is lost: the guest waits at the destination for pages of the source. "
            "If only libvirtd was restarted, QEMU may go on and libvirt end it by itself: "
            "qemu-postcopy migrate --watch. Else leave both QEMUs alone, mend what broke, then "
            "run the same command with --resume",
        )

    # ---- bookkeeping ----

    def _note_pass(self) -> None:
        """What a pass began with, as near to its begin as we look."""
        statistics, passes = self._seen.statistics, self._seen.passes
        if self._seen.phase is not Phase.PRECOPY or not statistics.total:
            return
        if not self._left:
            self._left.append(statistics.total)
        # A pass that nobody looked at in time counts as the one before it.
        while len(self._left) < passes:
            self._left.append(statistics.remaining)

    def _enter(self, stage: Stage) -> None:
        if stage is self.stage:
            return
        if stage not in NEXT[self.stage]:
            raise StateError(
                f"{self._domain} went from {self.stage} to {stage}, which cannot be",
                hint="virsh domstate --reason on both hosts says what is the case",
            )
        now = time.monotonic()
        self.report.add_time(self.stage, now - self._since)
        self._since = now
        self.stage = stage

    def _tell(self, text: str = "") -> None:
        self._listener(News(self.stage, self._seen, text))


def explained(error: PostcopyError) -> PostcopyError:
    """The same error with the advice that fits the words that QEMU and libvirt have for it."""
    advice = {
        "Postcopy is not supported": "the destination's QEMU may not open a userfaultfd: sysctl "
        "vm.unprivileged_userfaultfd=1 there, or a QEMU from 8.2 on with access to "
        "/dev/userfaultfd",
        "ostcopy is not yet compatible with multifd": "leave --multifd out; QEMU 10.1 has both",
        "Unsafe migration": "disks must be shared with cache=none or directsync, or on a "
        "file system that is coherent between hosts; --unsafe is at your own risk",
    }
    for words, hint in advice.items():
        if words in error.message:
            error.hint = hint
    return error
