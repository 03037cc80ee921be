"""The gate that a launched QEMU's device state waits behind: a pipe that `-incoming fd:` reads.

Step "load" of a launch.  QEMU begins to load as soon as it has started and something is let in,
without a command and its round trip, and cannot finish, so cannot let the guest run, before the
end of the sections is.  If we die before that, QEMU finds the pipe's end, takes the stream for
broken, and ends: there was no guest yet.  Not so within the description behind the sections, which
QEMU does not need: see device_state.end_of_sections.  Runs in the caller's event loop; rests on
qemu_loadvm_state (migration/savevm.c).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Sequence

#: As much as the kernel lets everybody put into a pipe (/proc/sys/fs/pipe-max-size by default).
PIPE_BYTES = 1 << 20


class Gate:
    """A stream into a QEMU that is about to be launched.

    Attributes: reader, the end for QEMU, which closes with :meth:`close_reader`.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._writer, False)  # QEMU's own end has flags of its own
        with contextlib.suppress(OSError):  # a smaller pipe is slower and works
            fcntl.fcntl(self._writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def put_into(self, argv: Sequence[str]) -> list[str]:
        """The command line with the gate for `-incoming defer`."""
        words = [*argv]
        words[words.index("-incoming") + 1] = f"fd:{self.reader}"
        return words

    def let_in_now(self, stream: int, begin: int, end: int) -> int:
        """As many of the bytes ``begin`` to ``end`` of the file ``stream`` as there is room for in
        the pipe; returns up to where.

        A QEMU that has ended takes everything; that is for others to notice.
        """
        try:
            while begin < end:
                begin += os.splice(stream, self._writer, end - begin, offset_src=begin)
        except BlockingIOError:
            return begin
        except BrokenPipeError:
            return end
        return begin

    async def let_in(self, stream: int, begin: int, end: int) -> None:
        """All of them, as QEMU takes them."""
        while (begin := self.let_in_now(stream, begin, end)) < end:
            await self._writable()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(self._writer, writable.set)
        try:
            await writable.wait()
        finally:
            loop.remove_writer(self._writer)

    def close_reader(self) -> None:
        """When QEMU has its own; a second call does nothing."""
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def close(self) -> None:
        """QEMU finds the end of the stream; a second call does nothing."""
        self.close_reader()
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1
