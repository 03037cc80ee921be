"""The job "restore": a guest goes on from an image, its memory follows.

    open the image -> launch or find QEMU -> attach -> serve -> load the device state
    -> let the guest run -> fill in the background -> complete -> detach

:func:`restore` is the whole life of a sidecar and runs in the event loop of whoever serves: the
process that calls it must live until it returns, else the guest waits for another sidecar.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qemu_postcopy.errors import (
    ContentError,
    GuestEndedError,
    MismatchError,
    OperationCancelledError,
    QmpError,
    StateError,
    UsageError,
)
from qemu_postcopy.launched import LaunchedSession
from qemu_postcopy.plugged import PlugWatch
from qemu_postcopy.session import Session, SessionOptions, StateChange
from qemu_postcopy.sidecar.control import ControlServer
from qemu_postcopy.sidecar.rundir import RunDirectory

if TYPE_CHECKING:
    from qemu_postcopy.image.image import Image
    from qemu_postcopy.image.manifest import Manifest

log = logging.getLogger(__name__)

#: How long a guest that goes on is left alone with its faults.
FIRST_STEPS_SECONDS = 0.2


@dataclass(frozen=True)
class RestoreOptions:
    """What to restore, and how.

    Attributes:
        image: the image's directory.
        name: the guest's name, and that of its run directory; None: the image's file name.
        qmp: monitor of a QEMU that waits in ``-incoming defer``; None: QEMU is launched.
        qemu: binary to launch instead of the one that made the image.
        command: whole QEMU command line instead of the image's own (without monitor, -incoming).
        extra_arguments: added to the command line.
        paused: leave the guest stopped after its state is loaded.
        verify: check every hash of the image first (reads all of it).
    """

    image: Path
    name: str | None = None
    qmp: Path | None = None
    qemu: str | None = None
    command: tuple[str, ...] = ()
    extra_arguments: tuple[str, ...] = ()
    paused: bool = False
    verify: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)

    def launches_as_recorded(self, manifest: Manifest) -> bool:
        """Whether QEMU is started just as the image says."""
        recorded = manifest.launch.get("argv") or [None]
        other_qemu = self.qemu is not None and self.qemu != recorded[0]
        return not (other_qemu or self.command or self.extra_arguments)

    def run_name(self) -> str:
        """The name, or the one that the image's directory suggests."""
        return self.name or self.image.resolve().name.removesuffix(".qpc")


async def restore(
    options: RestoreOptions,
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None = None,
) -> Session:
    """Restores and serves until the guest has all of its memory; returns the detached session.

    SIGTERM and SIGINT are taken over where this runs in the main thread.  Cancelling it when there
    is a guest leaves that waiting for another sidecar.

    Raises:
        PostcopyError: before there is a guest (the session's state says how far it came): nothing
            was lost.
        GuestEndedError: QEMU ended while it was served.
    """
    from qemu_postcopy.image.image import Image

    image = Image.open(options.image)
    launched = None
    if options.qmp is None:
        launched = LaunchedSession(image, run, options.session, listener)
    session = launched or Session(image, run, options.session, listener)
    control = ControlServer(run.control_socket, handlers(session))
    with ending_by_signals(session):
        try:
            if options.verify:
                await verify_image(image)
            if launched is not None:
                as_recorded = options.launches_as_recorded(image.manifest)
                argv = command_line(image.manifest, options, run)
                await launched.launch(argv, as_recorded=as_recorded)
            elif options.qmp is not None:
                await session.find(options.qmp)
            session.attach()
            session.serve()
            if launched is not None:
                await launched.begin_to_load()
            await control.start()
            await session.load_device_state()
            if not options.paused:
                await resume(session)
            await serve_to_the_end(session)
            return session
        except GuestEndedError:
            raise
        except Exception as error:
            if not session.has_guest():
                raise
            await serve_on(session, error)
        finally:
            await control.close()
            await session.close()
            run.release()


async def resume(session: Session) -> None:
    """Lets the guest run.  One that cannot (another process holds its disk) is told of, and served:
    its operator lets it run later."""
    try:
        await session.resume()
    except (MismatchError, StateError, QmpError) as error:
        if not session.has_guest():
            raise
        log.warning("%s", error.message)
        session.tell_failure(error)


async def serve_to_the_end(session: Session) -> None:
    """From the moment when the guest runs until it needs no sidecar any more."""
    complete = asyncio.Event()
    # A guest that waits for a page under QEMU's lock keeps QEMU from answering.
    going_on = asyncio.create_task(_after_first_steps(session, complete))
    try:
        await session.wait_complete()
        complete.set()
        await going_on
    finally:
        going_on.cancel()
        await asyncio.wait({going_on})
    if damage := session.damage():
        session.tell_failure(ContentError(damage, hint="see its log for what was plugged in"))
    session.detach()


async def _after_first_steps(session: Session, complete: asyncio.Event) -> None:
    """Begins to fill what nobody asks for, and asks QEMU a few questions, and leaves its monitor to
    others: not while the guest does its first steps, which all that would slow down.  From then on
    it is looked what is plugged in."""
    if session.has_just_begun():
        with suppress(TimeoutError):
            async with asyncio.timeout(FIRST_STEPS_SECONDS):
                await complete.wait()
    session.start_background()
    await session.learn_threads()
    watch = PlugWatch(session)
    await watch.begin(session.connection)
    if not session.has_own_monitor():
        await session.release_monitor()
    await watch.watch(complete, session.connection)


async def serve_on(session: Session, error: Exception, mapper: str = "QEMU") -> NoReturn:
    """There is a guest, and data of it is missing: whatever went wrong in its control plane, it is
    served until it has ended, and its operator told.

    Raises: GuestEndedError then.
    """
    log.error("the control plane failed; the guest is served on without it", exc_info=error)
    session.tell_failure(error)
    session.start_background()
    await session.wait_gone()
    raise GuestEndedError(
        f"{session.run.name} ended while it was served: {mapper} has ended",
        hint="restore its image again, if it was not to end",
        vm=session.run.name,
    ) from None


@contextmanager
def ending_by_signals(session: Session) -> Iterator[None]:
    """SIGTERM and SIGINT end a restore that has no guest yet, and hurry one that has: the rest is
    filled at full speed, then it detaches.  SIGQUIT has a sidecar in the background serve on, so
    that this process is free; SIGHUP (the terminal is gone) changes nothing.  A guest is never
    abandoned."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None

    def end() -> None:
        if session.has_guest() and session.pager is not None:
            log.warning("asked to end: filling the rest, then detaching")
            session.fill_at_full_speed()
        else:
            log.warning("asked to end before there was a guest")
            task.cancel()

    def leave() -> None:
        if session.has_lease():
            # It would end with this program, and not begin anew before the other is there.
            log.warning("the save file must not be let go: filling the rest, then detaching")
            end()
        elif session.has_guest() and session.pager is not None:
            session.leave(lambda: serve_in_background(session.run))
        else:
            end()

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: end,
        signal.SIGINT: end,
        signal.SIGQUIT: leave,
        signal.SIGHUP: lambda: log.warning("the terminal is gone: serving on"),
    }
    with suppress(ValueError, RuntimeError):  # not in the main thread: signals are the caller's
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        with suppress(ValueError, RuntimeError):
            for number in handlers:
                loop.remove_signal_handler(number)


def serve_in_background(run: RunDirectory) -> None:
    """Replaces this process by `recover`, which starts a sidecar that takes over, and returns.

    A process with threads cannot go to the background itself.  Its lock, its pager and its copy of
    the descriptor end with the exec; the guest waits for as long as a take-over takes.
    """
    os.environ["QEMU_POSTCOPY_RUN_DIR"] = str(run.path.parent)
    command = [sys.executable, "-P", "-m", "qemu_postcopy", "recover", run.name]
    os.execv(command[0], command)


async def verify_image(image: Image) -> None:
    """Checks all hashes in a thread, which a cancellation ends."""
    cancelled = threading.Event()

    def progress(done: int, total: int) -> None:
        if cancelled.is_set():
            raise OperationCancelledError("the restore was interrupted")

    try:
        await asyncio.to_thread(image.verify, progress)
    except asyncio.CancelledError:
        cancelled.set()
        raise


def command_line(manifest: Any, options: RestoreOptions, run: RunDirectory) -> list[str]:
    """The QEMU command line of a restore, without monitor.

    Raises:
        UsageError: the image does not say how to launch its guest, and neither do the options.
    """
    from qemu_postcopy.vm.spec import restore_arguments

    argv = list(options.command)
    if not argv:
        recorded = manifest.launch.get("argv")
        if not recorded:
            raise UsageError(
                "the image does not say how its guest was launched",
                hint="give the QEMU command line: qemu-postcopy restore IMAGE -- qemu-system-... ",
            )
        # Files of the guest's old run directory (its console) are to be in the new one.
        old = manifest.launch.get("run_directory")
        argv = [part.replace(f"{old}/", f"{run.path}/") if old else part for part in recorded]
        if not all(isinstance(part, str) for part in argv):
            raise MismatchError("the recorded command line is damaged")
    argv = restore_arguments(argv, manifest.machine)
    if not options.paused:
        # QEMU itself lets the guest run as soon as its state is loaded.
        argv.remove("-S")
    if options.qemu is not None:
        argv[0] = options.qemu
    argv += options.extra_arguments
    log.info("launching %s", shlex.join(argv))
    return argv


def handlers(session: Session) -> dict[str, Any]:
    async def status(_: dict[str, Any]) -> dict[str, Any]:
        if session.look_again is not None:
            await session.look_again()
        return describe(session)

    async def background(request: dict[str, Any]) -> dict[str, Any]:
        enabled, rate = request.get("enabled"), request.get("rate", 0)
        if not isinstance(enabled, bool) or not isinstance(rate, int) or not 0 <= rate < 1 << 60:
            raise UsageError('"enabled" must be true or false, "rate" bytes per second')
        session.set_background(enabled, rate)
        return {}

    async def chaos(request: dict[str, Any]) -> dict[str, Any]:
        enabled = request.get("enabled")
        if enabled is not None and not isinstance(enabled, bool):
            raise UsageError('"enabled" must be true, false or null')
        if not session.chaos_sources:
            raise StateError(
                "page data does not fail on purpose here: there was no --chaos",
                hint="restore or attach with --chaos FILE",
            )
        for source in session.chaos_sources:
            if enabled is None:
                source.release()
            else:
                source.enable(enabled)
        return {}

    return {"status": status, "background": background, "chaos": chaos}


def describe(session: Session) -> dict[str, Any]:
    """What `status` tells of a session, as JSON has it."""
    statistics = asdict(session.statistics())
    statistics["state"] = session.statistics().state.name.lower()
    return {
        "name": session.run.name,
        "state": str(session.state),
        "pid": session.identity.pid if session.identity else 0,
        "image": str(session.image.shown_path),
        "trouble": session.trouble(),
        "chaos": _chaos(session),
        "statistics": statistics,
        **session.told(),
    }


def _chaos(session: Session) -> dict[str, Any] | None:
    """The schedule that page data fails by and what came of it; None where there is none."""
    schedule = session.options.chaos
    if schedule is None:
        return None
    counts = [asdict(source.counts()) for source in session.chaos_sources]
    totals = {key: sum(count[key] for count in counts) for key in (counts[0] if counts else ())}
    return {"schedule": str(schedule.path), **totals}


def with_name(options: RestoreOptions) -> RestoreOptions:
    """The same options with the name filled in."""
    return replace(options, name=options.run_name())
