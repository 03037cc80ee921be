"""The keyboard and the signals of ``top``, as one stream of events; the terminal is given back as
it was found, however the program ends that can still do so.

For the main thread.  Nothing is raised in the middle of a line that is being drawn: Ctrl-C,
SIGTERM, SIGHUP and a change of the terminal's size are events like keys.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import termios
import tty
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

QUIT = "quit"
RESIZED = "resized"
NEWS = "news"
UP, DOWN = "up", "down"
#: What terminals send for the cursor keys, in both of their modes.
SEQUENCES = {b"\x1b[A": UP, b"\x1bOA": UP, b"\x1b[B": DOWN, b"\x1bOB": DOWN}
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def keys(data: bytes) -> list[str]:
    """What was pressed: letters as they are, cursor keys by name, other sequences not at all."""
    found = []
    while data:
        for sequence, name in SEQUENCES.items():
            if data.startswith(sequence):
                found.append(name)
                data = data[len(sequence) :]
                break
        else:
            if data[:1] == b"\x1b":
                return found  # a key that means nothing here; it comes in one piece
            found.append(data[:1].decode("latin-1"))
            data = data[1:]
    return found


class Keyboard:
    """Keys without Enter and without echo, for as long as the context lasts.

    Args:
        descriptor: a terminal.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ended = 0
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)

    def __enter__(self) -> Self:
        self._attributes = termios.tcgetattr(self._descriptor)
        self._handlers = {
            number: signal.signal(number, self._handle) for number in (*ENDING, signal.SIGWINCH)
        }
        tty.setcbreak(self._descriptor, termios.TCSANOW)
        # Ctrl-Z would leave the shell with this program's screen.
        changed = termios.tcgetattr(self._descriptor)
        changed[6][termios.VSUSP] = os.fpathconf(self._descriptor, "PC_VDISABLE").to_bytes()
        termios.tcsetattr(self._descriptor, termios.TCSANOW, changed)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._attributes)
        except termios.error:
            pass  # the terminal is gone
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._wake_read.close()
            self._wake_write.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in ENDING:
            self._ended += 1
            if self._ended > 1:
                raise KeyboardInterrupt  # the terminal takes no output, so the first did not help
        self.wake(b"r" if number == signal.SIGWINCH else b"q")

    def wake(self, what: bytes = b"n") -> None:
        """Has :meth:`wait` return.  From any thread, and from signal handlers."""
        with suppress(OSError):  # full: it returns anyway; or closed
            self._wake_write.send(what)

    def wait(self) -> list[str]:
        """The next events, oldest first: keys, NEWS, RESIZED, QUIT."""
        if self._ended:
            return [QUIT]
        woken = self._wake_read.fileno()
        readable, _, _ = select.select([self._descriptor, woken], [], [])
        events: list[str] = []
        if woken in readable:
            words = {b"n": NEWS, b"r": RESIZED, b"q": QUIT}
            told = self._wake_read.recv(4096)
            events += [word for letter, word in words.items() if letter in told]
        if self._descriptor in readable:
            try:
                data = os.read(self._descriptor, 256)
            except OSError:
                data = b""  # EIO: the terminal is gone
            events += keys(data) if data else [QUIT]
        return events
