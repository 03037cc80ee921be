"""A session that starts its QEMU by itself, and so may begin before that can be asked anything.

    launch -> attach -> serve -> begin to load -> load -> run -> complete -> detach

The order is the session's; here is how the steps "launch" and "load" are made short.  What needs
nothing of QEMU is done before it is started.  Where the image's own command line is plain enough
its memory is foreseen while it starts (vm/foresight.py), it loads through a gate (vm/gate.py), and
gets the end of its state only when it has confirmed what was foreseen.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from qemu_postcopy.errors import LaunchError, TargetGoneError
from qemu_postcopy.session import Session, SessionOptions, State, StateChange

if TYPE_CHECKING:
    from qemu_postcopy.image.image import Image
    from qemu_postcopy.sidecar.rundir import RunDirectory
    from qemu_postcopy.vm.gate import Gate
    from qemu_postcopy.vm.layout import RamBlock
    from qemu_postcopy.vm.process import ProcessIdentity
    from qemu_postcopy.vm.ways import AttachWay

log = logging.getLogger(__name__)


class LaunchedSession(Session):
    """See the module; :meth:`launch` and :meth:`begin_to_load` are its own steps."""

    def __init__(
        self,
        image: Image,
        run: RunDirectory,
        options: SessionOptions,
        listener: Callable[[StateChange], None] | None = None,
    ) -> None:
        super().__init__(image, run, options, listener)
        #: how the userfaultfd is had
        self._way: AttachWay | None = None
        #: what QEMU loads its state through
        self._gate: Gate | None = None
        #: how much of it is let in, and up to where it may be before QEMU has said what it has
        self._let_in = self._held_from = 0
        #: the one block, where it was seen before QEMU could be asked
        self._foreseen: RamBlock | None = None

    async def launch(self, argv: list[str], *, as_recorded: bool = False) -> None:
        """Starts QEMU and checks that it fits.

        QEMU takes 30 to 50 ms to start, and longer the more we do meanwhile: two threads of a
        processor share it.  So what needs nothing of QEMU is done before, and only what needs no
        answer of it while it starts.

        Args:
            argv: without monitor, with ``-incoming defer`` (spec.restore_arguments).
            as_recorded: it is the image's own command line: where that is plain, QEMU loads through
                a gate, and what the command line makes certain is not asked.

        Raises:
            LaunchError: it did not start; carries its output.
            MismatchError: it is not a QEMU that this image can be resumed in.
            AttachError: rights are missing.
        """
        from qemu_postcopy.paging import registration
        from qemu_postcopy.vm.fit import check_version, launch_failure
        from qemu_postcopy.vm.foresight import foreseeable
        from qemu_postcopy.vm.gate import Gate
        from qemu_postcopy.vm.launch import launch
        from qemu_postcopy.vm.spec import memory_files

        self._require(State.FOUND)
        if paths := memory_files(argv):
            from qemu_postcopy.vm.emptiness import refuse_used_files

            refuse_used_files(paths)
        self._features = registration.kernel_features()
        self._way = way = self._choose_way()
        self.attached_by, self._negotiated = way.name, way.negotiated
        passed = []
        if as_recorded and way.name == "ptrace" and foreseeable(argv, self.image.manifest):
            self._gate = Gate()
            self._cleanup.callback(self._gate.close)
            argv = self._gate.put_into(argv)
            passed.append(self._gate.reader)
        self._runs_by_itself = "-S" not in argv
        self._prepare()
        # Before there is a QEMU that nobody would know of; the time says that it is our own.
        self.launched_ns = time.monotonic_ns()
        self._try_record()
        taking: asyncio.Future[None] | None = None
        too_late = threading.Event()
        self.launched_ns = time.monotonic_ns()  # writing takes a while, and QEMU starts now
        try:
            self._owned = launch(
                argv, self.run.path, pass_descriptors=passed, environment=way.environment()
            )
            if self._gate is not None:
                self._gate.close_reader()
            self._cleanup.callback(self._owned.close)
            self.identity = self._owned.identity
            # The descriptor is opened while QEMU starts, by one of its helper threads.  Our thread
            # that does it ends here: rights are dropped thread by thread.
            executor = ThreadPoolExecutor(1)
            taking = asyncio.get_running_loop().run_in_executor(
                executor, self._take_userfaultfd_early, too_late
            )
            executor.shutdown(wait=False)
            try:
                version = await self._prepare_and_wait(taking)
            finally:
                too_late.set()
                way.settle()
                # What went wrong there counts only if QEMU itself has come up.
                await asyncio.wait({taking})
            taking.result()
            self._target = way.target(self.identity)
            if self._target is not self.identity:
                self._cleanup.callback(self._target.close)
            self._presume_foreseen()
            if self._presumed:
                check_version(version[:2], self.image.manifest, self.options.allow_newer_qemu)
            else:
                self._qmp = await self._owned.connect()
                await self._check_fit()
        except LaunchError as error:
            failure = taking.exception() if taking is not None else None
            if way.ends_qemu and failure and not isinstance(failure, TargetGoneError):
                raise failure from error
            raise launch_failure(error, self.image.manifest) from error
        way.require_complete(self._layout)
        log.info("QEMU is got at by %s", way.name)
        self._enter(State.FOUND)

    async def _prepare_and_wait(self, taking: asyncio.Future[None]) -> tuple[int, ...]:
        """What can be done while QEMU starts; returns QEMU's version when it has."""
        from qemu_postcopy.vm import async_page_faults, layout, migration
        from qemu_postcopy.vm.fit import QUESTIONS

        assert self._owned is not None
        # From here on there is a QEMU; whoever comes after us must be able to end it.
        self._try_record()
        if self._gate is None:
            self._owned.ask_ahead((*QUESTIONS, *migration.LOAD_QUESTIONS), self._device_state)
        else:
            questions = [
                *layout.confirming_questions(self.image.manifest.qemu_version),
                migration.EVENTS_QUESTION,
            ]
            if self._asked_for_async():
                questions += async_page_faults.QUESTIONS
            self._owned.ask_ahead(questions)
        starting = asyncio.create_task(self._owned.ready())
        try:
            either: set[asyncio.Future[Any]] = {starting, taking}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self._presume_foreseen()
            return await starting
        finally:
            starting.cancel()
            await asyncio.wait({starting})

    def _presume_foreseen(self) -> None:
        """Prepares for the layout that was seen, if one was and this was not done before.

        QEMU fills nothing of it in advance: that was no plain command line.
        """
        from qemu_postcopy.vm.collapse import refuse_collapsible

        if self._foreseen is not None and not self._presumed:
            assert self.identity is not None
            self._layout, self._presumed = [self._foreseen], True
            refuse_collapsible(self._layout, self.identity)
            self._prepare_serving()

    def _choose_way(self) -> AttachWay:
        from qemu_postcopy.vm import ways

        sizes = [block.size_bytes for block in self.image.manifest.blocks]
        way = ways.choose(self.options.attach_by, self.run.path, sizes)
        self._cleanup.callback(way.close)
        return way

    def _take_userfaultfd_early(self, too_late: threading.Event) -> None:
        from qemu_postcopy.vm.foresight import foresee

        assert self.identity is not None and self._way is not None
        self._keep_userfaultfd(self._way.take(self.identity))
        if self._gate is not None:
            self._foreseen = foresee(self.identity, self.image.manifest, too_late)

    def _ensure_empty(self, target: ProcessIdentity) -> None:
        """QEMU fills nothing ahead of what can be foreseen, and that it may be was looked at."""
        if self._foreseen is None:
            super()._ensure_empty(target)

    async def begin_to_load(self) -> None:
        """Lets QEMU load what it can before its answers are looked at: it waits for that.

        All but the end, so that it cannot finish: only where its memory was foreseen, and when that
        is registered and served.

        Raises:
            LaunchError: it has ended.
        """
        from qemu_postcopy.image.device_state import end_of_sections

        self._require(State.LOADED)
        if self._gate is not None and self._presumed:
            assert self._owned is not None
            # What it answers after the load would be waited for; now there is something else to do.
            await self._owned.answered()
            self._held_from = end_of_sections(self._device_state)
            self._let_in = self._gate.let_in_now(self._device_state, 0, self._held_from)

    async def _load(self) -> None:
        """Through the gate, where there is one.

        Has QEMU say where its memory is before it gets the end, if that was foreseen: it may not
        finish before the answer is known to be the same.

        Raises:
            AttachError, MismatchError: it is another, or the guest would miss its interrupts.
            HostError: session.json cannot be written.
        """
        from qemu_postcopy.vm import migration

        gate = self._gate
        if gate is None:
            await super()._load()
            return
        letting_in = asyncio.create_task(
            gate.let_in(self._device_state, self._let_in, self._held_from)
        )
        try:
            self._try_record()
            if self._presumed:
                await self._confirm_foreseen()
            await migration.in_time(letting_in)
        finally:
            letting_in.cancel()
            await asyncio.wait({letting_in})
        assert self._qmp is not None
        await self._finish(
            migration.load_through(
                self._qmp, gate, self._device_state, self._held_from, self._may_run_from_now
            )
        )

    async def _confirm_foreseen(self) -> None:
        from qemu_postcopy.vm import async_page_faults, layout

        assert self._owned is not None
        self._qmp = await self._owned.connect()
        await layout.confirm(self._qmp, self._layout)
        if self._asked_for_async():
            await async_page_faults.require_offered(self._qmp)
        self._presumed = False

    def _records_later(self, state: State) -> bool:
        # Behind a gate there is no guest before the end is let in: it is time enough then.
        return state is State.SERVING and self._gate is not None
