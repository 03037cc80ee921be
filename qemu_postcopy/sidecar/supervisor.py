"""Watching over a sidecar: when it dies and its guest needs one, another takes over.

The supervisor sleeps on the lock of the run directory, which the kernel lets go of when the sidecar
ends, however it ends.  It holds no data of the guest; if it is killed itself, the guest is as well
off as without one, and ``qemu-postcopy supervise`` starts another.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress

from qemu_postcopy.errors import GuestEndedError, PostcopyError
from qemu_postcopy.recover import needs_sidecar
from qemu_postcopy.sidecar.process import interrupts_held, recovering, spawn
from qemu_postcopy.sidecar.rundir import RunDirectory

log = logging.getLogger(__name__)

#: Between two attempts that failed, or sidecars that died soon: the guest waits meanwhile, and
#: `status` says why.
FIRST_PAUSE_SECONDS = 0.1
LAST_PAUSE_SECONDS = 30.0
#: A sidecar that lives for less died of what will kill the next one too.
SOON_SECONDS = 5.0


def supervise(run: RunDirectory, said: Callable[[str], None] = log.warning) -> None:
    """Returns when the guest needs no sidecar any more: it has all of its memory, or has ended, or
    its directory is another guest's now."""
    pause = FIRST_PAUSE_SECONDS
    failures = 0
    while True:
        began = time.monotonic()
        try:
            if not _wait_needed(run, said):
                return
            began = time.monotonic()
            trouble = _take_over(run, said)
        except (OSError, ValueError, PostcopyError) as error:
            # No process or descriptor to be had, a record that cannot be read now, half a report.
            trouble = error.message if isinstance(error, PostcopyError) else str(error)
            said(f"{run.name} cannot be watched over just now: {trouble}")
        if not trouble and time.monotonic() - began >= SOON_SECONDS:
            pause, failures = FIRST_PAUSE_SECONDS, 0
            run.supervisor_notes.unlink(missing_ok=True)
            continue
        failures += 1
        note(run, failures, trouble or "sidecars die soon after they took over: see sidecar.log")
        time.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE_SECONDS)


def _wait_needed(run: RunDirectory, said: Callable[[str], None]) -> bool:
    """Returns when nobody serves the guest: whether it needs another sidecar."""
    try:
        if not run.wait_unserved():
            return False
        record = run.read_record(missing_ok=True)
    finally:
        run.release()
    if record is None or not needs_sidecar(run, record):
        run.supervisor_notes.unlink(missing_ok=True)
        return False
    said(f"the sidecar of {run.name} has died (PID {record.sidecar_pid}): taking over")
    return True


def _take_over(run: RunDirectory, said: Callable[[str], None]) -> str:
    """Returns when the new sidecar has ended: why it could not take over, or an empty string."""
    trouble = ""
    with interrupts_held():  # what is asked to end is this process
        sidecar = spawn(recovering(run), run)
    try:
        for event in sidecar.events():
            if event.get("state") in ("running", "gone"):
                said(f"{run.name} is served by PID {sidecar.pid}")
                break
    except GuestEndedError as error:
        said(error.message)
    except PostcopyError as error:
        trouble = error.message
        said(f"{run.name} cannot be taken over: {trouble}")
    sidecar.reports.close()
    with suppress(ChildProcessError):
        os.waitpid(sidecar.pid, 0)
    return trouble


def note(run: RunDirectory, failures: int, trouble: str) -> None:
    """For `status`: how often it went wrong in a row, and why last."""
    with suppress(OSError):
        run.supervisor_notes.write_text(json.dumps({"failures": failures, "trouble": trouble}))


def start(run: RunDirectory) -> int:
    """Forks a supervisor that outlives its caller's terminal; returns its PID.

    Only for a process with a single thread, and no event loop running.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        run.release()
        null = os.open("/dev/null", os.O_RDWR)
        output = os.open(run.sidecar_log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        supervise(run)
    except Exception:
        log.exception("the supervisor of %s has failed", run.name)
    finally:
        os._exit(0)
