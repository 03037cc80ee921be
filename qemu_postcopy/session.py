"""One guest under the pager: the state machine that owns the order of the control flow.

    launch or find QEMU -> attach -> serve -> load the device state -> run -> complete -> detach

Each step checks the state it starts from; a step in the wrong state is refused with both states
named.  What can be checked is checked before anything is changed, and everything is registered and
served before a byte of device state loads, because loading touches guest memory.  A failure before
the device state is loaded costs nothing but the empty QEMU; after that the session never
unregisters memory whose data is missing: whatever happens to it, the guest waits.

All methods are coroutines of one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_postcopy.errors import (
    AttachError,
    GuestEndedError,
    HostError,
    ImageError,
    LaunchError,
    MismatchError,
    PostcopyError,
    QmpError,
    SidecarError,
    StateError,
    UsageError,
)
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord, boot_id

if TYPE_CHECKING:
    from qemu_postcopy.accounts import Accounts
    from qemu_postcopy.image.image import Image
    from qemu_postcopy.paging.chaos import ChaosSchedule, ChaosSource
    from qemu_postcopy.paging.lease import Lease
    from qemu_postcopy.paging.ledger import Ledger
    from qemu_postcopy.paging.pager import Pager, PagerBlock, Statistics
    from qemu_postcopy.paging.prefetch import WorkingSet
    from qemu_postcopy.paging.source import Source
    from qemu_postcopy.plugged import Held
    from qemu_postcopy.vm.attach import TakenDescriptor
    from qemu_postcopy.vm.launch import QemuProcess
    from qemu_postcopy.vm.layout import RamBlock
    from qemu_postcopy.vm.monitor import Monitor
    from qemu_postcopy.vm.process import ProcessIdentity
    from qemu_postcopy.vm.ways import WayChoice

log = logging.getLogger(__name__)


class State(StrEnum):
    """Where a session stands."""

    NEW = "new"
    LISTENING = "listening"  # of `serve`: no VMM has handed over yet, so there is no session either
    FOUND = "found"  # QEMU waits for a migration, its monitor answers, it fits the image
    ATTACHED = "attached"  # its userfaultfd is ours, its RAM is known and empty
    SERVING = "serving"  # RAM is registered, the pager answers
    LOADED = "loaded"  # the device state is in: from now on there is a guest to lose
    RUNNING = "running"
    COMPLETE = "complete"  # every page with data is present
    DETACHED = "detached"  # RAM is the kernel's again; the guest never knew
    FAILED = "failed"  # before LOADED only
    GONE = "gone"  # QEMU has ended


#: From which states each state can be entered.
ENTRANCES: dict[State, frozenset[State]] = {
    State.LISTENING: frozenset({State.NEW}),
    State.FOUND: frozenset({State.NEW, State.LISTENING}),
    State.ATTACHED: frozenset({State.FOUND}),
    State.SERVING: frozenset({State.ATTACHED, State.NEW}),  # NEW: taken over from a dead sidecar
    State.LOADED: frozenset({State.SERVING}),
    State.RUNNING: frozenset({State.LOADED}),
    State.COMPLETE: frozenset({State.LOADED, State.RUNNING}),
    State.DETACHED: frozenset({State.COMPLETE}),
    State.FAILED: frozenset({State.NEW, State.FOUND, State.ATTACHED, State.SERVING}),
    State.GONE: frozenset({State.SERVING, State.LOADED, State.RUNNING, State.COMPLETE}),
}

#: How long a guest runs before its first faults are noted.
WORKING_SET_SECONDS = 1.0
#: How often it is looked whether the run directory is still there.
DIRECTORY_SECONDS = 3.0
#: How long a taken-over guest's monitor may take to answer; an operator may be using it.
MONITOR_SECONDS = 1.0
#: How often, and how long apart, it is tried to let go of memory that QEMU is unmapping.
UNMAP_ATTEMPTS = 20
UNMAP_SECONDS = 0.01
#: States in which there is a guest to lose.
GUEST_STATES = (State.LOADED, State.RUNNING, State.COMPLETE)
#: States that ``session.json`` is written in; the sidecar itself tells of the others.
RECORDED = frozenset({State.SERVING, State.RUNNING, State.DETACHED, State.FAILED, State.GONE})


@dataclass(frozen=True)
class SessionOptions:
    """How a guest is served.

    ``chunk_size`` in bytes (None: the image's own, else the default), ``background_rate`` in bytes
    per second (0: no limit), ``spin_limit_us`` None for the default.
    """

    chunk_size: int | None = None
    background: bool = True
    background_rate: int = 0
    spin_limit_us: int | None = None
    allow_newer_qemu: bool = False
    #: how a QEMU that this session launches is got at: see :mod:`qemu_postcopy.vm.ways`
    attach_by: WayChoice = "auto"
    #: note what the guest wants first, and fill that ahead at later restores of the image; only
    #: while the background fills without a limit and no chunk size is asked for
    working_set: bool = True
    #: give CAP_SYS_PTRACE up, for the whole process and for good, once it is not needed any more
    drop_rights: bool = False
    #: file that every fault is recorded in; there must be none yet
    trace: Path | None = None
    #: the guest stays stopped after its state is loaded (kept for whoever takes over)
    paused: bool = False
    #: serve on when all memory is there, until the guest ends: it may still give memory back
    stay: bool = False
    #: page data fails as this says
    chaos: ChaosSchedule | None = None

    def uses_working_set(self) -> bool:
        """Whether pages may be filled ahead, and faults noted."""
        return (
            self.working_set
            and self.background
            and not self.background_rate
            and self.chunk_size is None
        )

    def __post_init__(self) -> None:
        """Raises UsageError for a chunk size or rate that cannot be."""
        chunk = self.chunk_size
        if chunk is not None and not (4096 <= chunk <= 2 << 20 and chunk & (chunk - 1) == 0):
            raise UsageError(
                f"a chunk of {chunk} bytes cannot be",
                hint="a power of two from 4K to 2M",
            )
        if self.background_rate < 0:
            raise UsageError("a rate cannot be negative", hint="0 is no limit")


@dataclass(frozen=True)
class StateChange:
    """Told to the listener at each step; ``elapsed`` in seconds since the session was made.

    With ``failure`` it is no step: something went wrong while there is a guest, which is served on.
    """

    state: State
    elapsed: float
    failure: PostcopyError | None = None


class Session:
    """Serves one guest from one image.

    Args:
        image: opened; stays the caller's.
        run: the guest's run directory.
        listener: called at each change of state, in the event loop.
    """

    def __init__(
        self,
        image: Image,
        run: RunDirectory,
        options: SessionOptions,
        listener: Callable[[StateChange], None] | None = None,
    ) -> None:
        self.image = image
        self.run = run
        self.options = options
        self.state = State.NEW
        self.pager: Pager | None = None
        self.identity: ProcessIdentity | None = None
        #: CLOCK_MONOTONIC of QEMU's start, where this session launched it
        self.launched_ns = 0
        self._listener = listener
        self._began = time.monotonic()
        self._owned: QemuProcess | None = None
        self._qmp: Monitor | None = None
        self._layout: list[RamBlock] = []
        self._shown: frozenset[str] = frozenset()
        #: how the userfaultfd is had
        self.attached_by = "ptrace"
        #: whom to ask what QEMU maps: QEMU's identity, or what knows it without looking
        self._target: ProcessIdentity | None = None
        self._userfaultfd = -1
        self._userfaultfd_number = -1
        # Whether whoever has handed the descriptor over has settled its features.
        self._negotiated = False
        self._features = 0
        self._device_state = -1
        self._load_begun = False
        self._trace_on_trial = False
        self._is_loading = False
        self._leave: Callable[[], None] | None = None
        self._sources: dict[tuple[str, int], tuple[Source, int, bytearray]] = {}
        #: the sources that fail on purpose, if any do
        self.chaos_sources: list[ChaosSource] = []
        self._ledger: Ledger | None = None
        # On page data that is somebody else's file.
        self._lease: Lease | None = None
        # Whether somebody waits to write to it: all that counts is to have the rest soon.
        self._hurried = False
        self._working_set: WorkingSet | None = None
        self._working_set_kept = False
        #: once there is a pager
        self.accounts: Accounts | None = None
        self._resumed = False
        #: why the guest was loaded and not let run
        self._failure: PostcopyError | None = None
        #: why the guest is kept from running, in words, or empty; and how (:mod:`.plugged`)
        self._held_back = ""
        self.held: Held = ""
        #: asks QEMU what memory it has now, while there is somebody to ask
        self.look_again: Callable[[], Awaitable[None]] | None = None
        # By the ids of memory back-ends: sizes of those that came later, and those that have gone.
        self._plugged_in: dict[str, int] = {}
        self._taken_away: set[str] = set()
        #: whether a page was found that another process has made: see :meth:`damage`
        self.damaged = asyncio.Event()
        self._damage_before = ""  # that a sidecar which has died had found
        self._asked_async: bool | None = None
        # QEMU let it run by itself, when its state was loaded.
        self._runs = False
        # Whether it may do so: not with -S.  What somebody else has started may be without.
        self._runs_by_itself = True
        # Taken over, or the last of its state is given to QEMU, and not known yet whether there is
        # a guest: then it counts as one.
        self._unsettled = False
        self._owned_before = False
        #: where QEMU's monitor is, as :func:`qemu_postcopy.vm.monitor.connect` takes it
        self._monitor = str(run.qmp_socket)
        # The layout was had without QEMU's word, and must be confirmed before the guest runs.
        self._presumed = False
        self._cleanup = contextlib.ExitStack()

    # --- the steps -------------------------------------------------------------------------------

    async def find(self, qmp_path: Path) -> None:
        """Takes a QEMU that somebody else started with ``-incoming defer``.

        Raises:
            QmpError: no monitor answers there.
            StateError: it does not wait for a migration.
            MismatchError: it is not a QEMU that this image can be resumed in.
        """
        from qemu_postcopy.vm.process import ProcessIdentity
        from qemu_postcopy.vm.qmp import Qmp

        self._require(State.FOUND)
        self._qmp = await Qmp.connect(qmp_path)
        self._monitor = str(Path.cwd() / qmp_path)
        self.identity = ProcessIdentity.open(self._qmp.peer_pid())
        self._cleanup.callback(self.identity.close)
        self.identity.require_qemu()
        self._target = self.identity
        self._prepare()
        await self._check_fit()
        self._enter(State.FOUND)

    def announce(self, monitor: str) -> None:
        """Notes where a guest will be that libvirt starts next, for whoever comes after."""
        self._monitor = monitor
        self._try_record()

    def adopt(
        self,
        pid: int,
        monitor: str,
        offered: tuple[TakenDescriptor, ProcessIdentity] | None = None,
        places: dict[str, int] | None = None,
    ) -> None:
        """Takes a QEMU that libvirt has started, and that waits in the middle of its load.

        Its monitor is libvirt's until the load is over, so its memory is presumed to lie where it
        seems to; :meth:`confirm` asks then.

        Args:
            offered: what QEMU's preload library has handed over, and whom to ask what it maps.
                Both are the session's from now on, also if this fails.
            places: addresses of blocks, as far as QEMU has shown them itself.

        Raises:
            TargetGoneError: it has ended.
            AttachError: it has not the memory that the image wants.
        """
        from qemu_postcopy.libvirt.blocks import presume_layout
        from qemu_postcopy.vm.process import ProcessIdentity

        self._require(State.FOUND)
        if offered is not None:
            taken, target = offered
            self.attached_by, self._negotiated = "preload", True
            self._keep_userfaultfd(taken)
            self._cleanup.callback(target.close)
        self.identity = ProcessIdentity.open(pid)
        self._cleanup.callback(self.identity.close)
        self.identity.require_qemu()
        self._target = self.identity if offered is None else offered[1]
        self._monitor, self._presumed = monitor, True
        self._prepare()
        self._shown = frozenset(places or ())
        self._layout = presume_layout(self._target, self.image.manifest.blocks, places or {})
        self._enter(State.FOUND)

    @property
    def layout(self) -> tuple[RamBlock, ...]:
        """Where the blocks lie, once that is known."""
        return tuple(self._layout)

    def attach(self) -> None:
        """Empties RAM that is filled ahead, and takes the userfaultfd, if launching did not do so.

        Raises:
            AttachError: rights are missing, or RAM is of a kind that cannot be paged; QEMU is left
                as it was.
        """
        self._require(State.ATTACHED)
        assert self._target is not None
        self._ensure_empty(self._target)
        if self._userfaultfd < 0:
            self._take_userfaultfd()
        self._enter(State.ATTACHED)

    def _ensure_empty(self, target: ProcessIdentity) -> None:
        from qemu_postcopy.vm.collapse import refuse_collapsible
        from qemu_postcopy.vm.emptiness import ensure_empty

        refuse_collapsible(self._layout, target)
        for block in self._layout:
            ensure_empty(block, target)

    def serve(self) -> None:
        """Registers every block, makes sure that all of them are empty, and starts the pager.

        Raises:
            AttachError: a page is there already, or another userfaultfd has the memory.
        """
        from qemu_postcopy.vm.attach import drop_ptrace_rights

        self._require(State.SERVING)
        if self.pager is None:
            self._prepare_serving()
        self._register()
        # Before the pager's thread: each thread has rights of its own.
        if self.options.drop_rights:
            drop_ptrace_rights()
        if self._hurried:
            raise HostError(
                f"somebody wants to write to {self.image.shown_path}: it cannot be served in place",
                hint="nothing is lost: restore it before that, or again when that is over",
            )
        self._started_pager().start()
        self._enter(State.SERVING)

    def _prepare_serving(self) -> None:
        """All of it that can be done before anything is registered."""
        from qemu_postcopy.paging.ledger import Ledger, LedgerBlock

        blocks = self._pager_blocks()
        self._ledger = Ledger.create(
            self.run.ledger, [LedgerBlock(b.name, b.page_size, b.length) for b in blocks]
        )
        self._cleanup.callback(self._ledger.close)
        self._note_shown(self._ledger)
        pager = self._make_pager(blocks, note_first_faults=self.options.uses_working_set())
        if self._working_set is not None:
            pager.prefetch(self._working_set.pages(blocks))
        if self.options.trace is not None:
            self._known_accounts().record(self.options.trace)

    def _note_shown(self, ledger: Ledger) -> None:
        """QEMU has shown where these blocks lie by their first pages, which it has since then."""
        from qemu_postcopy.vm.presence import page_present

        assert self.identity is not None
        for block in self._layout:
            if block.name in self._shown and page_present(self.identity, block, 0):
                ledger.set_present(block.name, 0)

    def take_over(self, record: SessionRecord) -> None:
        """Serves on a guest whose sidecar has died; all that was registered still is.

        What is present the kernel says itself, what the guest gave back the ledger knows.  Threads
        that wait are woken once and fault anew.
        Whether there is a guest yet is for :meth:`settle` to find out.

        Raises:
            TargetGoneError: QEMU has ended.
            AttachError: the descriptor is not there, or rights are missing.
            ImageError: the image is another one now, or the ledger is damaged; the guest waits on.
        """
        from qemu_postcopy.paging import registration
        from qemu_postcopy.paging.ledger import Ledger
        from qemu_postcopy.vm.attach import drop_ptrace_rights
        from qemu_postcopy.vm.layout import RamBlock
        from qemu_postcopy.vm.presence import found_anew, note_arrived
        from qemu_postcopy.vm.process import ProcessIdentity

        self._require(State.SERVING)
        self._unsettled = True
        if record.image_key != self.image.manifest.state.sha256:
            raise ImageError(
                f"{self.image.path} is not the image that this guest was restored from",
                hint="put that image back: the guest waits until then",
            )
        self.identity = ProcessIdentity.open(record.pid, record.start_time)
        self._cleanup.callback(self.identity.close)
        self.launched_ns, self._owned_before = record.launched_ns, record.owned
        self._monitor, self._presumed = record.qmp, record.presumed
        self.held = "frozen" if record.held == "frozen" else "stopped" if record.held else ""
        self._damage_before = record.damage
        recorded = [
            RamBlock(**{**block, "file_key": tuple(block["file_key"] or ()) or None})
            for block in record.blocks
        ]
        self._layout = [found_anew(block, self.identity) for block in recorded]
        self._keep_userfaultfd(self._take_left(self.identity, record))
        self._ledger = Ledger.open(self.run.ledger)
        self._cleanup.callback(self._ledger.close)
        self._ledger.require_sound()
        note_arrived(self._ledger, self._layout, self.identity)
        pager = self._make_pager(
            self._pager_blocks(), threads=record.threads, async_offered=record.async_offered
        )
        if self.options.trace is not None:
            self._go_on_recording(self.options.trace)
        if self.options.drop_rights:
            drop_ptrace_rights()
        pager.start()
        if self._hurried:
            self.fill_at_full_speed()
        for block in self._layout:
            registration.wake(self._userfaultfd, block.address, block.size_bytes)
        # session.json keeps the state that it has: it says how far the dead sidecar had come.
        self.state = State.SERVING
        try:
            self.run.update_record(sidecar_pid=os.getpid())
        except (OSError, PostcopyError) as error:
            log.warning("session.json in %s cannot be written: %s", self.run.path, error)
        if self._listener is not None:
            self._listener(StateChange(self.state, time.monotonic() - self._began))

    def _go_on_recording(self, trace: Path) -> None:
        """Where the file cannot be written to, by a fault of its disk or for want of room for the
        copies that its file system makes, whoever touches its memory is ended (SIGBUS, mmap(2)).
        So the record leaves it out until that has gone well for a while: the next sidecar goes
        without it."""
        try:
            self.run.update_record(trace="")
            self._known_accounts().record(trace, resume=True)
            self._trace_on_trial = True
        except (OSError, PostcopyError) as error:
            log.warning("faults are not recorded any more: %s", error)

    async def settle(self, record: SessionRecord) -> bool:
        """After :meth:`take_over`: goes on to the state in which there is a guest.

        Returns:
            whether it is still to be let run (:meth:`resume`).

        Raises:
            StateError: none ever came to be: the device state was not loaded.  Nothing is lost.
        """
        from qemu_postcopy.vm import migration
        from qemu_postcopy.vm.monitor import connect

        # One that was kept from running was there, and all of QEMU may be stopped.
        born = record.state in GUEST_STATES or bool(record.held)
        if not born:
            # QEMU answers when it has loaded what it was given, which our serving lets it do.
            try:
                self._qmp = await connect(self._monitor, timeout=migration.LOAD_SECONDS)
                loaded = await migration.has_loaded(self._qmp)
            except QmpError:
                await self._require_alive_still()
                raise
            if not loaded:
                self._unsettled = False
                raise StateError(
                    f"the restore of {self.run.name} had not come so far as a guest",
                    hint="nothing is lost: restore it again",
                )
        self._enter(State.LOADED)
        self._unsettled = False
        if not born:
            if record.owned:
                # It was given the end of its state only after it had said where its memory is; the
                # record may be older than that.  The guest may run: it is asked nothing any more.
                self._presumed = False
            # Where it was to stay paused, libvirt may have been asked to let it run (hooked.py).
            await self.confirm(may_run=self.options.paused)
            if not self.options.paused:
                return True
        self._enter(State.RUNNING)
        return False

    async def _require_alive_still(self) -> None:
        """TargetGoneError if QEMU is about to end."""
        assert self.identity is not None
        await self._ends()
        self.identity.require_alive()

    async def _ends(self) -> bool:
        """Whether QEMU has ended, or is about to: it closes its monitor a moment before."""
        try:
            async with asyncio.timeout(MONITOR_SECONDS):
                await self.wait_gone()
        except TimeoutError:
            return False
        return True

    async def load_device_state(self) -> None:
        """Lets QEMU load everything but the memory.

        Raises:
            MismatchError: QEMU refused it; its words are in the message.
            TargetGoneError: QEMU had ended before it was asked.
        """
        self._require(State.LOADED)
        assert self.identity is not None
        self.identity.require_alive()
        self._load_begun = True
        with self._loading():
            await self._load_or_tell()

    async def _load_or_tell(self) -> None:
        try:
            await self._load()
        except (AttachError, MismatchError, HostError):
            raise
        except PostcopyError as error:
            reason = "it ended" if isinstance(error, LaunchError) else error.message
            if trouble := self.trouble():
                reason += f" ({trouble})"
            output = self._owned.output() if self._owned else ""
            raise MismatchError(
                f"QEMU could not load the device state: {reason}\n{output}".rstrip(),
                hint="the devices on its command line must be those of the snapshot",
            ) from error
        self._enter(State.LOADED)
        self._unsettled = False

    async def _load(self) -> None:
        from qemu_postcopy.vm import migration

        assert self._qmp is not None
        await self._finish(migration.load(self._qmp, self._device_state, self._may_run_from_now))

    def _may_run_from_now(self) -> None:
        """QEMU is about to have all that it needs to let the guest run without being told."""
        self._unsettled = self._runs_by_itself

    async def _finish(self, loading: Awaitable[bool]) -> None:
        """Waits for the end of a load.  Where that fails there is no guest only if QEMU says so, or
        has ended: otherwise the guest may run."""
        from qemu_postcopy.vm.migration import NotLoadedError
        from qemu_postcopy.vm.monitor import CommandError

        try:
            self._runs = await loading
        except (NotLoadedError, CommandError):
            self._unsettled = False
            raise
        except PostcopyError:
            if self._unsettled and await self._ends():
                self._unsettled = False
            raise

    async def load_by(
        self, feed: Callable[[int], Awaitable[None]], *, may_run: bool = False
    ) -> None:
        """Lets somebody else see to it that QEMU loads the stream behind a descriptor.

        Args:
            may_run: whoever started QEMU lets the guest run as soon as the stream's end is with it,
                which may be before ``feed`` returns, or though it fails or is cancelled.  So there
                counts as a guest from here on, until QEMU has ended.

        Raises whatever ``feed`` raises.
        """
        self._require(State.LOADED)
        self._load_begun = True
        self._unsettled = may_run
        with self._loading():
            await feed(self._device_state)
            self._enter(State.LOADED)
            self._unsettled = False

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False
            if self._leave is not None and self.has_guest():
                self._leave()

    def leave(self, by: Callable[[], None]) -> None:
        """Has this process leave its guest to another by what is given: now, or when QEMU has been
        given all of its state, since nobody else could go on with that."""
        if self._is_loading:
            self._leave = by
        else:
            by()

    async def confirm(self, *, may_run: bool = False) -> None:
        """Asks QEMU whether its memory lies where it was presumed, and whether it can be paged.

        Args:
            may_run: whoever started QEMU may have let the guest run.  Then one that something reads
                past us is not ended: the listener is told, and the rest is filled at once.

        Raises:
            AttachError, MismatchError: not so.  The guest must not run, and its QEMU was ended.
            LibvirtError, QmpError: it cannot be asked now.
        """
        from qemu_postcopy.vm.layout import confirm
        from qemu_postcopy.vm.monitor import connect
        from qemu_postcopy.vm.refusals import refusals

        if not self._presumed:
            return
        if self._qmp is None:
            self._qmp = await connect(self._monitor, timeout=MONITOR_SECONDS)
        try:
            await confirm(self._qmp, self._layout)
            if reasons := await refusals(self._qmp):
                refused = MismatchError(
                    "this guest's memory cannot be paged: " + "; ".join(reasons),
                    hint="restore it eagerly, by virsh restore",
                )
                if not may_run:
                    raise refused
                self.fill_at_full_speed()
                self.tell_failure(refused)
        except (AttachError, MismatchError):
            await self._qmp.execute("quit")
            self._enter(State.GONE)
            raise
        self._presumed = False

    async def resume(self) -> None:
        """Lets the guest run, if QEMU has not done so by itself (without -S).

        Raises:
            MismatchError: another process holds a disk.  The guest has not run, so a QEMU of our
                own is ended and nothing is lost; somebody else's stays, and is served: its
                operator may let the guest run when the disk is free.
        """
        from qemu_postcopy.vm import migration

        self._require(State.RUNNING)
        assert self._qmp is not None
        try:
            if not self._runs:
                await migration.let_run(self._qmp)
        except migration.DiskHeldError as error:
            reason, hint = error.message, error.hint
            if self._owned is not None:
                reason = migration.lock_report(self._owned.output()) or reason
                self._owned.kill()
                self._enter(State.GONE)
            else:
                how = f"`cont` at {self._monitor}" if self._monitor[:1] == "/" else "virsh resume"
                hint = (
                    f"it is loaded and served: stop the other guest, then let this one run ({how})"
                )
            raise MismatchError(f"the guest cannot start: {reason}", hint=hint) from error
        self._resumed = True
        self._enter(State.RUNNING)
        if self.accounts is not None:
            self.accounts.name_vcpus()

    def is_let_run_by_others(self) -> None:
        """libvirt lets the guest run, or not, as it was told: there is nothing to do."""
        self._require(State.RUNNING)
        self._resumed = True
        self._enter(State.RUNNING)

    def tell_failure(self, failure: Exception) -> None:
        """Tells the listener what went wrong with a guest that is served on all the same."""
        if not isinstance(failure, PostcopyError):
            failure = SidecarError(
                f"internal error, the guest is served on: {failure!r}",
                hint=f"look into {self.run.sidecar_log}",
            )
        self._failure = failure
        if self._listener is not None:
            self._listener(StateChange(self.state, time.monotonic() - self._began, failure))

    async def learn_threads(self) -> None:
        """Asks QEMU who its threads are, for :meth:`told`; lacking answers cost nothing.

        A guest that was taken over is asked only if the dead sidecar had not come so far: its
        monitor is its operators'.
        """
        if self.accounts is None or self.identity is None:
            return
        if self._qmp is not None:
            await self.accounts.learn(self._qmp)
        elif not self.accounts.threads() and self.attached_by != "handshake":
            await self._learn_threads_late()
        with contextlib.suppress(OSError, PostcopyError):
            self.run.update_record(
                threads=self.accounts.threads(), async_offered=self.accounts.async_offered
            )

    async def _learn_threads_late(self) -> None:
        from qemu_postcopy.vm.monitor import connect

        assert self.accounts is not None
        try:
            async with await connect(self._monitor, timeout=MONITOR_SECONDS) as qmp:
                await self.accounts.learn(qmp)
        except PostcopyError as error:
            log.info("the monitor is in use, faults are not told apart: %s", error.message)

    @property
    def monitor(self) -> str:
        """Where QEMU's monitor is: a path, or libvirt:URI#UUID."""
        return self._monitor

    @property
    def connection(self) -> Monitor | None:
        """The connection to the monitor, until :meth:`release_monitor`."""
        return self._qmp

    def has_own_monitor(self) -> bool:
        """Whether the connection is to a monitor that QEMU has for this session alone."""
        return self._owned is not None

    def note_held(self, held: Held) -> None:
        """The guest is about to be kept from running until it is complete, or to go on."""
        self.held = held
        with contextlib.suppress(OSError, PostcopyError):
            self.run.update_record(held=held)

    def tell_held_back(self, why: str) -> None:
        """Why it is kept from running, in words; '' when it goes on."""
        if why and why != self._held_back:
            log.error("%s", why)
        self._held_back = why

    def note_backends(self, backends: Sequence[Mapping[str, Any]]) -> None:
        """What memory QEMU has now, as `query-memdev` lists it: what came later is new, so that
        nothing of it is missing; what has gone is missed by nobody."""
        there = {str(entry.get("id")): int(entry["size"]) for entry in backends}
        ours = {block.backend_id for block in self._layout}
        self._plugged_in = {name: size for name, size in there.items() if name not in ours}
        self._taken_away = ours - there.keys()

    def damage(self) -> str:
        """What is wrong with the guest's memory, in words, or an empty string."""
        from qemu_postcopy.plugged import damage_words

        if self.pager is None:
            return self._damage_before
        names = [block.name for block in self._layout]
        return damage_words(asdict(self.pager.statistics()), names) or self._damage_before

    def _note_damage(self) -> None:
        """Once: whoever takes over has a pager that meets those pages as it should."""
        if not self.damaged.is_set() and (damage := self.damage()):
            self.damaged.set()
            with contextlib.suppress(OSError, PostcopyError):
                self.run.update_record(damage=damage)

    def has_guest(self) -> bool:
        """True while there is a guest that depends on this session."""
        return self._unsettled or self.state in GUEST_STATES

    def has_lease(self) -> bool:
        """Whether page data comes from somebody else's file, which nobody writes to while this
        process serves."""
        return self._lease is not None

    def has_just_begun(self) -> bool:
        """Whether it was this session that let the guest run."""
        return self._resumed and self.state is State.RUNNING

    def fill_at_full_speed(self) -> None:
        """Fills the rest now, whatever the options say."""
        assert self.pager is not None
        self.set_background(True, 0)

    def set_background(self, enabled: bool, rate: int) -> None:
        """From now on, and by whoever takes over; ``rate`` in bytes per second, 0 for no limit.

        Where somebody waits to write to the file that page data comes from, that waits for no wish.
        """
        if self._hurried:
            enabled, rate = True, 0
        if self.pager is not None and self._hurried:
            self.pager.set_background(enabled, rate, at_once=True)
        elif self.pager is not None:
            self.pager.set_background(enabled, rate)
        self.options = replace(self.options, background=enabled, background_rate=rate)
        with contextlib.suppress(OSError, PostcopyError):
            self.run.update_record(background=enabled, background_rate=rate)

    async def release_monitor(self) -> None:
        """Gives the monitor back to its operators; it is not needed for serving."""
        if self._qmp is not None:
            await self._qmp.close()
            self._qmp = None

    def start_background(self) -> None:
        """Begins to fill what nobody has asked for yet, if the options allow it."""
        pager = self._started_pager()
        if self._hurried:
            self.fill_at_full_speed()
        elif self.options.background:
            pager.set_background(True, self.options.background_rate)

    async def wait_complete(self) -> None:
        """Serves until every page with data is present, or QEMU has ended.

        Raises:
            GuestEndedError: QEMU ended first, which may be what its operator wanted.
        """
        from qemu_postcopy.paging.pager import PagerState

        self._require(State.COMPLETE)
        assert self.pager is not None and self.identity is not None
        loop = asyncio.get_running_loop()
        told = asyncio.Event()
        notify_fd = self.pager.notify_fd()

        def note() -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(notify_fd, 8)
            told.set()

        loop.add_reader(notify_fd, note)
        loop.add_reader(self.identity.pidfd, told.set)
        noting = loop.call_later(WORKING_SET_SECONDS, self._keep_working_set)
        watching = asyncio.create_task(self._watch_directory())
        trouble = ""
        try:
            while True:
                state = self.pager.statistics().state
                if self.accounts is not None:
                    self.accounts.name_threads()
                self._note_damage()
                if trouble != (trouble := self.trouble()):
                    log.warning(trouble or "page data can be had again")
                if state is PagerState.MAPPER_GONE:
                    # Its memory goes first, then the process: whoever is told can rely on the end.
                    await self.wait_gone()
                if not self.identity.is_alive():
                    self._enter(State.GONE)
                    raise GuestEndedError(
                        f"{self.run.name} ended while it was served: QEMU has ended",
                        hint="restore its image again, if it was not to end",
                        vm=self.identity.pid,
                    )
                if state is PagerState.COMPLETE:
                    break
                told.clear()
                await told.wait()
        finally:
            loop.remove_reader(notify_fd)
            loop.remove_reader(self.identity.pidfd)
            noting.cancel()
            watching.cancel()
        self._keep_working_set()
        self._release_lease()
        self._enter(State.COMPLETE)

    async def _watch_directory(self) -> None:
        """Fills the rest at full speed if the run directory is removed: no other sidecar could take
        over any more, and nobody could find the guest."""
        while True:
            await asyncio.sleep(DIRECTORY_SECONDS)
            if self.run.is_lost():
                break
            if self._trace_on_trial:
                self._trace_on_trial = False
                with contextlib.suppress(OSError, PostcopyError):
                    self.run.update_record(trace=str(self.options.trace))
        log.error(
            "%s was removed: filling the rest of the guest's memory now, since nobody could take "
            "over from this process (%d); do not kill it before it has ended",
            self.run.path,
            os.getpid(),
        )
        self.fill_at_full_speed()

    async def wait_gone(self) -> None:
        """Returns when QEMU has ended; the pager serves all the while."""
        assert self.identity is not None
        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        # A descriptor of its own: a loop watches each number once, and several may wait.
        watched = os.dup(self.identity.pidfd)
        loop.add_reader(watched, gone.set)
        try:
            await gone.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)

    def detach(self) -> None:
        """Gives the memory back to the kernel: data is all there, what is missing is zero.

        The pager goes on reading events until none can come any more, since a thread of QEMU that
        gives memory back waits until its event is read.
        """
        from qemu_postcopy.paging import registration

        self._require(State.DETACHED)
        assert self.pager is not None
        for block in self._layout:
            self._unregister_mapped(block)
        if not registration.wait_events_read(self._userfaultfd, by_us=False):
            log.warning("QEMU goes on giving memory back that was not served from here")
        self._enter(State.DETACHED)
        self.pager.stop()

    async def close(self) -> None:
        """Frees what this process holds.  A guest that exists is not touched: while data is
        missing it waits for a sidecar.  A QEMU of ours without a guest in it is ended."""
        without_guest = not self._unsettled and self.state in ENTRANCES[State.FAILED]
        if without_guest:
            self._enter(State.FAILED)
        try:
            await self.release_monitor()
        finally:
            if without_guest and self._owned is not None:
                self._owned.kill()
            elif without_guest and self._owned_before and self.identity is not None:
                self.identity.kill()
            elif without_guest:
                self._unregister_empty()
            self._cleanup.close()

    # --- for others ------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """The pager's counters; StateError before there is one."""
        return self._started_pager().statistics()

    def told(self) -> dict[str, Any]:
        """``origins``, ``vcpus``, ``blocks`` and ``plugged_in`` of `status`; all empty before there
        is a pager."""
        if self.accounts is None:
            return {"origins": {}, "vcpus": {}, "blocks": [], "plugged_in": []}
        told = self.accounts.describe()
        for block, entry in zip(self._layout, told["blocks"], strict=True):
            entry["taken_away"] = block.backend_id in self._taken_away
        came = [{"name": name, "bytes": size} for name, size in self._plugged_in.items()]
        return {**told, "plugged_in": came}

    def trouble(self) -> str:
        """Why faults wait, in words, or an empty string while all is well."""
        trouble = self.accounts.trouble() if self.accounts is not None else ""
        stands = self.state in (State.SERVING, State.LOADED)
        if not trouble and self._failure is not None and stands:
            trouble = f"{self._failure.message}; {self._failure.hint}"
        return "; ".join(part for part in (self.damage(), trouble, self._held_back) if part)

    # --- inside ----------------------------------------------------------------------------------

    def _started_pager(self) -> Pager:
        if self.pager is None:
            raise StateError(f"nothing is served yet: the session is {self.state}")
        return self.pager

    def _require(self, next_state: State) -> None:
        if self.state not in ENTRANCES[next_state]:
            allowed = " or ".join(sorted(ENTRANCES[next_state]))
            raise StateError(
                f"cannot become {next_state}: the session is {self.state}, must be {allowed}"
            )

    def _enter(self, state: State) -> None:
        self._require(state)
        self.state = state
        elapsed = time.monotonic() - self._began
        # A QEMU of somebody else is to be left as it was found, so its descriptor must be known.
        wanted = state in RECORDED or (state is State.ATTACHED and self._owned is None)
        if wanted and not self._records_later(state):
            self._try_record()
        if self._listener is not None:
            self._listener(StateChange(state, elapsed))

    def _records_later(self, state: State) -> bool:
        """Whether it is time enough when the state that was entered is over."""
        return False

    def _try_record(self) -> None:
        """Writes ``session.json``.

        Raises:
            HostError: that failed, and the device state is to be loaded next: from then on a record
                that says otherwise would have a guest ended by whoever takes over.
        """
        try:
            self._record()
        except OSError as error:
            if self.state is State.SERVING and not self._unsettled:
                raise HostError(
                    f"session.json in {self.run.path} cannot be written: {error.strerror}",
                    hint="free some space there, or choose another place by QEMU_POSTCOPY_RUN_DIR",
                ) from error
            # No reason to give up a guest, nor to leave one's QEMU behind.
            log.warning("session.json in %s cannot be written: %s", self.run.path, error)

    def _record(self) -> None:
        identity, options = self.identity, self.options
        shown = self.image.shown_path
        # Before that they are asked for, and the guest's first instruction is waited for.
        told = self.told() if self.state in (State.DETACHED, State.GONE) else {}
        self.run.write_record(
            SessionRecord(
                image=str(self.image.path.absolute()),
                state=str(self.state),
                pid=identity.pid if identity else 0,
                start_time=identity.start_time if identity else 0,
                launched_ns=self.launched_ns,
                sidecar_pid=os.getpid(),
                attached_by=self.attached_by,
                userfaultfd=self._userfaultfd_number,
                chunk_size=options.chunk_size or self.image.manifest.chunk_size_bytes,
                boot_id=boot_id(),
                image_key=self.image.manifest.state.sha256,
                owned=self.launched_ns != 0,
                qmp=self._monitor,
                presumed=self._presumed,
                held=self.held,
                paused=options.paused,
                stay=options.stay,
                background=options.background,
                background_rate=options.background_rate,
                blocks=[asdict(block) for block in self._layout],
                # Nothing is counted when serving begins, and the guest waits for this file.
                statistics={}
                if self.pager is None or self.state is State.SERVING
                else asdict(self.pager.statistics()),
                origins=told.get("origins", {}),
                vcpus=told.get("vcpus", {}),
                block_counts=told.get("blocks", []),
                threads=self.accounts.threads() if self.accounts else {},
                async_offered=self.accounts.async_offered if self.accounts else None,
                trace=str(options.trace.absolute())
                if options.trace and not self._trace_on_trial
                else "",
                shown="" if shown == self.image.path else str(shown),
                damage=self._damage_before if self.state is State.SERVING else self.damage(),
            )
        )

    def _prepare(self) -> None:
        """All that can be done before QEMU answers."""
        from qemu_postcopy.image.device_state import open_device_state
        from qemu_postcopy.paging import registration
        from qemu_postcopy.paging.prefetch import WorkingSet

        self._features = self._features or registration.kernel_features()
        self._device_state = open_device_state(self.image)
        self._cleanup.callback(os.close, self._device_state)
        self._asked_for_async()
        for block in self.image.manifest.blocks:
            self._page_data(block.name, block.page_size_bytes)
        if self.options.uses_working_set():
            self._working_set = WorkingSet.read(self.image.manifest.state.sha256)

    def _page_data(self, name: str, page_size: int) -> tuple[Source, int, bytearray]:
        """A block's source, the offset of its first byte, and which of its pages have data.

        Computed once for each page size: a guest may be restored into a back-end of another one.
        """
        self._lease_page_data()
        key = (name, page_size)
        if key not in self._sources:
            source, offset, bitmap = self.image.open_source(name, page_size)
            if self.options.chaos is not None:
                from qemu_postcopy.paging.chaos import ChaosSource

                source = ChaosSource(source, self.options.chaos, name, offset)
                self.chaos_sources.append(source)
            self._cleanup.callback(source.close)
            self._sources[key] = (source, offset, bitmap)
        return self._sources[key]

    def _lease_page_data(self) -> None:
        """Has whoever wants to write to page data that is not ours wait until all of it is read."""
        if self._lease is not None or self._hurried:
            return
        try:
            self._lease = self.image.take_lease()
        except HostError as error:
            if not self._unsettled:
                raise
            # There is a guest. What is read is checked, so that it gets nothing wrong.
            log.error("%s; filling the rest at once", error.message)
            self._hurried = True
            return
        if self._lease is not None:
            asyncio.get_running_loop().add_reader(self._lease.fileno(), self._give_way)
            self._cleanup.callback(self._release_lease)

    def _give_way(self) -> None:
        """Somebody waits to write to the file that page data comes from, for so long as the kernel
        lets us keep it: fill the rest, whatever that costs the guest."""
        from qemu_postcopy.paging.lease import break_seconds

        assert self._lease is not None
        asyncio.get_running_loop().remove_reader(self._lease.fileno())
        self._hurried = True
        log.warning(
            "somebody wants to write to %s, and waits for up to %g s: filling the rest at once",
            self.image.shown_path,
            break_seconds(),
        )
        if self.pager is not None:
            self.fill_at_full_speed()

    def _release_lease(self) -> None:
        if self._lease is not None:
            asyncio.get_running_loop().remove_reader(self._lease.fileno())
            self._lease.release()
            self._lease = None

    def _pager_blocks(self) -> list[PagerBlock]:
        from qemu_postcopy.paging.pager import PagerBlock

        return [
            PagerBlock(
                block.name,
                block.address,
                block.size_bytes,
                block.page_size_bytes,
                *self._page_data(block.name, block.page_size_bytes),
            )
            for block in self._layout
        ]

    def _make_pager(
        self,
        blocks: list[PagerBlock],
        *,
        note_first_faults: bool = False,
        threads: dict[str, str] | None = None,
        async_offered: bool | None = None,
    ) -> Pager:
        from qemu_postcopy.accounts import Accounts
        from qemu_postcopy.paging.pager import DEFAULT_SPIN_LIMIT_US, Pager

        assert self._ledger is not None and self.identity is not None
        options = self.options
        spin = options.spin_limit_us
        self.pager = Pager(
            self._userfaultfd,
            blocks,
            self._ledger,
            chunk_size=options.chunk_size or self.image.manifest.chunk_size_bytes,
            # But for the working set nothing is filled that nobody waits for before the guest runs:
            # loading the device state comes first.
            background=False,
            background_rate=options.background_rate,
            spin_limit_us=DEFAULT_SPIN_LIMIT_US if spin is None else spin,
            note_first_faults=note_first_faults,
        )
        self.accounts = accounts = Accounts(
            self.identity.pid,
            self.pager,
            self._layout,
            f"the image {self.image.path}"
            if self.image.shown_path == self.image.path
            else str(self.image.shown_path),
            threads,
            asked_for_async=self._asked_for_async,
            async_offered=async_offered,
            put_back=self.image.put_back(),
        )
        # A trace of nothing is not kept; and it is ended after the pager.
        self._cleanup.callback(lambda: accounts.close(discard=self.state is State.FAILED))
        self._cleanup.callback(self.pager.close)
        return self.pager

    def _known_accounts(self) -> Accounts:
        assert self.accounts is not None
        return self.accounts

    def _register(self) -> None:
        """Puts all memory under the userfaultfd, and makes sure that none of it is filled."""
        from qemu_postcopy.paging import registration
        from qemu_postcopy.vm.emptiness import require_empty

        assert self.identity is not None and self._target is not None
        if not self._negotiated:
            registration.negotiate(self._userfaultfd, self._features)
        try:
            for block in self._layout:
                registration.register(self._userfaultfd, block.address, block.size_bytes)
                require_empty(block, self._target)
        except PostcopyError:
            # ENOMEM also says that the process has exited (userfaultfd_register, fs/userfaultfd.c).
            self.identity.require_alive()
            raise

    def _keep_working_set(self) -> None:
        """Notes what the guest wanted first and had not been filled ahead, if it did run."""
        from qemu_postcopy.paging.prefetch import WorkingSet

        if self.pager is None or not self._resumed or self._working_set_kept:
            return
        self._working_set_kept = True
        found = WorkingSet.of(self.image.manifest.state.sha256, self.pager)
        if found.places:
            found.followed_by(self._working_set).write()

    def _take_userfaultfd(self) -> None:
        from qemu_postcopy.vm.attach import take_userfaultfd

        assert self.identity is not None
        self._keep_userfaultfd(take_userfaultfd(self.identity))

    def _take_left(self, identity: ProcessIdentity, record: SessionRecord) -> TakenDescriptor:
        """The descriptor that a dead sidecar has left where it lives on."""
        from qemu_postcopy.vm.attach import take_left_userfaultfd

        return take_left_userfaultfd(identity, record.userfaultfd)

    def _keep_userfaultfd(self, taken: TakenDescriptor) -> None:
        self._userfaultfd = taken.descriptor
        self._userfaultfd_number = taken.remote_descriptor
        self._cleanup.callback(os.close, taken.descriptor)

    async def _check_fit(self) -> None:
        from qemu_postcopy.vm import async_page_faults
        from qemu_postcopy.vm.fit import check_fit

        assert self._qmp is not None and self._target is not None
        if self._asked_for_async():
            await async_page_faults.require_offered(self._qmp)
        self._layout = await check_fit(
            self._qmp,
            self._target,
            self.image.manifest,
            allow_newer=self.options.allow_newer_qemu,
        )

    def _asked_for_async(self) -> bool | None:
        """Whether the guest used asynchronous page faults when it was saved; None: not known."""
        from qemu_postcopy.vm import async_page_faults

        if self._asked_async is None and self.attached_by != "handshake":
            try:
                self._asked_async = async_page_faults.asked_for(self.image)
            except (PostcopyError, OSError) as error:
                log.warning("the image's device state cannot be looked at: %s", error)
        return self._asked_async

    def _unregister_mapped(self, block: RamBlock) -> None:
        """All of a block but what QEMU has unmapped (`object-del`): anything may lie there now."""
        from qemu_postcopy.paging import registration

        assert self._ledger is not None
        for attempt in range(UNMAP_ATTEMPTS):
            try:
                for first, count in self._ledger.mapped_runs(block.name):
                    size = block.page_size_bytes
                    registration.unregister(
                        self._userfaultfd, block.address + first * size, count * size
                    )
                return
            except HostError:
                # It may have been unmapped just now: the pager is told of that afterwards.
                if attempt + 1 == UNMAP_ATTEMPTS:
                    raise
                time.sleep(UNMAP_SECONDS)

    def _unregister_empty(self) -> None:
        """QEMU is somebody else's: where nothing was loaded it is left as it was found.

        Once a load has begun it may have gone through, however it looks from here; then QEMU must
        not run on memory that is not there, but wait.
        """
        from qemu_postcopy.paging import registration

        if self.pager is None or self._load_begun:
            return
        for block in self._layout:
            with contextlib.suppress(PostcopyError):
                registration.unregister(self._userfaultfd, block.address, block.size_bytes)
        registration.wait_events_read(self._userfaultfd, by_us=True)
