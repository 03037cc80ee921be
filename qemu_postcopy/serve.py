"""``qemu-postcopy serve``: pages the memory of a VMM that hands its own userfaultfd over.

    listen -> the VMM connects and sends regions and descriptor -> serve -> complete
    -> serve on until the VMM ends, or detach

Firecracker's handshake is spoken (``vm/handshake.py``), so a microVM resumed with an Uffd back-end
is served by the same pager, ledger, status and control socket as a QEMU.  The VMM has registered
its memory itself and keeps its descriptor open: if this process dies the guest waits.  One event
loop; what comes over the socket is not trusted, and the peer's user is checked before it is read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from qemu_postcopy.cli import size
from qemu_postcopy.errors import (
    GuestEndedError,
    HandshakeError,
    HostError,
    OperationCancelledError,
    PostcopyError,
)
from qemu_postcopy.image.memory_file import MemoryFile, region_name
from qemu_postcopy.paging import registration
from qemu_postcopy.restore import handlers
from qemu_postcopy.session import Session, SessionOptions, State, StateChange
from qemu_postcopy.sidecar.control import ControlServer
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.handshake import HandshakeReader, Region, check_within
from qemu_postcopy.vm.kernel_faults import require_kernel_faults, require_registered
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)

#: From the connection to the end of the message.
MESSAGE_SECONDS = 10.0
READ_BYTES = 1 << 16
#: More than the one that is right, so that further ones are seen and closed.
DESCRIPTORS_READ = 16
UCRED = struct.Struct("3i")


class _HungUpError(HandshakeError):
    """The VMM went away before its message was whole; another may come."""


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, to whom.

    Attributes:
        handshake: where the socket is made; must not exist, or be a socket nobody listens on.
        image: an image's directory, or a raw memory file.
        name: of the run directory; None: the image's file name.
        uid: the VMM's user beside root and ours; the socket is then given to that user.
        detach: leave when every page with data is there, instead of serving on.
        accept_seconds: how long to wait for the VMM; 0 for ever.
    """

    handshake: Path
    image: Path
    name: str | None = None
    uid: int | None = None
    detach: bool = False
    accept_seconds: float = 0.0
    session: SessionOptions = field(default_factory=SessionOptions)

    def run_name(self) -> str:
        """The name, or the one that the image suggests."""
        return self.name or self.image.resolve().name.removesuffix(".qpc")


@dataclass(frozen=True)
class Handshake:
    """A VMM that has handed over: who it is, its regions, and its userfaultfd, which is ours."""

    identity: ProcessIdentity
    regions: list[Region]
    userfaultfd: int


class HandoverSession(Session):
    """A session whose descriptor and layout come from the VMM itself."""

    def __init__(
        self,
        memory: MemoryFile,
        handshake: Handshake,
        run: RunDirectory,
        options: SessionOptions,
        listener: Callable[[StateChange], None] | None = None,
    ) -> None:
        super().__init__(memory.view(handshake.regions), run, options, listener)
        self.attached_by = "handshake"
        self._handshake = handshake

    def take(self) -> None:
        """Makes the descriptor and the regions the session's own."""
        self._require(State.FOUND)
        regions = self._handshake.regions
        self.identity = self._handshake.identity
        self._cleanup.callback(self.identity.close)
        self._userfaultfd = self._handshake.userfaultfd
        self._cleanup.callback(os.close, self._userfaultfd)
        os.set_blocking(self._userfaultfd, False)
        self._layout = [
            RamBlock(
                name=region_name(index),
                backend_id=region_name(index),
                address=region.address,
                size_bytes=region.size_bytes,
                page_size_bytes=region.page_size_bytes,
                backing="anonymous",
                shared=False,
                file_key=None,
                file_path=None,
                file_offset_bytes=0,
            )
            for index, region in enumerate(regions)
        ]
        self._enter(State.FOUND)

    def attach(self) -> None:
        """Nothing is to be taken: all came with the handshake."""
        self._enter(State.ATTACHED)

    def _register(self) -> None:
        """The VMM has negotiated and registered, with the modes that it wants."""

    async def load_device_state(self) -> None:
        """The VMM loads its own, and may have touched memory already."""
        self._require(State.LOADED)
        self._load_begun = True
        self._enter(State.LOADED)

    async def resume(self) -> None:
        """The VMM lets its guest run when it likes."""
        self._enter(State.RUNNING)

    def gone(self) -> None:
        """The VMM has ended after it had all of its memory."""
        self._enter(State.GONE)


def listen(path: Path, uid: int | None) -> socket.socket:
    """A stream socket of mode 0600, of that user where one is given.

    Raises:
        HostError: it cannot be made there, or somebody listens there already.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other, suppress(OSError):
                other.connect(str(path))
                raise HostError(f"somebody listens at {path} already", hint="choose another path")
            path.unlink()
        # fchmod on an unbound socket sets the mode that bind() gives the file.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        if uid is not None:
            os.chown(path, uid, -1)
        listener.listen(4)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise HostError(
            f"cannot listen at {path}: {error.strerror or error}",
            hint="choose another path; a socket's may have 107 bytes",
        ) from error
    except BaseException:
        listener.close()
        raise
    return listener


async def accept(
    listener: socket.socket, uids: Sequence[int]
) -> tuple[socket.socket, ProcessIdentity]:
    """The first peer that belongs to one of these users, and lives."""
    loop = asyncio.get_running_loop()
    while True:
        channel, _ = await loop.sock_accept(listener)
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
        pid, uid, _ = UCRED.unpack(credentials)
        if uid in uids:
            try:
                return channel, ProcessIdentity.open(pid)
            except PostcopyError as error:
                log.warning("a VMM connected and ended: %s", error.message)
        else:
            log.warning("process %d of user %d is not to be served: see --uid", pid, uid)
        channel.close()


async def read_handshake(channel: socket.socket) -> tuple[list[Region], int]:
    """The regions, and the userfaultfd, which is the caller's.

    Raises:
        HandshakeError: no whole message within MESSAGE_SECONDS, one that makes no sense, or with
            another descriptor than one userfaultfd.
    """
    channel.setblocking(False)
    reader = HandshakeReader()
    received: list[int] = []
    try:
        async with asyncio.timeout(MESSAGE_SECONDS):
            whole = False
            while not whole:
                await _readable(channel)
                try:
                    data, descriptors, flags, _ = socket.recv_fds(
                        channel, READ_BYTES, DESCRIPTORS_READ, socket.MSG_CMSG_CLOEXEC
                    )
                except BlockingIOError:
                    continue
                except ConnectionError:
                    data, descriptors, flags = b"", [], 0
                received += descriptors
                try:
                    whole = reader.feed(data, len(descriptors), flags)
                except HandshakeError as error:
                    raise error if data else _HungUpError(error.message, hint=error.hint) from error
        regions = reader.regions()
        if not registration.is_userfaultfd(received[0]):
            raise HandshakeError(
                "the handshake came with another descriptor than a userfaultfd",
                hint="the VMM must send the userfaultfd that it has registered its memory with",
            )
        return regions, received.pop()
    except TimeoutError as error:
        raise HandshakeError(
            f"the VMM has connected and not sent a whole handshake in {MESSAGE_SECONDS:g} s",
            hint="look at the VMM: its guest cannot run without one",
        ) from error
    finally:
        for descriptor in received:
            os.close(descriptor)


async def _readable(channel: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(channel, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(channel)


async def serve(
    options: ServeOptions,
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None = None,
    listening: Callable[[], None] | None = None,
) -> Session:
    """Serves one VMM to its end, or until it has all of its memory and is left.

    SIGTERM and SIGINT end the wait for a VMM; once there is one, its memory is filled at full
    speed, and it is left when all of it is there.

    Args:
        listener: called at each change of state.
        listening: called when a VMM may connect.

    Returns:
        the session, GONE or DETACHED.

    Raises:
        HandshakeError: what the VMM sent cannot be served; it waits and had better be ended.
        GuestEndedError: the VMM ended before it had all of its memory.
        OperationCancelledError: no VMM came within ``accept_seconds``.
    """
    memory = MemoryFile.open(options.image)
    ending = _Ending()
    with ending.on_signals():
        handshake = await _take_handshake(options, memory, listening)
        session = HandoverSession(memory, handshake, run, options.session, listener)
        control = ControlServer(run.control_socket, handlers(session))
        try:
            session.take()
            session.attach()
            session.serve()
            await session.load_device_state()
            await session.resume()
            ending.session = session
            await _serve_on(options, session, control, ending.asked)
            return session
        finally:
            await control.close()
            await session.close()
            run.release()


async def _take_handshake(
    options: ServeOptions, memory: MemoryFile, listening: Callable[[], None] | None
) -> Handshake:
    """What the first VMM sent that sent a whole handshake, checked against the memory file."""
    uids = [0, os.geteuid(), *([] if options.uid is None else [options.uid])]
    listener = listen(options.handshake, options.uid)
    try:
        if listening is not None:
            listening()
        while True:
            try:
                async with asyncio.timeout(options.accept_seconds or None):
                    channel, identity = await accept(listener, uids)
            except TimeoutError as error:
                raise OperationCancelledError(
                    f"no VMM has connected in {options.accept_seconds:g} s"
                ) from error
            try:
                with channel:
                    regions, descriptor = await read_handshake(channel)
                try:
                    check_within(regions, memory.pieces)
                    require_registered(identity, ((r.address, r.size_bytes) for r in regions))
                    require_kernel_faults(identity, descriptor, _samples(regions))
                except PostcopyError:
                    os.close(descriptor)
                    raise
                return Handshake(identity, regions, descriptor)
            except _HungUpError as error:
                log.warning("%s; waiting for another", error.message)
                identity.close()
            except BaseException:
                identity.close()
                raise
    finally:
        listener.close()
        options.handshake.unlink(missing_ok=True)


def _samples(regions: Sequence[Region]) -> Iterator[int]:
    """Addresses of pages, spread over all regions; a VMM that has touched some has not touched
    most."""
    for numerator in (1, 3, 5, 7):
        for region in regions:
            pages = region.size_bytes // region.page_size_bytes
            yield region.address + pages * numerator // 8 * region.page_size_bytes


async def _serve_on(
    options: ServeOptions, session: HandoverSession, control: ControlServer, ending: asyncio.Event
) -> None:
    """From the first fault on; whatever goes wrong beside the pager, the guest is served."""
    try:
        await control.start()
        session.start_background()
        await session.wait_complete()
    except GuestEndedError as error:
        raise GuestEndedError("the VMM ended while it was served", vm=error.vm) from None
    except Exception:
        log.exception("the control plane failed; the guest is served on without it")
        session.start_background()
        await session.wait_gone()
        raise GuestEndedError("the VMM ended while it was served", vm=session.run.name) from None
    if not options.detach:
        # Its balloon may still give memory back, and wait for us to hear of it.
        waits = [asyncio.ensure_future(session.wait_gone()), asyncio.ensure_future(ending.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        assert session.identity is not None
        if not session.identity.is_alive():
            session.gone()
            return
    session.detach()


class _Ending:
    """SIGTERM and SIGINT: before there is a guest they end the work; after that the rest is filled
    at full speed and the guest left.  It is never abandoned."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        #: once there is a guest
        self.session: HandoverSession | None = None

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Takes both over, where this runs in the main thread."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            if self.session is None:
                task.cancel()
            else:
                log.warning("asked to end: filling the rest, then leaving")
                self.session.fill_at_full_speed()
                self.asked.set()

        numbers = (signal.SIGTERM, signal.SIGINT)
        with suppress(ValueError, RuntimeError):  # not in the main thread: signals are the caller's
            for number in numbers:
                loop.add_signal_handler(number, end)
        try:
            yield
        finally:
            with suppress(ValueError, RuntimeError):
                for number in numbers:
                    loop.remove_signal_handler(number)


@click.command("serve")
@click.option(
    "--handshake",
    required=True,
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Where the VMM connects and hands its userfaultfd over, as Firecracker does.",
)
@click.option(
    "--image",
    required=True,
    type=click.Path(path_type=Path),
    help="An image, or a raw memory file (Firecracker's mem_file_path).",
)
@click.option("--name", help="The guest's name; default: the image's.")
@click.option("--uid", type=click.IntRange(0), help="The user that the VMM runs as (a jailer's).")
@click.option(
    "--chunk", callback=size, metavar="SIZE", help="Bytes filled around a fault, 4K to 2M."
)
@click.option(
    "--background/--no-background",
    default=True,
    show_default=True,
    help="Fill what nobody asks for while the guest runs.",
)
@click.option(
    "--rate",
    callback=size,
    default="0",
    metavar="SIZE",
    help="Limit of that, bytes per second; 0: none.",
)
@click.option("--detach", is_flag=True, help="Leave when all memory is there.")
@click.option(
    "--accept-seconds",
    type=click.FloatRange(0),
    default=0.0,
    metavar="N",
    help="Give up if no VMM connects in this time; 0: never.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def serve_command(
    handshake: Path,
    image: Path,
    name: str | None,
    uid: int | None,
    chunk: int | None,
    background: bool,
    rate: int,
    detach: bool,
    accept_seconds: float,
    as_json: bool,
) -> None:
    """Page the memory of a VMM that hands over its own userfaultfd.

    Waits at SOCKET for one VMM that speaks Firecracker's handshake, serves it from IMAGE, and
    ends with it (or, with --detach, when all of its memory is there). Stays in the foreground; says
    "listening" when a VMM may connect.

    \b
    Examples:
      qemu-postcopy serve --handshake /srv/vm/uffd.sock --image /srv/vm/mem
      qemu-postcopy serve --handshake uffd.sock --image vm.qpc --no-background --chunk 2M
      curl --unix-socket fc.sock -X PUT http://localhost/snapshot/load -d '{"snapshot_path": "vm",
        "mem_backend": {"backend_type": "Uffd", "backend_path": "uffd.sock"}, "resume_vm": true}'
    """
    options = ServeOptions(
        handshake=handshake,
        image=image,
        name=name,
        uid=uid,
        detach=detach,
        accept_seconds=accept_seconds,
        session=SessionOptions(
            chunk_size=chunk, background=background, background_rate=rate, drop_rights=True
        ),
    )

    def say(event: str, **details: Any) -> None:
        line = json.dumps({"event": event, **details}) if as_json else event
        click.echo(line)

    run = RunDirectory.create(options.run_name())
    try:
        asyncio.run(
            serve(
                options,
                run,
                lambda change: say(str(change.state), elapsed=change.elapsed),
                lambda: say("listening", socket=str(handshake), run_directory=str(run.path)),
            )
        )
    except asyncio.CancelledError:
        raise OperationCancelledError("interrupted before a VMM was served") from None
    except GuestEndedError:
        pass  # told as a state; no error where the guest was shut down
    finally:
        run.discard_unused()
