"""QEMU's monitor over its socket: commands, events, descriptors.

A thin layer over qemu.qmp's asyncio client; runs in the event loop of its caller.  Trusts the
peer to be the QEMU that the socket's path names, and no answer further than its type: what is
missing or of another type ends in a QmpError that quotes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
)
from qemu.qmp import Message as QmpMessage
from qemu.qmp import StateError as QmpStateError

from qemu_postcopy.errors import AttachError, QmpError
from qemu_postcopy.vm.monitor import CommandError, Message, Monitor
from qemu_postcopy.vm.opening import Opening, OpeningReader, key_of

CONNECT_SECONDS = 10.0
#: Put into a listener's queue when nothing can follow: qemu.qmp itself would wait for ever.
CONNECTION_ENDED = QmpMessage({"event": "(connection ended)"})
#: sockaddr_un holds 108 bytes with the terminating NUL (unix(7)).
SOCKET_PATH_BYTES = 107


class Listener:
    """Events from the moment of its making on; see :meth:`Qmp.listen`."""

    def __init__(self, inner: EventListener, lost: QmpError) -> None:
        self._inner = inner
        self._lost = lost

    async def wait(
        self,
        predicate: Callable[[Message], bool] | None = None,
        timeout: float | None = None,
    ) -> Message:
        """The next event that fits; earlier ones are dropped.

        Raises: QmpError when the connection ends or ``timeout`` seconds have passed.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    event = await self._inner.get()
                    if event is CONNECTION_ENDED:
                        await self._inner.put(CONNECTION_ENDED)
                        raise self._lost
                    if predicate is None or predicate(event):
                        return event
        except TimeoutError as error:
            raise QmpError(
                f"QEMU did not report within {timeout} s what was waited for",
                hint="Look at the guest's state by query-status and at QEMU's log.",
            ) from error


class Qmp(Monitor):
    """One monitor connection.  Made by :meth:`connect`; to be used in one event loop."""

    def __init__(self, client: QMPClient, label: str) -> None:
        self._client = client
        self._label = label
        self._peer_pid = 0
        self._listeners: list[EventListener] = []
        self._watcher: asyncio.Task[None] | None = None
        # Answers that came with the opening; each is used once.
        self._ahead: dict[str, Message] = {}
        #: QEMU's version, such as (7, 2, 22), and the distribution's name of the package
        self.version: tuple[int, int, int] = (0, 0, 0)
        self.package = ""

    @classmethod
    async def connect(
        cls,
        address: Path | str | socket.socket,
        timeout: float = CONNECT_SECONDS,
        asked: OpeningReader | None = None,
    ) -> Qmp:
        """Connects and negotiates.

        Args:
            address: the socket's path, or a stream socket that is connected already (then owned
                by this object).
            timeout: in seconds, for connection and greeting. A monitor serves one client at a
                time: a second one waits for a greeting that does not come.
            asked: reads the answers to what was written to that socket before, and
                :meth:`execute` finds them here.

        Raises: QmpError
        """
        label = "its socket" if isinstance(address, socket.socket) else str(address)
        if isinstance(address, Path | str) and len(str(address).encode()) > SOCKET_PATH_BYTES:
            raise QmpError(
                f"the socket's path is longer than {SOCKET_PATH_BYTES} bytes: {address}",
                hint="Use a shorter directory, or a symbolic link to it.",
            )
        client = QMPClient()
        # Its own reports at error level would repeat what our exceptions say.
        client.logger.setLevel("CRITICAL")
        # Its default listener would keep every event for ever.
        client.events.event_filter = lambda event: False
        qmp = cls(client, label)
        target = address if isinstance(address, socket.socket) else str(address)
        opening: Opening | None = None
        try:
            async with asyncio.timeout(timeout):
                if asked is not None:
                    opening = await asked.answers()
                    client.await_greeting = client.negotiate = False
                await client.connect(target)
        except TimeoutError as error:
            raise QmpError(
                f"no greeting from QEMU on {label} within {timeout:g} s",
                hint="A monitor serves one client at a time: another may be connected; or QEMU "
                "is stopped, or busy.",
            ) from error
        except (QMPError, OSError) as error:
            cause = error.exc if isinstance(error, ConnectError) else error
            raise QmpError(
                f"cannot talk to QEMU on {label}: {cause or type(cause).__name__}",
                hint="Check that QEMU runs and that the path is its QMP socket.",
            ) from error
        if opening is not None:
            qmp._ahead = opening.answers
            qmp._read_version(opening.greeting["QMP"]["version"])
        elif client.greeting is not None:
            qmp._read_version(client.greeting.QMP.version)
        qmp._read_peer()
        qmp._watcher = asyncio.create_task(qmp._watch_end())
        return qmp

    async def _watch_end(self) -> None:
        while self._client.runstate == Runstate.RUNNING:
            await self._client.runstate_changed()
        for listener in self._listeners:
            await listener.put(CONNECTION_ENDED)

    def _read_version(self, described: Mapping[str, Any]) -> None:
        numbers = described["qemu"]
        self.version = (numbers["major"], numbers["minor"], numbers["micro"])
        self.package = described["package"]

    def _read_peer(self) -> None:
        transport = self._client._writer.transport  # type: ignore[union-attr]
        peer = transport.get_extra_info("socket")
        if peer.family == socket.AF_UNIX:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self._peer_pid = struct.unpack("iII", credentials)[0]

    def peer_pid(self) -> int:
        """The process that listens on the socket (SO_PEERCRED, unix(7)): QEMU, if it made it.

        Raises AttachError where the socket was made elsewhere (TCP, a proxy, another PID
        namespace).
        """
        if not self._peer_pid:
            raise AttachError(
                f"the process behind {self._label} cannot be told",
                hint="Give QEMU's PID as well.",
            )
        return self._peer_pid

    async def close(self) -> None:
        """Ends the connection; QEMU stays. Never fails."""
        # An error here says that the connection was lost before: nothing is left to end.
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        if self._watcher is not None:
            await self._watcher

    def _lost(self) -> QmpError:
        return QmpError(
            f"the connection to QEMU on {self._label} has ended",
            hint="QEMU has exited or closed its monitor: its log says why.",
        )

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        """Runs a command and returns what QEMU returned.

        Raises: CommandError with QEMU's words; QmpError when the connection is lost or no answer
        came within ``timeout`` seconds.
        """
        if (answer := self._answered_ahead(command, arguments)) is not None:
            if "error" in answer:
                error_class, said = answer["error"]["class"], answer["error"]["desc"]
                raise CommandError(command, error_class, said)
            return answer["return"]
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, dict(arguments) if arguments else None)
        except TimeoutError as error:
            raise QmpError(
                f"QEMU did not answer {command} within {timeout:g} s",
                hint="Its main loop is blocked: is its memory still being served?",
            ) from error
        except ExecuteError as error:
            raise CommandError(command, error.error_class, str(error)) from error
        except (ExecInterruptedError, QmpStateError, EOFError, OSError) as error:
            raise self._lost() from error
        except QMPError as error:
            raise QmpError(
                f"QEMU's answer to {command} is not understood: {error}",
                hint="Check that the socket is a QMP monitor.",
            ) from error

    def _answered_ahead(self, command: str, arguments: Mapping[str, Any] | None) -> Message | None:
        return self._ahead.pop(key_of(command, arguments), None) if self._ahead else None

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[Listener]:
        """Collects the events of these names (all if none) from here on, before the command
        that brings them about is sent."""
        if self._client.runstate != Runstate.RUNNING:
            raise self._lost()
        inner = EventListener((*names, "(connection ended)") if names else None)
        self._listeners.append(inner)
        try:
            with self._client.listen(inner):
                yield Listener(inner, self._lost())
        finally:
            self._listeners.remove(inner)

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Gives QEMU a copy of an open file under this name (`fd:NAME`; ``getfd`` by SCM_RIGHTS).

        A descriptor that had this name is closed by QEMU.
        """
        question = "getfd", {"fdname": name}
        if key_of(*question) in self._ahead:  # it went with the question
            await self.execute(*question)
            return
        try:
            self._client.send_fd_scm(descriptor)
        except (QMPError, OSError) as error:
            raise QmpError(
                f"cannot pass a descriptor over {self._label}: {error}",
                hint="Descriptors pass over Unix sockets only.",
            ) from error
        await self.execute(*question)
