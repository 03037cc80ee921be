"""A guest's console, read as it comes: for whoever waits for a guest to say something.

The serial line of the guest writes into a FIFO (`-serial file:PATH`); this end collects what comes,
with the time at which it came.  Runs in the caller's event loop; the output is kept in a file too.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

READ_BYTES = 65536


class Console:
    """The reading end of a guest's console.

    Args:
        fifo: made if it is not there; give its path to QEMU.
        log: file that everything is appended to.
        listener: called with each piece as it comes.
    """

    def __init__(
        self, fifo: Path, log: Path, listener: Callable[[bytes], None] | None = None
    ) -> None:
        self.fifo = fifo
        self._listener = listener
        if not fifo.exists():
            os.mkfifo(fifo, 0o600)
        # Open for writing too: QEMU's end must not wait for us, and its end is not ours.
        self._descriptor = os.open(fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._log = log.open("ab", buffering=0)
        self._changed = asyncio.Event()
        #: all output since :meth:`forget`
        self.output = b""
        #: CLOCK_MONOTONIC, in nanoseconds, of the first whole line since :meth:`forget`, which is
        #: the second line break: the first ends a line that began before.  0: none yet.
        self.first_line_ns = 0
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._read)

    def _read(self) -> None:
        now = time.monotonic_ns()
        try:
            piece = os.read(self._descriptor, READ_BYTES)
        except BlockingIOError:
            return
        self.output += piece
        if not self.first_line_ns and self.output.count(b"\n") >= 2:
            self.first_line_ns = now
        self._log.write(piece)
        if self._listener is not None:
            self._listener(piece)
        self._changed.set()

    def forget(self) -> None:
        """Drops what was read; what is still in the FIFO too."""
        self._read()
        self.output = b""
        self.first_line_ns = 0

    async def wait_for(self, condition: Callable[[bytes], bool], timeout: float) -> None:
        """Waits until ``condition(self.output)`` holds; TimeoutError after ``timeout`` seconds."""
        async with asyncio.timeout(timeout):
            while not condition(self.output):
                self._changed.clear()
                await self._changed.wait()

    def close(self) -> None:
        """Stops reading; the FIFO stays."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
            self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
