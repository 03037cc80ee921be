"""QEMU's own migration, by libvirt: peer to peer, so that it goes on when this process dies, unless
the operator wants it otherwise.

One call of virDomainMigrateToURI3 lasts as long as the migration does; it runs in a thread, and
libvirt's events tell of passes and of the switch.  What is the case is asked of libvirt each time
(libvirt's virDomainState and its reasons), never remembered, because a daemon may have been
restarted meanwhile.  Rests on libvirt's migration API and docs/migration.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from typing import Any

from qemu_postcopy.errors import GuestEndedError, LibvirtError, MismatchError, PostcopyError
from qemu_postcopy.libvirt import domain_xml
from qemu_postcopy.libvirt.connection import Connection, load, ssh_trial
from qemu_postcopy.libvirt.monitor import LibvirtMonitor
from qemu_postcopy.migrate.engine import Blocktime, NotYetError, Observation, Phase, Statistics
from qemu_postcopy.migrate.native_terms import (
    CRASHES_ON_RESUME,
    NativeOptions,
    blocktime_of,
    mebibytes,
    statistics_of,
)

EVENTS = ("LIFECYCLE", "MIGRATION_ITERATION", "JOB_COMPLETED")
#: virDomainJobOperation: MIGRATION_OUT
OUTGOING = 5
#: What the figures of a migration under way say of it (virDomainJobType: UNBOUNDED).
UNDER_WAY = {"operation": OUTGOING, "type": 2}
AFTER_SWITCH = (Phase.POSTCOPY, Phase.INTERRUPTED)
#: How long the destination's QEMU may take to say what it has counted, in seconds.
FIGURES_TIMEOUT = 10.0
#: How long figures are waited for, in seconds.
FIGURES_SECONDS = 0.3
#: How long a daemon that went away is given before the next try, in seconds.
RECONNECT_SECONDS = 0.5


class NativeEngine:
    """Moves one domain by libvirt.

    Args:
        source: connected; owned from now on.
        uuid: the domain's.
        destination: URI as the source's daemon reaches it; also used from here, to see what the
            destination says.  Empty: not known, of a migration that is only watched.
    """

    name = "native"

    def __init__(
        self, source: Connection, uuid: str, destination: str, options: NativeOptions
    ) -> None:
        self._source: Connection | None = source
        self._uri = source.uri
        self._uuid = uuid
        self._destination_uri = destination
        self._options = options
        self._destination: Connection | None = None
        #: virDomain of the source's connection
        self._domain: Any = None
        self._subscriptions: dict[str, AsyncExitStack] = {}
        self._queue: asyncio.Queue[tuple[str, str, tuple[Any, ...], float]] = asyncio.Queue()
        self._call: asyncio.Task[Any] | None = None
        self._error: PostcopyError | None = None
        self._passes = 0
        self._final: Statistics | None = None
        self._succeeded = False
        self._limit_anew = False
        self._last_phase = Phase.SETUP
        self._asking: asyncio.Task[Any] | None = None
        self._figures_before = Statistics(raw=dict(UNDER_WAY))
        self._stopped_at: float | None = None
        self._resumed_at: float | None = None
        self._daemon_lost = ""

    # ---- the steps ----

    async def start(self) -> None:
        # Of an earlier try nothing is left but what is asked of libvirt anew.
        self._passes, self._final, self._last_phase = 0, None, Phase.SETUP
        self._stopped_at = self._resumed_at = None
        self._daemon_lost = ""
        await self._listen_to_source()
        self._begin(0)

    async def can_start(self) -> bool:
        libvirt = load()
        try:
            connection, domain = await self._reach_domain()
            if not await connection.call("no state", domain.isActive):
                return False
        except LibvirtError:
            return False
        destination = await self._reach_destination()
        if destination is None:
            return False
        try:
            there = await destination.domain(self._uuid)
            return not await destination.call("no state", there.isActive)
        except LibvirtError as error:
            return bool(error.code == libvirt.VIR_ERR_NO_DOMAIN)

    async def resume(self) -> None:
        await self._refuse_a_crash()
        self._limit_anew = True
        self._begin(load().VIR_MIGRATE_POSTCOPY_RESUME)

    def _begin(self, extra_flags: int) -> None:
        """The call that lasts; its end wakes :meth:`observe`."""
        self._error = None

        async def move() -> None:
            connection, domain = await self._reach_domain()
            what = "it cannot be resumed" if extra_flags else "the migration failed"
            parameters, flags = self._options.parameters(), self._options.flags() | extra_flags
            if self._options.direct:
                target = await self._reach_destination()
                if target is None:
                    raise self._destination_away()
                await connection.call(what, domain.migrate3, target.handle, parameters, flags)
                return
            try:
                await connection.call(
                    what, domain.migrateToURI3, self._destination_uri, parameters, flags
                )
            except LibvirtError as error:
                raise await self._of_peers(error, connection) from error

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                error = task.exception()
                self._error = error if isinstance(error, PostcopyError) else None
                self._succeeded = error is None
            self._queue.put_nowait(("call", "", (), time.monotonic()))

        self._call = asyncio.ensure_future(move())
        self._call.add_done_callback(ended)

    async def _of_peers(self, error: LibvirtError, source: Connection) -> LibvirtError:
        """With what to do where the source's daemon, and not this process, cannot connect.

        libvirt tells it as an error of a connection (VIR_FROM_RPC), or with its own words and the
        URI in them (qemuMigrationSrcPerformPeer2Peer).
        """
        libvirt, cause = load(), error.__cause__
        told = f"remote libvirt URI {self._destination_uri}" in error.message or (
            isinstance(cause, libvirt.libvirtError)
            and cause.get_error_domain() == libvirt.VIR_FROM_RPC
            and not self._passes
            and await asyncio.to_thread(_alive, source.handle)
        )
        if not told:
            return error
        trial = ssh_trial(self._destination_uri)
        return LibvirtError(
            error.message,
            code=error.code,
            hint="it is the source's libvirtd that connects, as root at its host, whoever runs "
            "this. "
            + (f"There, as root, this must work: {trial}. " if trial else "")
            + "Or use --direct, which needs no way from one daemon to the other",
        )

    def _destination_away(self) -> LibvirtError:
        return LibvirtError(
            f"the destination's libvirt cannot be reached: {self._destination_uri}",
            hint="run this again when it answers, with --resume where virsh domstate --reason says "
            "that post-copy has failed: the guest waits there",
        )

    async def switch(self) -> None:
        libvirt = load()
        try:
            await self._of_domain("the switch to post-copy is refused", "migrateStartPostCopy", 0)
        except LibvirtError as error:
            if self._source is None or not await asyncio.to_thread(_alive, self._source.handle):
                return  # the daemon went away meanwhile
            # The flag's name is in libvirt's words in every language.
            if "VIR_MIGRATE_POSTCOPY" in error.message or error.code not in (
                libvirt.VIR_ERR_OPERATION_INVALID,
                libvirt.VIR_ERR_OPERATION_TIMEOUT,
                libvirt.VIR_ERR_INTERNAL_ERROR,
            ):
                raise
            raise NotYetError(error.message, hint=error.hint) from error

    async def cancel(self) -> None:
        await self._of_domain("it cannot be aborted", "abortJob")

    async def pause(self) -> None:
        flag = load().VIR_DOMAIN_ABORT_JOB_POSTCOPY
        await self._of_domain("it cannot be paused", "abortJobFlags", flag)

    async def _limit_postcopy(self) -> None:
        """Sets the bandwidth of post-copy: libvirt does so at a start, not at a resume."""
        if self._options.postcopy_bandwidth:
            await self._of_domain(
                "the bandwidth of post-copy cannot be set",
                "migrateSetMaxSpeed",
                mebibytes(self._options.postcopy_bandwidth),
                load().VIR_DOMAIN_MIGRATE_MAX_SPEED_POSTCOPY,
            )

    async def _of_domain(self, what: str, method: str, *arguments: Any) -> Any:
        connection, domain = await self._reach_domain()
        return await connection.call(what, getattr(domain, method), *arguments)

    async def _refuse_a_crash(self) -> None:
        connection = await self._reach_destination()
        if connection is None:
            raise self._destination_away()
        version = int(await connection.call("no answer", connection.handle.getLibVersion))
        first, last = CRASHES_ON_RESUME
        if first <= version <= last:
            raise MismatchError(
                f"the destination's libvirt {version // 1_000_000}.{version // 1000 % 1000} ends "
                "by a fault of its own whenever a post-copy is resumed",
                hint="nothing is lost: the guest waits for its pages. Install a libvirt newer than "
                "11.3 at the destination (its guests run on while the daemon is restarted), then "
                "run this again with --resume",
            )

    # ---- connections ----

    async def _reach_source(self) -> Connection:
        if self._source is None:
            self._source = await Connection.open(self._uri)
        return self._source

    async def _reach_domain(self) -> tuple[Connection, Any]:
        connection = await self._reach_source()
        if self._domain is None:
            self._domain = await connection.domain(self._uuid)
        return connection, self._domain

    async def _reach_destination(self) -> Connection | None:
        """A live connection to the destination, or None."""
        if not self._destination_uri:
            return None
        if self._destination is not None:
            if await asyncio.to_thread(_alive, self._destination.handle):
                return self._destination
            await self._drop("destination")
        try:
            self._destination = await Connection.open(self._destination_uri)
        except LibvirtError:
            return None
        return self._destination

    async def _drop(self, side: str) -> None:
        """Forgets a connection that is dead."""
        stack = self._subscriptions.pop(side, None)
        if stack is not None:
            with contextlib.suppress(PostcopyError):
                await stack.aclose()
        connection = self._source if side == "source" else self._destination
        if side == "source":
            self._source = self._domain = None
            if self._asking is not None:
                self._asking.add_done_callback(lambda task: task.exception())  # nobody asks
                self._asking = None
        else:
            self._destination = None
        if connection is not None:
            await connection.close()

    async def _subscribe(self, side: str, connection: Connection, *kinds: str) -> None:
        if side in self._subscriptions:
            return
        domain = await connection.domain(self._uuid)
        stack = AsyncExitStack()
        events = await stack.enter_async_context(connection.events(domain, *kinds))

        async def pump() -> None:
            while True:
                kind, details = await events.get()
                self._queue.put_nowait((kind, side, details, time.monotonic()))

        task = asyncio.ensure_future(pump())
        stack.callback(task.cancel)
        self._subscriptions[side] = stack

    async def _listen_to_source(self) -> Connection:
        connection = await self._reach_source()
        await self._subscribe("source", connection, *EVENTS)
        return connection

    # ---- what is the case ----

    async def observe(self, timeout: float) -> Observation:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                self._take(await self._queue.get())
        while not self._queue.empty():
            self._take(self._queue.get_nowait())
        if self._succeeded:
            return self._observation(Phase.COMPLETED, Statistics())
        try:
            connection = self._source or await self._reach_source()
            if not await asyncio.to_thread(_alive, connection.handle):
                raise LibvirtError("the connection has ended")
            return await self._look(connection)
        except LibvirtError as error:
            libvirt = load()
            if error.code == libvirt.VIR_ERR_NO_DOMAIN:
                return await self._gone_from_source()
            await self._drop("source")
            self._daemon_lost = "source"
            await asyncio.sleep(min(timeout, RECONNECT_SECONDS))
            return self._observation(Phase.UNREACHABLE, Statistics(), error)

    def _take(self, event: tuple[str, str, tuple[Any, ...], float]) -> None:
        libvirt = load()
        kind, side, details, when = event
        if kind == "MIGRATION_ITERATION":
            self._passes = int(details[0])
        elif kind == "JOB_COMPLETED":
            self._final = statistics_of(details[0])
        elif kind == "LIFECYCLE":
            if side == "source" and details[0] == libvirt.VIR_DOMAIN_EVENT_SUSPENDED:
                self._stopped_at = self._stopped_at or when
            if side == "destination" and details[0] == libvirt.VIR_DOMAIN_EVENT_RESUMED:
                self._resumed_at = self._resumed_at or when

    def _observation(
        self, phase: Phase, statistics: Statistics, error: PostcopyError | None = None
    ) -> Observation:
        stopped = None
        if self._stopped_at is not None and self._resumed_at is not None:
            stopped = max(0.0, self._resumed_at - self._stopped_at)
        busy = self._call is not None and not self._call.done()
        passes = max(self._passes, statistics.passes)
        if phase is not Phase.UNREACHABLE:
            self._last_phase = phase
        return Observation(
            phase, passes, statistics, error or self._error, busy, stopped, self._daemon_lost
        )

    async def _look(self, connection: Connection) -> Observation:
        await self._listen_to_source()
        _, domain = await self._reach_domain()
        state, reason = await connection.call("no state", domain.state)
        statistics = await self._figures(connection, domain)
        phase = self._phase(state, reason, statistics)
        if phase is Phase.COMPLETED:  # shut off: moved away, or ended
            return await self._gone_from_source()
        if phase is Phase.PRECOPY:
            await self._listen_to_destination()
        if phase is Phase.ENDED and self._error is not None and not self._daemon_lost:
            await self._ask_destination()
        if phase is Phase.POSTCOPY and self._limit_anew:
            self._limit_anew = False
            await self._limit_postcopy()
        if phase is Phase.INTERRUPTED and await self._ended_at_destination():
            return self._observation(
                Phase.ENDED,
                statistics,
                GuestEndedError(
                    "the guest has ended at the destination, where it ran since the switch",
                    hint="QEMU's log there (/var/log/libvirt/qemu) says why; what is left at the "
                    "source is its memory before the switch: look into it, or virsh destroy it",
                ),
            )
        return self._observation(phase, statistics)

    async def _figures(self, connection: Connection, domain: Any) -> Statistics:
        """The newest ones; those before where QEMU takes its time to answer.

        QEMU 7.2 under TCG has taken seconds for it in pre-copy: no switch is to wait for that.
        """
        if self._asking is None:
            self._asking = asyncio.ensure_future(connection.call("no figures", domain.jobStats))
        done, _ = await asyncio.wait({self._asking}, timeout=FIGURES_SECONDS)
        if done:
            asked, self._asking = self._asking, None
            try:
                self._figures_before = statistics_of(asked.result())
            except LibvirtError:  # of a job that is just ending
                self._figures_before = Statistics(raw=dict(UNDER_WAY))
        return self._figures_before

    async def _ended_at_destination(self) -> bool:
        """Whether a destination that answers has it no more."""
        libvirt = load()
        connection = await self._reach_destination()
        if connection is None:
            return False
        try:
            domain = await connection.domain(self._uuid)
            return not await connection.call("no state", domain.isActive)
        except LibvirtError as error:
            return bool(error.code == libvirt.VIR_ERR_NO_DOMAIN)

    def _phase(self, state: int, reason: int, statistics: Statistics) -> Phase:
        libvirt = load()
        calling = self._call is not None and not self._call.done()
        if state == libvirt.VIR_DOMAIN_PAUSED:
            if reason == libvirt.VIR_DOMAIN_PAUSED_POSTCOPY:
                return Phase.POSTCOPY
            if reason == libvirt.VIR_DOMAIN_PAUSED_POSTCOPY_FAILED:
                return Phase.INTERRUPTED
        if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
            return Phase.COMPLETED
        if state != libvirt.VIR_DOMAIN_RUNNING and self._last_phase in AFTER_SWITCH:
            return Phase.POSTCOPY  # libvirt is ending it, and has another reason or state meanwhile
        if (state, reason) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_MIGRATION):
            return Phase.PRECOPY  # the last of it
        outgoing = statistics.raw.get("operation") == OUTGOING and statistics.raw.get("type")
        if outgoing or (calling and self._last_phase is Phase.PRECOPY):
            return Phase.PRECOPY if max(self._passes, statistics.passes) else Phase.SETUP
        return Phase.SETUP if calling else Phase.ENDED

    async def _listen_to_destination(self) -> None:
        """For the moment at which the guest goes on there; it is no loss if that fails."""
        if "destination" in self._subscriptions:
            return
        connection = await self._reach_destination()
        if connection is not None:
            with contextlib.suppress(LibvirtError):
                await self._subscribe("destination", connection, "LIFECYCLE")

    async def _ask_destination(self) -> None:
        """Whether the daemon there is the one that was connected to in pre-copy."""
        if self._destination is None:
            return
        try:
            await self._destination.call("no answer", self._destination.handle.getLibVersion)
        except LibvirtError:
            self._daemon_lost = "destination"

    async def _gone_from_source(self) -> Observation:
        """The source has it no more: the destination says whether it arrived."""
        libvirt = load()
        if self._call is not None and not self._call.done():
            # The last things are done: its return is what counts.
            return self._observation(self._last_phase, Statistics())
        connection = await self._reach_destination()
        if connection is None:
            return await self._gone_unseen()
        try:
            domain = await connection.domain(self._uuid)
            state, reason = await connection.call("no state", domain.state)
        except LibvirtError as error:
            if error.code != libvirt.VIR_ERR_NO_DOMAIN:
                return self._observation(Phase.UNREACHABLE, Statistics(), error)
            return self._observation(
                Phase.ENDED,
                Statistics(),
                self._error
                or LibvirtError(
                    "the domain runs at neither host: it has ended by itself",
                    hint="see QEMU's log on both hosts: /var/log/libvirt/qemu",
                ),
            )
        if state in (libvirt.VIR_DOMAIN_SHUTOFF, libvirt.VIR_DOMAIN_CRASHED):
            return self._observation(
                Phase.ENDED,
                Statistics(),
                self._error
                or GuestEndedError(
                    "the domain is shut off at both hosts: it has ended, at one or the other",
                    hint="see QEMU's log on both hosts: /var/log/libvirt/qemu",
                ),
            )
        if state == libvirt.VIR_DOMAIN_RUNNING and reason in (
            libvirt.VIR_DOMAIN_RUNNING_POSTCOPY,
            libvirt.VIR_DOMAIN_RUNNING_POSTCOPY_FAILED,
        ):
            return self._observation(Phase.POSTCOPY, Statistics())
        return self._observation(Phase.COMPLETED, Statistics())

    async def _gone_unseen(self) -> Observation:
        """The source has it no more, and nobody can be asked for it."""
        if self._destination_uri:
            error = LibvirtError(
                "the domain has left the source, and the destination is not reached",
                hint="see virsh list there; its libvirtd may be away",
            )
            return self._observation(Phase.UNREACHABLE, Statistics(), error)
        await self._wait_final()
        if self._final is not None:
            return self._observation(Phase.COMPLETED, Statistics())
        error = LibvirtError(
            "the domain has left the source; whether it arrived is not known without DESTURI",
            hint="give it: qemu-postcopy migrate --watch DOMAIN qemu+ssh://HOST/system",
        )
        return self._observation(Phase.ENDED, Statistics(), error)

    async def _wait_final(self) -> None:
        """For the event of a job's end, a second at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                while self._final is None:
                    self._take(await self._queue.get())

    async def completed_statistics(self) -> Statistics:
        """libvirt's figures of the completed job: from its event, or from the destination."""
        await self._wait_final()
        if self._final is not None:
            return self._final
        connection = await self._reach_destination()
        if connection is not None:
            flag = load().VIR_DOMAIN_JOB_STATS_COMPLETED
            with contextlib.suppress(LibvirtError):
                domain = await connection.domain(self._uuid)
                return statistics_of(await connection.call("none", domain.jobStats, flag))
        return Statistics()

    async def blocktime(self) -> Blocktime | None:
        """Of a domain with arguments of its own to QEMU: only such a one can have had QEMU count.

        Others are not asked: libvirt marks a domain as tainted whose monitor is used.
        """
        connection = await self._reach_destination()
        if connection is None:
            return None
        try:
            domain = await connection.domain(self._uuid)
            xml = domain_xml.parse(await connection.call("no XML", domain.XMLDesc, 0))
            if xml.find(domain_xml.ARGUMENTS) is None:
                return None
            monitor = LibvirtMonitor(connection, domain, owns_connection=False)
            return blocktime_of(await monitor.execute("query-migrate", timeout=FIGURES_TIMEOUT))
        except PostcopyError:
            return None

    async def close(self) -> None:
        for side in ("source", "destination"):
            await self._drop(side)


def _alive(handle: Any) -> bool:
    libvirt = load()
    try:
        return bool(handle.isAlive())
    except libvirt.libvirtError:
        return False
