"""A domain's QEMU monitor, reached through libvirt (virDomainQemuMonitorCommand).

Stands in for the monitor's socket, which libvirt keeps for itself.  What libvirt keeps account of
(running, stopped, ended) is asked of libvirt and not of QEMU, so that its picture stays true.  A
command waits until no other operation on the domain is under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from qemu_postcopy.errors import LibvirtError, QmpError
from qemu_postcopy.libvirt.connection import Connection, error_of, load
from qemu_postcopy.vm.monitor import CommandError, Message, Monitor

#: What a monitor's address begins with, in ``session.json``: libvirt:URI#UUID.
ADDRESS_SCHEME = "libvirt:"
#: Put into a listener's queue when nothing can follow.
CONNECTION_ENDED: Message = {"event": "(connection ended)"}


def address_of(uri: str, uuid: str) -> str:
    """The address by which :meth:`LibvirtMonitor.at` finds a domain's monitor again."""
    return f"{ADDRESS_SCHEME}{uri}#{uuid}"


class LibvirtListener:
    """Events of one domain from the moment of its making on."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def ended(self) -> None:
        """Nothing can follow: the connection has ended.  In any thread."""
        self._put(CONNECTION_ENDED)

    def _put(self, message: Message) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._queue.put_nowait, message)

    def told(self, _: Any, __: Any, event: str, seconds: int, us: int, text: str, ___: Any) -> None:
        """libvirt's callback, in its event thread."""
        message = {
            "event": event,
            "data": json.loads(text) if text else {},
            "timestamp": {"seconds": seconds, "microseconds": us},
        }
        self._put(message)

    async def wait(
        self,
        predicate: Callable[[Message], bool] | None = None,
        timeout: float | None = None,
    ) -> Message:
        """The next event that fits; earlier ones are dropped.

        Raises: LibvirtError when the connection ends; QmpError when ``timeout`` seconds have
        passed.
        """
        try:
            async with asyncio.timeout(timeout):
                while True:
                    event = await self._queue.get()
                    if event is CONNECTION_ENDED:
                        self._queue.put_nowait(CONNECTION_ENDED)
                        raise LibvirtError(
                            "libvirt's daemon has gone, or does not answer any more",
                            hint="is libvirtd (or virtqemud) running? virsh domstate says what "
                            "the guest does",
                        )
                    if predicate is None or predicate(event):
                        return event
        except TimeoutError as error:
            raise QmpError(
                f"QEMU did not report within {timeout} s what was waited for",
                hint="see: virsh domstate, and QEMU's log in /var/log/libvirt/qemu",
            ) from error


class LibvirtMonitor(Monitor):
    """The monitor of an active domain."""

    def __init__(self, connection: Connection, domain: Any, *, owns_connection: bool) -> None:
        self.connection = connection
        self.domain = domain
        self._owns_connection = owns_connection
        self.version = (0, 0, 0)

    @classmethod
    async def of(cls, connection: Connection, domain: Any) -> LibvirtMonitor:
        """Of a domain that is active; asks for QEMU's version.

        Raises:
            LibvirtError: it is not active, or the connection cannot do so.
        """
        monitor = cls(connection, domain, owns_connection=False)
        await monitor._greet()
        return monitor

    @classmethod
    async def at(cls, address: str, timeout: float) -> LibvirtMonitor:
        """Connects to what :func:`address_of` has named.

        Raises:
            LibvirtError: no daemon answers, or there is no such domain.
            QmpError: no answer within ``timeout`` seconds.
        """
        uri, _, uuid = address.removeprefix(ADDRESS_SCHEME).rpartition("#")
        connection = await Connection.open(uri)
        try:
            monitor = cls(connection, await connection.domain(uuid), owns_connection=True)
            async with asyncio.timeout(timeout):
                await monitor._greet()
        except TimeoutError as error:
            await connection.close()
            raise QmpError(
                f"no answer from QEMU through {uri} within {timeout:g} s",
                hint="another operation on the domain may be under way: see virsh domjobinfo",
            ) from error
        except BaseException:
            await connection.close()
            raise
        return monitor

    async def _greet(self) -> None:
        numbers = (await self.execute("query-version"))["qemu"]
        self.version = (numbers["major"], numbers["minor"], numbers["micro"])

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        known = {"cont": "resume", "stop": "suspend", "quit": "destroy"}
        if command in known:
            try:
                await self._call(command, getattr(self.domain, known[command]))
            except LibvirtError as error:
                raise CommandError(command, "GenericError", error.message) from error
            return {}
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = dict(arguments)
        return await self._ask(command, message, None, timeout)

    async def _ask(
        self,
        command: str,
        message: dict[str, Any],
        descriptor: int | None,
        timeout: float | None = None,
    ) -> Any:
        load()
        import libvirt_qemu

        text = json.dumps(message)
        try:
            async with asyncio.timeout(timeout):
                if descriptor is None:
                    reply = await self._call(
                        command, libvirt_qemu.qemuMonitorCommand, self.domain, text, 0
                    )
                else:
                    reply, _ = await self._call(
                        command,
                        libvirt_qemu.qemuMonitorCommandWithFiles,
                        self.domain,
                        text,
                        [descriptor],
                        0,
                    )
        except TimeoutError as error:
            raise QmpError(
                f"QEMU did not answer {command} within {timeout:g} s",
                hint="Its main loop is blocked: is its memory still being served?",
            ) from error
        answer = json.loads(reply)
        if "error" in answer:
            raise CommandError(command, answer["error"]["class"], answer["error"]["desc"])
        return answer["return"]

    async def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        return await self.connection.call(what, function, *arguments)

    @contextlib.contextmanager
    def listen(self, *names: str) -> Iterator[LibvirtListener]:
        libvirt = load()
        import libvirt_qemu

        listener = LibvirtListener()
        handle = self.connection.handle
        numbers = []
        try:
            for name in names or (None,):
                numbers.append(
                    libvirt_qemu.qemuMonitorEventRegister(
                        handle, self.domain, name, listener.told, None, 0
                    )
                )
            with self.connection.telling_end(listener.ended):
                yield listener
        except libvirt.libvirtError as error:
            raise error_of(error, "cannot subscribe to QEMU's events") from error
        finally:
            for number in numbers:
                with contextlib.suppress(libvirt.libvirtError):
                    libvirt_qemu.qemuMonitorEventDeregister(handle, number)

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        message = {"execute": "getfd", "arguments": {"fdname": name}}
        await self._ask("getfd", message, descriptor)

    async def close(self) -> None:
        if self._owns_connection:
            await self.connection.close()
