"""What every way of talking to a QEMU's monitor has in common.

A subclass sends commands and collects events (:mod:`qemu_postcopy.vm.qmp` over a socket,
:mod:`qemu_postcopy.libvirt.monitor` through libvirt); the questions that are asked of a QEMU are
here.  Runs in the event loop of its caller; no answer is trusted further than its type.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from qemu_postcopy.errors import PostcopyError, QmpError

log = logging.getLogger(__name__)

#: One message of QEMU's, as JSON gives it.
Message = Mapping[str, Any]


class CommandError(QmpError):
    """QEMU answered a command with an error.  ``command``; ``error_class``; ``description``."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(
            f"QEMU refused {command}: {description}",
            hint="Its log may say more.",
        )
        self.command = command
        self.error_class = error_class
        self.description = description


@dataclass(frozen=True)
class Disk:
    device: str
    filename: str
    driver: str
    read_only: bool


class EventListener(Protocol):
    """Events from the moment of its making on; see :meth:`Monitor.listen`."""

    async def wait(
        self,
        predicate: Callable[[Message], bool] | None = None,
        timeout: float | None = None,
    ) -> Message:
        """The next event that fits; earlier ones are dropped.

        Raises: QmpError when ``timeout`` seconds have passed; it, or LibvirtError, when the
        connection ends.
        """


class Monitor(ABC):
    """A QEMU's monitor; to be used in one event loop."""

    #: QEMU's version, such as (7, 2, 22)
    version: tuple[int, int, int]

    @abstractmethod
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

    @abstractmethod
    def listen(self, *names: str) -> AbstractContextManager[EventListener]:
        """Collects the events of these names (all if none) from here on, before the command
        that brings them about is sent."""

    @abstractmethod
    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Gives QEMU a copy of an open file under this name (`fd:NAME`).

        A descriptor that had this name is closed by QEMU.
        """

    @abstractmethod
    async def close(self) -> None:
        """Ends the connection; QEMU stays. Never fails."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def human(self, command_line: str) -> str:
        """Runs a command of the human monitor and returns its text."""
        text: str = await self.execute("human-monitor-command", {"command-line": command_line})
        return text

    async def wait_event(
        self,
        names: Iterable[str],
        predicate: Callable[[Message], bool] | None = None,
        timeout: float | None = None,
    ) -> Message:
        """The next event from now on that fits; use :meth:`listen` around a command."""
        with self.listen(*names) as listener:
            return await listener.wait(predicate, timeout)

    async def events(self, *names: str) -> AsyncIterator[Message]:
        """Events of these names (all if none) until the connection ends, which is a QmpError."""
        with self.listen(*names) as listener:
            while True:
                yield await listener.wait()

    # ---- facts about this QEMU ----

    async def status(self) -> str:
        """`running`, `paused`, `inmigrate`, ... (RunState of QEMU's QAPI)."""
        status: str = (await self.execute("query-status"))["status"]
        return status

    async def target(self) -> str:
        """The guest's architecture, such as `x86_64` or `aarch64`."""
        arch: str = (await self.execute("query-target"))["arch"]
        return arch

    async def machine_type(self) -> str:
        """The machine type by its versioned name, such as `pc-i440fx-7.2`, never an alias."""
        kind: str = await self.execute("qom-get", {"path": "/machine", "property": "type"})
        return kind.removesuffix("-machine")

    async def memory_backends(self) -> list[Message]:
        """`query-memdev`; each has `id`, `size` (bytes), `share`, `prealloc`."""
        backends: list[Message] = await self.execute("query-memdev")
        return backends

    async def disks(self) -> list[Disk]:
        """The media that are inserted now."""
        found = []
        for entry in await self.execute("query-block"):
            medium = entry.get("inserted")
            if medium is not None:
                found.append(
                    Disk(
                        device=entry.get("device") or entry.get("qdev", ""),
                        filename=medium["image"]["filename"],
                        driver=medium["drv"],
                        read_only=medium["ro"],
                    )
                )
        return found

    @contextlib.asynccontextmanager
    async def migration_capabilities(self, **wanted: bool) -> AsyncIterator[None]:
        """Sets capabilities (`x_ignore_shared=True` for `x-ignore-shared`), and back at the end."""
        now = {
            entry["capability"]: entry["state"]
            for entry in await self.execute("query-migrate-capabilities")
        }
        names = {name.replace("_", "-"): state for name, state in wanted.items()}
        changed = {name: state for name, state in names.items() if now.get(name) != state}
        before = {name: now[name] for name in changed}
        await self._set_capabilities(changed)
        async with _afterwards(lambda: self._set_capabilities(before)):
            yield

    async def _set_capabilities(self, states: Mapping[str, bool]) -> None:
        if states:
            entries = [{"capability": name, "state": state} for name, state in states.items()]
            await self.execute("migrate-set-capabilities", {"capabilities": entries})

    @contextlib.asynccontextmanager
    async def migration_parameters(self, **wanted: Any) -> AsyncIterator[None]:
        """Sets parameters (`max_bandwidth=0`), and back at the end.

        One that had no value before keeps the new one: QEMU cannot unset it.
        """
        now = await self.execute("query-migrate-parameters")
        names = {name.replace("_", "-"): value for name, value in wanted.items()}
        changed = {name: value for name, value in names.items() if now.get(name) != value}
        before = {name: now[name] for name in changed if name in now}
        await self._set_parameters(changed)
        async with _afterwards(lambda: self._set_parameters(before)):
            yield

    async def _set_parameters(self, values: Mapping[str, Any]) -> None:
        if values:
            await self.execute("migrate-set-parameters", values)


@contextlib.asynccontextmanager
async def _afterwards(put_back: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Puts something back at the end; whatever went wrong before is the error that is raised."""
    try:
        yield
    except BaseException:
        try:
            await put_back()
        except PostcopyError as error:
            log.info("migration settings were not put back: %s", error.message)
        raise
    await put_back()


async def connect(address: str, timeout: float) -> Monitor:
    """The monitor at an address: the path of its socket, or libvirt:URI#UUID.

    Raises:
        QmpError, LibvirtError: nobody answers there within ``timeout`` seconds.
    """
    from pathlib import Path

    from qemu_postcopy.libvirt.monitor import ADDRESS_SCHEME, LibvirtMonitor
    from qemu_postcopy.vm.qmp import Qmp

    if address.startswith(ADDRESS_SCHEME):
        return await LibvirtMonitor.at(address, timeout)
    return await Qmp.connect(Path(address), timeout)
