"""What is plugged into a guest while it is being filled: found, and kept from doing harm.

Beside the step "serve" of the flow, in the event loop of the sidecar.  Devices whose back-end maps
guest memory itself (vhost-user), or has the kernel take it out of its file, see zeros where a page
is missing, and make it a page of zeros for the guest too, without a fault that anybody could answer
(mm/shmem.c makes it; a userfaultfd belongs to the mm of QEMU alone).  Such devices are refused
before a guest runs (:mod:`qemu_postcopy.vm.refusals`).  One that is plugged in later is found here,
by what QEMU has opened and by asking its monitor then: the virtual CPUs are stopped at once, which
also has QEMU stop the device's queues (virtio_device_should_start in QEMU), the rest is filled at
full speed, and the guest goes on when nothing is missing.

What remains is a window: between `device_add` and the stop the guest may have found the device and
started it.  Whatever its back-end touched by then the pager meets as pages that were there before
they were filled, also where another process maps the memory in a way that is not seen here; that is
told as damage (:func:`damage_words`).

No zeros come of what reaches memory through QEMU's own address space.  Kernel vhost and io_uring
take faults there, in handle_userfault(), and wait (vhost_worker, drivers/vhost/vhost.c).  VFIO and
vDPA pin pages there: pin_user_pages() waits too, or fails with EFAULT where its caller may not let
go of the lock (FOLL_UNLOCKABLE, mm/gup.c), so that the device is not plugged in.  An exception is
IOMMU_IOAS_MAP_FILE (Linux 6.13, QEMU 10.1), whose memfd_pin_folios() makes missing pages itself.
So all that is refused before a guest runs is held against it here, too.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from qemu_postcopy.errors import PostcopyError, QmpError
from qemu_postcopy.vm.open_files import OpenFiles

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qemu_postcopy.session import Session
    from qemu_postcopy.vm.monitor import Monitor

log = logging.getLogger(__name__)

#: How often it is looked what QEMU has open.  A Linux guest takes longer to start a device.
LOOK_SECONDS = 0.02
#: How long a monitor may take to answer, until it counts as somebody else's for the moment.
ASK_SECONDS = 0.25
#: The same where libvirt is asked first, which has many to answer.
ASK_LIBVIRT_SECONDS = 5.0
#: How long it may take to answer all that is asked.
ANSWER_SECONDS = 1.0
#: How long whoever asks for the status waits for what QEMU says.
LOOK_AGAIN_SECONDS = 0.2
#: Between questions: so many times as long as the last one took; something may be opened all the
#: time (user-mode networking).  But a device may come at any time, so never for long.
REST = 20
REST_SECONDS_MOST = 0.25
#: How long after an attempt to let the guest go on there is another.
AGAIN_SECONDS = 0.5

#: States in which a guest that is held is in between (QAPI, RunState).
PASSING = frozenset({"finish-migrate", "save-vm", "restore-vm"})

#: How a guest is kept from running: by its monitor, or with all of QEMU where that is in use.
Held = Literal["", "stopped", "frozen"]


class PlugWatch:
    """Looks after one guest from :meth:`begin` until :meth:`watch` returns.

    What a sidecar that has died had done to the guest is in ``session.held``.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._files: OpenFiles | None = None
        self._asked = False
        # QEMU's monitor, for as long as it is ours.
        self._qmp: Monitor | None = None
        self._opened = asyncio.Event()
        self._doubted = False

    async def begin(self, qmp: Monitor | None) -> None:
        """Notes what there is.  ``qmp``: the monitor, where there is a connection to it."""
        identity = self._session.identity
        assert identity is not None
        address = self._session.monitor
        try:
            self._files = OpenFiles(identity.pid, address if address[:1] == "/" else "")
        except OSError as error:
            log.warning(
                "it cannot be seen what QEMU opens (%s): plug in no device that maps guest memory "
                "before the guest is complete",
                error,
            )
        if qmp is not None:
            # What is found by then is found again at the first look.
            with suppress(PostcopyError):
                self._asked = not await self._ask(qmp)

    async def watch(self, complete: asyncio.Event, own: Monitor | None) -> None:
        """Until all memory is there; lets the guest go on then, if it was held here.

        Args:
            own: a monitor that is nobody else's; stays the caller's.
        """
        session = self._session
        session.look_again = None if own is None else lambda: self._look_again(own)
        if self._files is not None:
            self._files.watch(self._note_opened, LOOK_SECONDS)
        if not self._asked:
            self._opened.set()
        if session.held:
            session.tell_held_back(
                "the guest is kept from running until all of its memory is there, because of what "
                "was plugged in"
            )
        try:
            while not complete.is_set():
                await first_of(complete, self._opened, session.damaged)
                if self._opened.is_set() or session.damaged.is_set():
                    self._opened.clear()
                    await self._investigate(complete, own)
            await self._let_go(own)
        finally:
            session.look_again = None
            if self._files is not None:
                self._files.close()
            await self._release()

    def _note_opened(self) -> None:
        if self._files is not None and self._files.opened():
            self._opened.set()

    async def _investigate(self, complete: asyncio.Event, own: Monitor | None) -> None:
        """Asks QEMU, again and again while its monitor is in use, and acts."""
        loop = asyncio.get_running_loop()
        in_doubt = self._asked  # a sign, and perhaps nobody to ask
        while not complete.is_set():
            if self._session.held == "frozen":  # it answers nobody
                await complete.wait()
                return
            began = loop.time()
            try:
                qmp = await self._connect(own)
                reasons = await self._ask(qmp)
                if self._session.damaged.is_set() and not reasons:
                    names = await asyncio.to_thread(self._other_mappers)
                    reasons = [f"another process maps its memory: {', '.join(names) or 'unseen'}"]
                if reasons:
                    await self._hold(qmp, reasons, complete)
                    return
            except PostcopyError as error:
                await self._release()
                if self._opened.is_set() or self._session.damaged.is_set():
                    in_doubt = True
                    self._opened.clear()
                if in_doubt:
                    await self._doubt(error)
                if await _within(complete, AGAIN_SECONDS):
                    return
                continue
            await self._release()
            await _within(complete, min(REST * (loop.time() - began), REST_SECONDS_MOST))
            return

    async def _connect(self, own: Monitor | None) -> Monitor:
        from qemu_postcopy.vm.monitor import connect

        if own is not None:
            return own
        if self._qmp is None:
            address = self._session.monitor
            timeout = ASK_SECONDS if address[:1] == "/" else ASK_LIBVIRT_SECONDS
            self._qmp = await connect(address, timeout=timeout)
        return self._qmp

    async def _release(self) -> None:
        """Leaves the monitor to others."""
        if self._qmp is not None:
            qmp, self._qmp = self._qmp, None
            await qmp.close()

    async def _ask(self, qmp: Monitor) -> list[str]:
        from qemu_postcopy.vm.refusals import refusals

        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                reasons = await refusals(qmp)
                self._session.note_backends(await qmp.memory_backends())
        except TimeoutError as error:
            raise QmpError("QEMU does not answer: its main loop waits for something") from error
        self._asked = True
        return reasons

    async def _look_again(self, qmp: Monitor) -> None:
        """What memory there is now; old news where QEMU does not answer at once."""
        with suppress(PostcopyError):
            self._session.note_backends(
                await qmp.execute("query-memdev", timeout=LOOK_AGAIN_SECONDS)
            )

    async def _hold(self, qmp: Monitor, reasons: list[str], complete: asyncio.Event) -> None:
        """Keeps the guest from running until it is complete, whoever lets it run meanwhile."""
        session = self._session
        with qmp.listen("RESUME") as resumed:
            while not complete.is_set():
                if await qmp.status() == "running":
                    session.note_held("stopped")
                    await qmp.execute("stop")
                session.tell_held_back(
                    "the guest is kept from running until all of its memory is there, because of "
                    "what was plugged in: " + "; ".join(reasons)
                )
                session.fill_at_full_speed()
                waiting = asyncio.create_task(resumed.wait())
                ending = asyncio.create_task(complete.wait())
                await first_done(waiting, ending)
                if waiting.done() and not waiting.cancelled():
                    waiting.result()

    async def _doubt(self, error: PostcopyError) -> None:
        """Something was plugged in, and QEMU cannot be asked what.  To fill does no harm; where
        somebody else has the memory already, QEMU is stopped as a whole."""
        session = self._session
        if not self._doubted:
            self._doubted = True
            session.fill_at_full_speed()
            log.warning(
                "QEMU has opened something and cannot be asked what for (%s): filling the rest of "
                "the guest's memory now",
                error.message,
            )
        others = await asyncio.to_thread(self._other_mappers)
        if others and not session.held:
            assert session.identity is not None
            session.note_held("frozen")
            try:
                signal.pidfd_send_signal(session.identity.pidfd, signal.SIGSTOP)
            except OSError as refused:
                session.note_held("")
                log.error("QEMU may not be stopped: %s", refused)
                return
            session.tell_held_back(
                "QEMU is stopped (SIGSTOP) until all of the guest's memory is there, since another "
                f"process maps it: {', '.join(others)}"
            )

    def _other_mappers(self) -> list[str]:
        identity = self._session.identity
        assert identity is not None
        keys = {block.file_key for block in self._session.layout if block.shared}
        return [
            f"{mapper.name} (PID {mapper.pid})"
            for key in keys
            if key is not None
            for mapper in identity.other_mappers(key)
        ]

    async def _let_go(self, own: Monitor | None) -> None:
        """The guest goes on.  Tries until that is done: nobody else knows that it is to."""
        session = self._session
        assert session.identity is not None
        if session.held == "frozen":
            with suppress(OSError):  # it has ended
                signal.pidfd_send_signal(session.identity.pidfd, signal.SIGCONT)
        while session.held == "stopped" and session.identity.is_alive():
            try:
                qmp = await self._connect(own)
                status = await qmp.status()
                if status not in PASSING:
                    # Whoever ended it, or moved it away meanwhile, wants it that way.
                    if status == "paused":
                        await qmp.execute("cont")
                    elif status != "running":
                        log.warning("the guest is %s by now, and is left so", status)
                    break
                await asyncio.sleep(AGAIN_SECONDS)
            except PostcopyError as error:
                log.warning("the guest cannot be let go on yet: %s", error.message)
                await self._release()
                await asyncio.sleep(AGAIN_SECONDS)
        if session.held:
            session.note_held("")
            log.warning("all of the guest's memory is there: it is held no more")
        session.tell_held_back("")


async def first_of(*events: asyncio.Event) -> None:
    """Waits for any of them."""
    if not any(event.is_set() for event in events):
        await first_done(*(asyncio.ensure_future(event.wait()) for event in events))


async def first_done(*tasks: asyncio.Task[Any]) -> None:
    """Waits until one has ended, and cancels the others."""
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Waits for an event; whether it came."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


def damage_words(statistics: Mapping[str, Any], blocks: list[str]) -> str:
    """What is wrong with a guest's memory, by the pager's counters; '' where nothing is."""
    pages = statistics.get("pages_foreign", 0)
    if not pages:
        return ""
    index = statistics.get("foreign_block", 0)
    block = blocks[index] if index < len(blocks) else f"number {index}"
    return (
        f"memory of this guest is wrong: {pages} pages were touched by another process, which maps "
        "it too, before they were filled, and are zeros but for what that wrote; the first is "
        f"page {statistics.get('foreign_page', 0)} of block {block}: restore the guest anew"
    )
