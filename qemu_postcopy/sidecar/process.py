"""Running a restore in a process of its own, and being told how it goes.

The command line tool forks the sidecar off before anything slow is imported; the child leads its
own session, writes its log into the run directory and reports each step over a pipe, one JSON
object a line, for as long as somebody reads it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any, NoReturn

from qemu_postcopy import errors
from qemu_postcopy.restore import RestoreOptions, describe, restore
from qemu_postcopy.session import GUEST_STATES, Session, State, StateChange
from qemu_postcopy.sidecar.rundir import RunDirectory

if TYPE_CHECKING:
    from qemu_postcopy.libvirt.restore import LibvirtRestoreOptions, Saved

log = logging.getLogger(__name__)


#: States that a sidecar reports of a guest that is not taken back any more.
LEFT = (*GUEST_STATES, State.DETACHED)


@dataclass
class Sidecar:
    """A sidecar that was started: its PID, and its reports until it ends or is left alone."""

    pid: int
    reports: IO[str]

    def events(self) -> Iterator[dict[str, Any]]:
        """Its reports, in order, until it ends.

        Raises:
            PostcopyError: what made the restore fail, as the sidecar raised it.
            GuestEndedError: QEMU ended before it had all of its memory.
            SidecarError: it died without a word.
        """
        ended = False
        for line in self.reports:
            event = json.loads(line)
            if event["event"] == "error":
                raise _error_from(event)
            ended = event["event"] == "end"
            yield event
        if not ended:
            raise errors.SidecarError(
                f"the sidecar (PID {self.pid}) died",
                hint="its log in the run directory may say why",
            )

    def interrupt(self, run: RunDirectory) -> NoReturn:
        """Has it take back what it has begun, if there is no guest yet, and tells what came of it.

        Raises:
            OperationCancelledError: nothing is left of it.
            LeftRunningError: there is a guest; it is filled at full speed, then left.
            PostcopyError: it failed or ended meanwhile, as :meth:`events` has it.
        """
        # It leads a session of its own, so the terminal's interrupt did not reach it.
        os.kill(self.pid, signal.SIGTERM)
        try:
            for event in self.events():
                if event.get("state") in LEFT:
                    raise self.left(f"{run.name} runs on and is filled by PID {self.pid}")
        except KeyboardInterrupt:
            raise self.left(f"{run.name} is still being ended by PID {self.pid}") from None
        except errors.SidecarError:
            if run.read_record(missing_ok=True) is not None:
                raise
        raise errors.OperationCancelledError("interrupted", hint="nothing had begun") from None

    def left(self, what: str) -> errors.LeftRunningError:
        """What a command raises that is interrupted while this goes on."""
        return errors.LeftRunningError(f"interrupted: {what}", hint="see: qemu-postcopy status")


def _error_from(event: dict[str, Any]) -> errors.PostcopyError:
    kind = getattr(errors, event["class"], errors.PostcopyError)
    if kind is errors.LaunchError:
        return errors.LaunchError(
            event["message"], command=[], returncode=None, output="", hint=event["hint"]
        )
    error: errors.PostcopyError = kind(event["message"], hint=event["hint"])
    return error


Job = Callable[[Callable[[StateChange], None]], Coroutine[Any, Any, Session]]


def restoring(options: RestoreOptions, run: RunDirectory) -> Job:
    """The job of a sidecar that restores; rights that it needs no more are dropped for good."""
    own = replace(options, session=replace(options.session, drop_rights=True))
    return lambda listener: restore(own, run, listener)


def restoring_domain(options: LibvirtRestoreOptions, saved: Saved, run: RunDirectory) -> Job:
    """The job of a sidecar that restores through libvirt."""
    from qemu_postcopy.libvirt.restore import restore_domain

    own = replace(options, session=replace(options.session, drop_rights=True))
    return lambda listener: restore_domain(own, saved, run, listener)


def recovering(run: RunDirectory) -> Job:
    """The job of a sidecar that takes over from a dead one."""
    from qemu_postcopy.recover import recover

    return lambda listener: recover(run, listener, drop_rights=True)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C counts at the end of the block, when it is known which sidecar was started."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def spawn(job: Job, run: RunDirectory) -> Sidecar:
    """Forks the sidecar.  Only for a process with a single thread, and no event loop running.

    Another program starts ``qemu-postcopy restore`` as a command, or awaits
    :func:`qemu_postcopy.restore.restore` and serves by itself.
    """
    read_end, write_end = os.pipe()
    try:
        pid = os.fork()
    except OSError:
        os.close(read_end)
        os.close(write_end)
        raise
    if pid:
        os.close(write_end)
        return Sidecar(pid, os.fdopen(read_end))
    status = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see interrupts_held
        os.close(read_end)
        os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        output = os.open(run.sidecar_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        status = serve(job, os.fdopen(write_end, "w", buffering=1))
    finally:
        sys.stderr.flush()
        os._exit(status)


def serve(job: Job, reports: IO[str]) -> int:
    """Does the job in this process; returns the exit status."""

    def report(event: str, **details: Any) -> None:
        with suppress(OSError, ValueError):  # nobody listens any more
            reports.write(json.dumps({"event": event, **details}) + "\n")

    def changed(change: StateChange) -> None:
        if change.failure is not None:
            failures.append(change.failure)
            tell(change.failure)
            return
        log.info("%s after %.3f s", change.state, change.elapsed)
        report("state", state=str(change.state), elapsed=change.elapsed)

    def tell(error: errors.PostcopyError) -> None:
        kind = type(error).__name__
        report("error", **{"class": kind}, message=error.message, hint=error.hint)

    #: those that the guest was served on after
    failures: list[errors.PostcopyError] = []

    try:
        session = asyncio.run(job(changed))
    except errors.GuestEndedError as error:
        log.warning("%s", error.message)
        tell(error)
        return error.exit_code
    except errors.PostcopyError as error:
        log.error("%s", error)
        tell(error)
        return error.exit_code
    except asyncio.CancelledError:
        interrupted = errors.OperationCancelledError("interrupted before a guest was served")
        tell(interrupted)
        return interrupted.exit_code
    except OSError as error:
        log.exception("the host refused something")
        refused = errors.HostError(
            f"this host refused the sidecar something: {error}",
            hint="look at the caller's limits (ulimit -a) and at the room on file systems",
        )
        tell(refused)
        return refused.exit_code
    except Exception as error:
        log.exception("the sidecar failed")
        tell(errors.SidecarError(f"internal error: {error!r}"))
        return errors.SidecarError.exit_code
    report("end", **describe(session))
    return failures[0].exit_code if failures else 0
