"""A connection to libvirt's daemon for asyncio: calls, errors and events.

First step of everything that goes through libvirt.  libvirt-python blocks, so each call runs in a
thread; events come in by a thread of their own that runs libvirt's default event loop, one for the
process and for good (libvirt cannot change it: virEventRegisterDefaultImpl).  The daemon is
trusted as far as the operator's own virsh would be.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from qemu_postcopy.errors import HostError, LibvirtError

log = logging.getLogger(__name__)

_events_lock = threading.Lock()
_events_running = False
#: How a connection that is dead is noticed: seconds between probes, and probes without answer.
KEEPALIVE_SECONDS = 5
KEEPALIVE_COUNT = 6


def load() -> Any:
    """The module ``libvirt``.

    Raises:
        HostError: libvirt-python is not installed.
    """
    try:
        import libvirt
    except ImportError as error:
        raise HostError(
            f"libvirt-python is missing: {error}",
            hint="pip install 'qemu-postcopy[libvirt]'; it is compiled, with gcc, pkg-config, "
            "libvirt-dev and Python's headers",
        ) from error
    return libvirt


def _run_events() -> None:
    libvirt = load()
    while True:
        with suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


def start_events() -> None:
    """Starts the process's one event thread; to be done before a connection is opened."""
    global _events_running
    with _events_lock:
        if _events_running:
            return
        libvirt = load()
        # Its handler prints every error to stderr; ours are raised.
        libvirt.registerErrorHandler(lambda context, error: None, None)
        libvirt.virEventRegisterDefaultImpl()
        threading.Thread(target=_run_events, name="qpc-libvirt", daemon=True).start()
        _events_running = True


def error_of(error: Any, what: str) -> LibvirtError:
    """libvirt's error as ours; ``what`` was asked for."""
    libvirt = load()
    code = error.get_error_code()
    hints = {
        libvirt.VIR_ERR_NO_DOMAIN: "see: virsh list --all",
        libvirt.VIR_ERR_NO_CONNECT: "the URI is not one of libvirt's QEMU driver: qemu:///system",
        libvirt.VIR_ERR_OPERATION_TIMEOUT: "another operation on the domain is under way: "
        "see virsh domjobinfo",
    }
    hint = hints.get(code, "libvirt's log (journalctl -u libvirtd, -u virtqemud) may say more")
    if code == libvirt.VIR_ERR_SYSTEM_ERROR and "connect" in str(error):
        hint = "is libvirtd (or virtqemud) running, and may this user talk to it?"
    return LibvirtError(f"libvirt: {what}: {error.get_error_message()}", code=code, hint=hint)


def ssh_trial(uri: str) -> str:
    """The command that must work without a question before a URI by ssh does; empty for others."""
    parts = urlsplit(uri)
    transport = parts.scheme.partition("+")[2]
    if transport not in ("ssh", "libssh", "libssh2") or not parts.hostname:
        return ""
    port = f"-p {parts.port} " if parts.port else ""
    user = f"{parts.username}@" if parts.username else ""
    key = dict(parse_qsl(parts.query)).get("keyfile")
    identity = f"-i {key} " if key else ""
    return f"ssh -o BatchMode=yes {identity}{port}{user}{parts.hostname} true"


def require_local(uri: str, command: str = "") -> None:
    """Refuses a URI whose guests run elsewhere: their memory is served on the host they run on.

    Args:
        command: what was asked for, as it is to be asked for there, without --connect.

    Raises: LibvirtError, which says what to run where.
    """
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    if driver not in ("", "qemu"):
        raise _no_qemu(uri, driver)
    if not parts.hostname and transport in ("", "unix"):
        return
    path = "session" if parts.path == "/session" else "system"
    words = ["qemu-postcopy", *command.split(" ", 1)]
    words.insert(2, f"--connect qemu:///{path}")
    there = " ".join(words) if command else f"qemu-postcopy there, with --connect qemu:///{path}"
    if command and transport in ("ssh", "libssh", "libssh2") and parts.hostname:
        where = f"{parts.username}@{parts.hostname}" if parts.username else parts.hostname
        there = f"ssh {f'-p {parts.port} ' if parts.port else ''}{where} {there}"
    raise LibvirtError(
        f"{uri} leads to another host: a guest's memory is served on the host that it runs on",
        hint=f"run: {there}" if there.startswith("ssh") else f"run there: {there}",
    )


def _no_qemu(uri: str, driver: str) -> LibvirtError:
    return LibvirtError(
        f"{uri} is libvirt's driver {driver}, which runs no QEMU",
        hint="give --connect qemu:///system or qemu:///session",
    )


class Connection:
    """One connection; made by :meth:`open`, to be used in one event loop.

    Attributes: ``handle`` is libvirt's virConnect, ``uri`` as given.
    """

    def __init__(self, handle: Any, uri: str) -> None:
        self.handle = handle
        self.uri = uri
        self._ended = False
        self._to_tell: list[Callable[[], None]] = []

    @classmethod
    async def open(cls, uri: str) -> Self:
        """Connects.

        Raises:
            HostError: libvirt-python is missing.
            LibvirtError: no daemon answers there.
        """
        libvirt = load()
        start_events()
        try:
            handle = await asyncio.to_thread(libvirt.open, uri)
            with suppress(libvirt.libvirtError):  # not every transport has it
                handle.setKeepAlive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
        except libvirt.libvirtError as error:
            failure = error_of(error, f"cannot connect to {uri}")
            if trial := ssh_trial(uri):
                failure.hint = (
                    f"this must work as the user who runs the command: {trial}; and libvirtd must "
                    "run there"
                )
            raise failure from error
        made = cls(handle, uri)
        with suppress(libvirt.libvirtError):
            # One callback is all that a connection can have (virConnectRegisterCloseCallback).
            await asyncio.to_thread(handle.registerCloseCallback, made._tell_end, None)
        return made

    def _tell_end(self, *_: Any) -> None:
        """libvirt's callback, in its event thread: the daemon has gone, or does not answer."""
        self._ended = True
        for tell in list(self._to_tell):
            tell()

    @contextmanager
    def telling_end(self, tell: Callable[[], None]) -> Iterator[None]:
        """Context in which ``tell`` is called when the connection ends, or at once if it has.

        In any thread, and maybe more than once.
        """
        self._to_tell.append(tell)
        try:
            if self._ended:
                tell()
            yield
        finally:
            self._to_tell.remove(tell)

    async def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Runs a call of libvirt-python in a thread.

        Cancelling the task does not end the call.

        Raises:
            LibvirtError: with ``what`` and libvirt's words.
        """
        libvirt = load()
        try:
            return await asyncio.to_thread(function, *arguments)
        except libvirt.libvirtError as error:
            raise error_of(error, what) from error

    async def domain(self, name: str) -> Any:
        """The virDomain of a name or UUID.

        Raises:
            LibvirtError: there is none.
        """
        libvirt = load()
        try:
            return await asyncio.to_thread(self.handle.lookupByName, name)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                raise error_of(error, f"cannot look {name} up") from error
        return await self.call(f"no domain {name}", self.handle.lookupByUUIDString, name)

    def require_local(self) -> None:
        """LibvirtError unless it is QEMU's on this host, whatever name or alias the URI was."""
        libvirt = load()
        try:
            driver, uri = self.handle.getType(), self.handle.getURI()
        except libvirt.libvirtError as error:
            raise error_of(error, f"cannot ask {self.uri} what it is") from error
        if driver != "QEMU":
            raise _no_qemu(self.uri, driver)
        require_local(uri)

    @asynccontextmanager
    async def events(
        self, domain: Any, *kinds: str
    ) -> AsyncIterator[asyncio.Queue[tuple[str, tuple[Any, ...]]]]:
        """Events of a domain, as (kind, details) in a queue.

        Args:
            domain: None for those of all.
            kinds: the end of libvirt's names, such as ``LIFECYCLE`` or ``MIGRATION_ITERATION``;
                details are the arguments that libvirt's callback has after the domain.
        """
        libvirt = load()
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[str, tuple[Any, ...]]] = asyncio.Queue()

        def told(_: Any, who: Any, *details: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, (details[-1], details[:-1]))

        numbers = []
        try:
            for kind in kinds:
                event = getattr(libvirt, f"VIR_DOMAIN_EVENT_ID_{kind}")
                numbers.append(
                    await self.call(
                        "cannot subscribe to events",
                        self.handle.domainEventRegisterAny,
                        domain,
                        event,
                        told,
                        kind,
                    )
                )
            yield queue
        finally:
            for number in numbers:
                with suppress(libvirt.libvirtError):
                    await asyncio.to_thread(self.handle.domainEventDeregisterAny, number)

    async def close(self) -> None:
        """Ends the connection; never fails."""
        libvirt = load()
        with suppress(libvirt.libvirtError):
            # It holds a reference, so that nothing would be closed.
            await asyncio.to_thread(self.handle.unregisterCloseCallback)
        with suppress(libvirt.libvirtError):
            await asyncio.to_thread(self.handle.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


def qemu_of(name: str, holding: tuple[int, int] | None = None) -> int:
    """The PID of a domain's QEMU on this host, or 0.

    Told by its command line (``-name guest=NAME,...``), or by a file that it holds open.

    Args:
        holding: device and inode of that file; it alone decides then.
    """
    wanted = f"guest={name.replace(',', ',,')}"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if not (entry / "exe").readlink().name.startswith("qemu-"):
                continue
            if holding is not None:
                if _holds(entry, holding):
                    return int(entry.name)
                continue
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        names = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "-name"]
        if any(text == wanted or text.startswith(f"{wanted},") for text in names):
            return int(entry.name)
    return 0


def _holds(process: Path, file: tuple[int, int]) -> bool:
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):
            found = descriptor.stat()
            if (found.st_dev, found.st_ino) == file:
                return True
    return False
