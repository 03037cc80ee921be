"""Lets a guest run on if the process that migrates it dies at the wrong moment, or loses it.

QEMU resumes a guest by itself when a migration fails, but leaves it stopped after one that
completed; a snapshot tool killed between the end of the stream and its `cont` would leave the guest
standing, and so would one whose libvirtd has gone.  The guard is a process of its own, in a session
of its own, that waits on a pipe: one byte says that the guest is as it is to be, the end of the
file that it is not, or that the principal died.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from qemu_postcopy.errors import LibvirtError, PostcopyError, StateError

log = logging.getLogger(__name__)

#: Seconds to wait until QEMU is out of a migration whose reader has died.
SETTLE_SECONDS = 60.0
#: How long a guest is tried to be reached: libvirtd may be away for an upgrade.
REACH_SECONDS = 600.0
#: The same where libvirt says that it is gone.
GONE_SECONDS = 5.0
RETRY_SECONDS = 0.5
#: How long the principal waits for the outcome.
OUTCOME_SECONDS = 60.0
#: libvirt's VIR_ERR_NO_DOMAIN, and VIR_ERR_OPERATION_INVALID: it is not running.
GONE_CODES = (42, 55)
LEAVE_ALONE = b"."


class Guard:
    """Context in which the guest behind a monitor is made to run on if this process dies.

    Likewise at the end of the context, unless :meth:`dismiss` was called before.

    Args:
        monitor: address of the guest's (:func:`qemu_postcopy.vm.monitor.connect`); the guard
            connects only when it is needed.
        settings: of :func:`qemu_postcopy.vm.migration.settings_of`, to be put back.
    """

    def __init__(self, monitor: str, settings: Mapping[str, Any]) -> None:
        self._monitor = monitor
        self._settings = settings
        self._pipe = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._dismissed = False

    def __enter__(self) -> Self:
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self._monitor, json.dumps(self._settings)],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_end)
        return self

    def dismiss(self) -> None:
        """The guest is known to be as it is to be: it is left alone."""
        self._dismissed = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        if self._dismissed:
            try:
                os.write(self._pipe, LEAVE_ALONE)
            except BrokenPipeError:
                log.warning("the guard has ended early; nobody would have resumed the guest for us")
        os.close(self._pipe)
        if self._dismissed:
            self._process.wait()
            return
        log.warning("it is not known whether the guest runs on: it is reached anew for that")
        try:
            ended = self._process.wait(OUTCOME_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning(
                "it cannot be reached yet; process %d goes on trying for %g minutes",
                self._process.pid,
                REACH_SECONDS / 60,
            )
        else:
            log.warning("it could not be made to run" if ended else "it runs")


async def resume(monitor: str, settings: Mapping[str, Any]) -> None:
    """Waits until QEMU is out of its migration, then lets the guest run.

    Raises:
        PostcopyError, TimeoutError: it cannot be reached, is gone, or cannot run.
    """
    began = time.monotonic()
    while True:
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await _resume_once(monitor, settings)
            return
        except StateError:
            raise  # shut down, or crashed
        except (PostcopyError, TimeoutError) as error:
            if time.monotonic() - began > _patience(error):
                raise
        await asyncio.sleep(RETRY_SECONDS)


async def _resume_once(monitor: str, settings: Mapping[str, Any]) -> None:
    from qemu_postcopy.vm.migration import let_run, put_back, settled
    from qemu_postcopy.vm.monitor import connect

    async with await connect(monitor, SETTLE_SECONDS) as qmp:
        await settled(qmp)
        await let_run(qmp)
        await put_back(qmp, settings)


def _patience(error: Exception) -> float:
    """How long to try in spite of that, in seconds."""
    cause = error.__cause__
    if isinstance(getattr(cause, "exc", cause), ConnectionRefusedError | FileNotFoundError):
        return 0.0  # nobody listens at QEMU's own socket any more
    if isinstance(error, LibvirtError) and error.code in GONE_CODES:
        return GONE_SECONDS
    return REACH_SECONDS


def main() -> int:
    """The guard process; its standard input is the pipe."""
    if os.read(0, 1) == LEAVE_ALONE:
        return 0
    try:
        asyncio.run(resume(sys.argv[1], json.loads(sys.argv[2])))
    except (PostcopyError, TimeoutError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
