"""The socket where a VMM hands its userfaultfd over, and the copies of that which others hold.

First step of serving a VMM that is no QEMU: who connects is checked, the message is put together
(``vm/handshake.py``), and what it says is compared with the memory file and with the VMM itself.
Runs in the event loop of whoever serves.  Nothing that the peer says is trusted.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy._native import check, lib, new_error
from qemu_postcopy.errors import (
    HandshakeError,
    HostError,
    OperationCancelledError,
    PostcopyError,
)
from qemu_postcopy.image.memory_file import MemoryFile
from qemu_postcopy.paging import registration
from qemu_postcopy.vm.attach import USERFAULTFD_LINK, TakenDescriptor
from qemu_postcopy.vm.handshake import HandshakeReader, Region, check_within
from qemu_postcopy.vm.kernel_faults import require_kernel_faults, require_registered
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
class Handshake:
    """A VMM that has handed over: who it is, its regions, and its userfaultfd, which is ours."""

    identity: ProcessIdentity
    regions: list[Region]
    userfaultfd: int


async def take_handshake(
    path: Path,
    memory: MemoryFile,
    uid: int | None,
    accept_seconds: float,
    listening: Callable[[], None],
) -> Handshake:
    """What the first VMM sent that sent a whole handshake, checked against the memory file.

    Args:
        path: where the socket is made; removed in the end.
        uid: see :func:`listen`; root and our own user may connect in any case.
        accept_seconds: how long to wait for a VMM; 0: for ever.
        listening: called when a VMM may connect.

    Raises:
        HandshakeError: what came cannot be served.
        OperationCancelledError: nobody came in time.
    """
    uids = [0, os.geteuid(), *([] if uid is None else [uid])]
    with _listening(path, uid) as listener:
        listening()
        while True:
            try:
                async with asyncio.timeout(accept_seconds or None):
                    channel, identity = await accept(listener, uids)
            except TimeoutError as error:
                raise OperationCancelledError(
                    f"no VMM has connected in {accept_seconds:g} s",
                    hint=f"give it {path} as the path of its memory back-end of the type Uffd",
                ) from error
            try:
                with channel:
                    regions, descriptor = await read_handshake(channel)
                try:
                    check_within(regions, memory.pieces)
                    require_registered(identity, regions)
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


@contextmanager
def _listening(path: Path, uid: int | None) -> Iterator[socket.socket]:
    listener = listen(path, uid)
    try:
        yield listener
    finally:
        listener.close()
        path.unlink(missing_ok=True)


def _samples(regions: Sequence[Region]) -> Iterator[int]:
    """Addresses of pages, spread over all regions; a VMM that has touched some has not touched
    most."""
    for numerator in (1, 3, 5, 7):
        for region in regions:
            pages = region.size_bytes // region.page_size_bytes
            yield region.address + pages * numerator // 8 * region.page_size_bytes


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
            # The directory may be the VMM's own, who could put a link there meanwhile.
            os.chown(path, uid, -1, follow_symlinks=False)
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


def find_copy(identity: ProcessIdentity, userfaultfd: int) -> int:
    """The number by which the VMM itself holds this very userfaultfd, or -1.

    Firecracker keeps it open for as long as it lives (src/vmm/src/lib.rs there), so that its guest
    waits if whoever serves it dies.  -1 also where we may not look.
    """
    ours = os.fstat(userfaultfd)
    found = []
    try:
        for entry in Path(f"/proc/{identity.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(entry.readlink()) == USERFAULTFD_LINK:
                    found.append((int(entry.name), entry.stat()))
    except OSError:
        return -1
    # From Linux 5.12 on a userfaultfd has an inode of its own (anon_inode_getfd_secure there);
    # where all share one, a single descriptor is the one.
    same = [number for number, there in found if there.st_ino == ours.st_ino]
    return same[0] if len(same) == 1 else -1


def take_copy(identity: ProcessIdentity, number: int) -> TakenDescriptor:
    """A copy of the userfaultfd that the VMM holds under that number.

    Raises:
        PostcopyError: it has none there, or a right is missing.
    """
    error = new_error()
    descriptor = check(lib.qpc_fd_take(identity.pidfd, number, error), error)
    if not registration.is_userfaultfd(descriptor):
        os.close(descriptor)
        raise HandshakeError(f"descriptor {number} of the VMM is no userfaultfd any more")
    return TakenDescriptor(descriptor, number, tid=0, wait_ns=0, stop_ns=0)
