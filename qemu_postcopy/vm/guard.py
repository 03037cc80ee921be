"""Lets a guest run on if the process that migrates it dies at the wrong moment.

QEMU resumes a guest by itself when a migration fails, but leaves it stopped after one that
completed; a snapshot tool killed between the end of the stream and its `cont` would leave the guest
standing.  The guard is a process of its own, in a session of its own, that waits on a pipe: one
byte says that all went well, the end of the file that its principal died.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from types import TracebackType
from typing import Self

from qemu_postcopy.errors import PostcopyError

log = logging.getLogger(__name__)

#: Seconds to wait until QEMU is out of a migration whose reader has died.
SETTLE_SECONDS = 60.0
LEAVE_ALONE = b"."


class Guard:
    """Context in which the guest behind a monitor is made to run on if this process dies.

    Args:
        monitor: address of the guest's (:func:`qemu_postcopy.vm.monitor.connect`); the guard
            connects only when it is needed.
    """

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor
        self._pipe = -1
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        read_end, self._pipe = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self._monitor],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read_end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process is not None
        try:
            os.write(self._pipe, LEAVE_ALONE)
        except BrokenPipeError:
            log.warning("the guard has ended early; nobody would have resumed the guest for us")
        os.close(self._pipe)
        self._process.wait()


async def resume(monitor: str) -> None:
    """Waits until QEMU is out of its migration, then lets the guest run."""
    from qemu_postcopy.vm.migration import let_run, settled
    from qemu_postcopy.vm.monitor import connect

    async with (
        await connect(monitor, SETTLE_SECONDS) as qmp,
        asyncio.timeout(SETTLE_SECONDS),
    ):
        await settled(qmp)
        await let_run(qmp)


def main() -> int:
    """The guard process; its standard input is the pipe."""
    if os.read(0, 1) == LEAVE_ALONE:
        return 0
    try:
        asyncio.run(resume(sys.argv[1]))
    except (PostcopyError, TimeoutError):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
