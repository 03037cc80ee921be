"""Questions for a QEMU that is still starting: written before it can answer, read when it has.

QEMU reads its monitor only when its machine is built, 30 to 50 ms after it was started, and then
answers everything that waits there in one go: so a launch costs no round trip per question.  Runs
in the caller's event loop, on the socket pair of a launch; afterwards qemu.qmp has the socket.
Trusts QEMU to answer in order (docs/interop/qmp-spec: without out-of-band execution it does).
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qemu_postcopy.errors import QmpError

#: A command and its arguments.
Question = tuple[str, Mapping[str, Any] | None]

READ_BYTES = 1 << 16
#: More than any greeting and all answers together; what is longer is no QEMU.
LONGEST_OPENING_BYTES = 16 << 20


@dataclass(frozen=True)
class Opening:
    """QEMU's ``greeting``, and its ``answers`` (each with `return` or `error`) by question."""

    greeting: Mapping[str, Any]
    answers: dict[str, Mapping[str, Any]]


def key_of(command: str, arguments: Mapping[str, Any] | None) -> str:
    """What an answer is filed under."""
    return json.dumps([command, arguments or {}], sort_keys=True)


def ask_ahead(
    monitor: socket.socket, questions: Sequence[Question], descriptor: int | None = None
) -> None:
    """Writes the negotiation and the questions; they wait in the socket until QEMU reads them.

    ``descriptor`` goes along, for a `getfd` among the questions; it stays the caller's.
    """
    words = [_command("qmp_capabilities", None), *(_command(*question) for question in questions)]
    data = "".join(words).encode()
    # In one piece, which fits into any socket buffer: QEMU keeps a descriptor that came with it
    # until a `getfd` takes it (tcp_chr_recv, chardev/char-socket.c).
    sent = socket.send_fds(monitor, [data], [] if descriptor is None else [descriptor])
    assert sent == len(data)


class OpeningReader:
    """Reads what :func:`ask_ahead` has asked: first that QEMU is there, then all the answers.

    Nothing is taken from the socket beyond the last answer but whole events, of which there are
    none that matter before the end of a load.
    """

    def __init__(self, monitor: socket.socket, questions: Sequence[Question]) -> None:
        self._monitor = monitor
        self._questions = questions
        self._greeting: Mapping[str, Any] | None = None
        self._answers: list[Mapping[str, Any]] = []
        self._rest = b""
        self._total_bytes = 0

    async def ready(self) -> Mapping[str, Any]:
        """The greeting, as soon as QEMU has also answered: its machine is built then, and it does
        what it is asked.

        Raises:
            QmpError: QEMU closed its monitor, refused to negotiate, or sent what is no QMP.
        """
        while not self._answers:
            await self._read()
        if self._greeting is None or "return" not in self._answers[0]:
            raise _unusable("it does not negotiate")
        return self._greeting

    async def answers(self) -> Opening:
        """The greeting and every answer, as soon as the last one is there.

        Raises: QmpError, as :meth:`ready`.
        """
        greeting = await self.ready()
        while len(self._answers) <= len(self._questions) or self._rest:
            await self._read()
        if len(self._answers) != len(self._questions) + 1:
            raise _unusable("it answers what was not asked")
        return Opening(
            greeting,
            {
                key_of(*question): answer
                for question, answer in zip(self._questions, self._answers[1:], strict=True)
            },
        )

    async def _read(self) -> None:
        self._monitor.setblocking(False)
        try:
            data = await asyncio.get_running_loop().sock_recv(self._monitor, READ_BYTES)
        except OSError as error:
            raise _unusable(str(error)) from error
        self._total_bytes += len(data)
        if not data:
            raise _unusable("it closed its monitor")
        if self._total_bytes > LONGEST_OPENING_BYTES:
            raise _unusable("its answers have no end")
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            message = _message(line)
            if "QMP" in message:
                self._greeting = message
            elif "return" in message or "error" in message:
                self._answers.append(message)
            elif "event" not in message:
                raise _unusable(f"it says what fits no question: {line[:200]!r}")


def _command(command: str, arguments: Mapping[str, Any] | None) -> str:
    """As few bytes as can be: QEMU reads a QMP monitor byte by byte, 4 us each (monitor_can_read,
    monitor/monitor.c).  Hence no number either: answers come in the order of the questions."""
    words = (
        {"execute": command, "arguments": dict(arguments)} if arguments else {"execute": command}
    )
    return json.dumps(words, separators=(",", ":"))


def _message(line: bytes) -> Mapping[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise _unusable(f"what it says is no QMP: {line[:200]!r}")
    return message


def _unusable(reason: str) -> QmpError:
    return QmpError(
        f"cannot talk to the QEMU that was started: {reason}",
        hint="Check that the program is a QEMU, and what it wrote into its log.",
    )
