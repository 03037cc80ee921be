"""The sidecar's control socket: one line of JSON asked, one line of JSON answered.

The socket is 0600 and lies in the run directory; besides, the peer's credentials are checked, so
that a socket made readable by accident does not give the guest away.  Nothing a client sends is
trusted: lines are bounded, commands are looked up in a table, arguments are checked by type.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qemu_postcopy.errors import PostcopyError, SidecarError, UsageError

LONGEST_LINE = 65536
#: Seconds a client waits for an answer.
ANSWER_TIMEOUT = 10.0
UCRED = struct.Struct("3i")

Handler = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlServer:
    """Answers on a UNIX socket until closed.  Runs in the sidecar's event loop.

    Args:
        path: where to listen; must not exist.
        handlers: what each command does, by name; raises :class:`PostcopyError` to refuse.
    """

    def __init__(self, path: Path, handlers: dict[str, Handler]) -> None:
        self.path = path
        self.handlers = handlers
        self._server: asyncio.Server | None = None
        self._made: os.stat_result | None = None

    async def start(self) -> None:
        """Binds and listens."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        # fchmod on an unbound socket sets the mode that bind() gives the file.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(self.path))
        self._made = self.path.lstat()
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=LONGEST_LINE
        )

    async def close(self) -> None:
        """Stops listening and removes the socket, if it is still this one that lies there."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with suppress(FileNotFoundError):
                if self._made is not None and os.path.samestat(self._made, self.path.lstat()):
                    self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            peer = writer.get_extra_info("socket")
            _, uid, _ = UCRED.unpack(
                peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            )
            if uid not in (0, os.geteuid()):
                return
            while line := await reader.readline():
                answer = await self._answer(line)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (OSError, ValueError):
            pass  # the client went away, or sent an endless line (ValueError of readline)
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            return _refusal(UsageError("not a line of JSON"))
        if not isinstance(request, dict) or not isinstance(request.get("command"), str):
            return _refusal(UsageError('expected an object with "command"'))
        handler = self.handlers.get(request["command"])
        if handler is None:
            known = ", ".join(sorted(self.handlers))
            return _refusal(UsageError(f"unknown command; known are: {known}"))
        try:
            return {"ok": True, **await handler(request)}
        except PostcopyError as error:
            return _refusal(error)


def _refusal(error: PostcopyError) -> dict[str, Any]:
    return {
        "ok": False,
        "error": type(error).__name__,
        "message": error.message,
        "hint": error.hint,
    }


def ask(
    path: Path,
    command: str,
    *,
    timeout: float = ANSWER_TIMEOUT,
    owner: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Asks the sidecar behind ``path``; blocking, at most ``timeout`` seconds for each step.

    Args:
        owner: the user whose sidecar it is, where root asks.

    Raises:
        SidecarError: nobody answers there, it belongs to somebody else, or it refused.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as client:
            client.settimeout(timeout)
            client.connect(str(path))
            _, uid, _ = UCRED.unpack(
                client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            )
            if uid not in (0, os.geteuid(), owner):
                raise SidecarError(f"{path} is served by user {uid}, who is not to be trusted")
            client.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with client.makefile("rb") as stream:
                line = stream.readline(LONGEST_LINE * 16)
    except OSError as error:
        raise SidecarError(
            f"no sidecar answers at {path}: {error}",
            hint="it may have finished (`qemu-postcopy status` tells) or died (see its log there)",
        ) from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise SidecarError(f"the sidecar at {path} ended without an answer") from error
    if not isinstance(answer, dict) or not answer.get("ok"):
        message = answer.get("message", "") if isinstance(answer, dict) else ""
        hint = answer.get("hint", "") if isinstance(answer, dict) else ""
        raise SidecarError(f"the sidecar refused: {message}", hint=hint)
    return answer
