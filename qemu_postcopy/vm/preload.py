"""The other side of the preload library: taking guest memory from a QEMU that offers it itself.

Step "attach" of a launch for which nobody may trace QEMU.  QEMU is started with the library in
LD_PRELOAD (``_native/preload/preload.c``), connects to a socket in the run directory before its
`main`, hands its userfaultfd over, and tells of each piece of guest memory as it maps it; the piece
is registered here before QEMU gets to use it.  Nothing of /proc/PID needs to be readable.  One
thread serves, while the control plane waits for QEMU's monitor; it ends when all memory has come,
QEMU has ended, or :meth:`PreloadServer.settle` was called.  The peer is the process that was
started, by its credentials; what it says is checked all the same.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Mapping as Environment
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.errors import (
    AttachError,
    HostError,
    MismatchError,
    PostcopyError,
    TargetGoneError,
)
from qemu_postcopy.paging import registration
from qemu_postcopy.vm.attach import DEVICE, TakenDescriptor
from qemu_postcopy.vm.process import FileKey, Mapping, ProcessIdentity

LIBRARY = Path(__file__).resolve().parents[1] / "_native" / "qemu-postcopy-preload.so"
SOCKET_NAME = "preload.sock"
SOCKET_VARIABLE = "QEMU_POSTCOPY_PRELOAD_SOCKET"
#: names the program that is meant, where that is not called qemu-system-... or qemu-kvm
PROGRAM_VARIABLE = "QEMU_POSTCOPY_PRELOAD_PROGRAM"
#: the library does nothing where nobody listens, or is told LEAVE
OPTIONAL_VARIABLE = "QEMU_POSTCOPY_PRELOAD_OPTIONAL"
#: Exit status of a QEMU that the library ended.
EXIT_STATUS = 97

#: struct message of preload.c: protocol, kind, number, shared, address, length, offset.
MESSAGE = struct.Struct("<4sIiIQQQ")
PROTOCOL = b"QCP1"
WELCOME, DESCRIPTOR, MAPPED, GO_ON, REFUSED, STREAM, LEAVE = 1, 2, 3, 4, 5, 6, 7
BLOCKS_MAX = 64
WORDS_MAX = 250
UCRED = struct.Struct("3i")
#: Longest that QEMU may take from its start to its memory.
LIMIT_SECONDS = 60.0


def library() -> Path:
    """The preload library of this installation.

    Raises:
        HostError: it is not there, or LD_PRELOAD cannot hold its path.
    """
    if not LIBRARY.exists():
        raise HostError(
            f"the preload library {LIBRARY} is missing",
            hint="install qemu-postcopy anew: its build makes the library",
        )
    if set(str(LIBRARY)) & set(" :"):
        # ld.so(8): the elements of LD_PRELOAD are divided by both.
        raise HostError(
            f"LD_PRELOAD cannot name {LIBRARY}, whose path has a blank or a colon in it",
            hint="install qemu-postcopy at another place",
        )
    return LIBRARY


@dataclass(frozen=True)
class MappedRam:
    """A piece of guest memory as QEMU mapped it; sizes and offsets in bytes.

    ``descriptor`` is a copy of its file's, -1 for anonymous memory.
    """

    address: int
    size_bytes: int
    shared: bool
    descriptor: int
    file_offset_bytes: int


class PreloadedProcess(ProcessIdentity):
    """A process that has told of its memory itself: what /proc would say, without looking there.

    Owns its pidfd and the descriptors of the memory.
    """

    def __init__(self, identity: ProcessIdentity, pieces: Sequence[MappedRam]) -> None:
        super().__init__(identity.pid, identity.start_time, os.dup(identity.pidfd))
        self._pieces = list(pieces)

    def close(self) -> None:
        """Closes what it owns; a second call does nothing."""
        super().close()
        while self._pieces:
            descriptor = self._pieces.pop().descriptor
            if descriptor >= 0:
                os.close(descriptor)

    def maps(self) -> list[Mapping]:
        """Guest memory only."""
        return [_mapping(piece) for piece in sorted(self._pieces, key=lambda p: p.address)]

    def descriptor_path(self, key: FileKey) -> str | None:
        """By our own copy of the descriptor."""
        for piece in self._pieces:
            if piece.descriptor >= 0 and _file_key(piece.descriptor) == key:
                return f"/proc/self/fd/{piece.descriptor}"
        return None

    def mounts(self) -> str:
        """Ours: it was started by us, in our mount namespace."""
        return Path("/proc/self/mountinfo").read_text()

    def registered_from_birth(self, address: int, size_bytes: int) -> bool:
        """Whether this was registered before QEMU could touch it."""
        return any(
            (piece.address, piece.size_bytes) == (address, size_bytes) for piece in self._pieces
        )


def _file_key(descriptor: int) -> FileKey:
    status = os.fstat(descriptor)
    return os.major(status.st_dev), os.minor(status.st_dev), status.st_ino


def _mapping(piece: MappedRam) -> Mapping:
    major, minor, inode = _file_key(piece.descriptor) if piece.descriptor >= 0 else (0, 0, 0)
    path = ""
    if piece.descriptor >= 0:
        path = str(Path(f"/proc/self/fd/{piece.descriptor}").readlink())
    return Mapping(
        start=piece.address,
        end=piece.address + piece.size_bytes,
        permissions="rw-s" if piece.shared else "rw-p",
        file_offset_bytes=piece.file_offset_bytes if piece.descriptor >= 0 else 0,
        device_major=major,
        device_minor=minor,
        inode=inode,
        path=path,
    )


def listen_at(path: Path, mode: int) -> socket.socket:
    """A socket there, for whom ``mode`` allows it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    # fchmod on an unbound socket sets the mode that bind() gives the file.
    os.fchmod(listener.fileno(), mode)
    path.unlink(missing_ok=True)
    previous = os.umask(0)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen(1)
    return listener


class PreloadServer:
    """Waits for one QEMU, and takes its userfaultfd and its memory.

    Args:
        run_directory: the socket is made there, 0600.
        sizes: of the RAM blocks to come, in bytes; any order.
        listening: a socket that listens already, instead of one in the run directory.

    Raises:
        HostError: more blocks than the library knows, or no library.
    """

    def __init__(
        self,
        run_directory: Path,
        sizes: Sequence[int],
        *,
        listening: tuple[Path, socket.socket] | None = None,
    ) -> None:
        if not 0 < len(sizes) <= BLOCKS_MAX:
            raise HostError(
                f"the preload library can take 1 to {BLOCKS_MAX} RAM blocks, not {len(sizes)}",
                hint="restore with --attach-by ptrace",
            )
        self._library = library()
        self._sizes = list(sizes)
        self._userfaultfd = -1
        self._remote_number = -1
        self._pieces: list[MappedRam] = []
        self._began_ns = 0
        self._settled = os.eventfd(0, os.EFD_CLOEXEC)
        path = run_directory / SOCKET_NAME
        self.path, self._listener = listening or (path, listen_at(path, 0o600))

    def environment(self, base: Environment[str, str]) -> dict[str, str]:
        """``base`` with what makes QEMU load the library and find this server."""
        loaded = base.get("LD_PRELOAD")
        return {
            **base,
            "LD_PRELOAD": f"{self._library}:{loaded}" if loaded else str(self._library),
            SOCKET_VARIABLE: str(self.path),
        }

    def settle(self) -> None:
        """QEMU answers or has ended: what has not come by now is not to be waited for.  From any
        thread."""
        os.eventfd_write(self._settled, 1)

    def serve(self, identity: ProcessIdentity) -> TakenDescriptor:
        """Takes what QEMU offers; the descriptor is negotiated, and every piece registered.

        Raises:
            TargetGoneError: QEMU ended first.
            MismatchError: it answers, and has not mapped all that the image has.
            AttachError: QEMU did not load the library, touched memory at its start, or offered
                what cannot be registered; it ends then.
        """
        self._began_ns = time.monotonic_ns()
        with self._accept(identity) as channel:
            try:
                self._greet(channel, identity)
                while self._sizes and self._wait(channel, identity):
                    self._take_piece(channel, identity)
                if self._sizes:
                    missing = ", ".join(f"{size >> 20} MiB" for size in self._sizes)
                    raise MismatchError(
                        f"RAM does not match: QEMU has mapped no memory of {missing}",
                        hint="start QEMU with the -m and memory back-ends (ids, sizes) of the "
                        "snapshot",
                        vm=identity.pid,
                    )
            except (PostcopyError, OSError) as error:
                failure = error if isinstance(error, PostcopyError) else _failure(error, identity)
                _refuse(channel, failure.message)
                if self._userfaultfd >= 0:
                    os.close(self._userfaultfd)
                raise failure from None if failure is error else error
        return TakenDescriptor(
            descriptor=self._userfaultfd,
            remote_descriptor=self._remote_number,
            tid=identity.pid,
            wait_ns=time.monotonic_ns() - self._began_ns,
            stop_ns=0,
        )

    def process(self, identity: ProcessIdentity) -> PreloadedProcess:
        """What QEMU has told, to be asked like any other process; takes the descriptors over."""
        pieces, self._pieces = self._pieces, []
        return PreloadedProcess(identity, pieces)

    def close(self) -> None:
        """Closes all but the userfaultfd that :meth:`serve` returned; removes the socket."""
        for piece in self._pieces:
            if piece.descriptor >= 0:
                os.close(piece.descriptor)
        self._pieces = []
        self._listener.close()
        os.close(self._settled)
        self.path.unlink(missing_ok=True)

    def _accept(self, identity: ProcessIdentity) -> socket.socket:
        while True:
            if not self._wait(self._listener, identity):
                raise AttachError(
                    "QEMU has started without the preload library",
                    hint="a wrapper may have cleared LD_PRELOAD, or the program is static or not "
                    f"called qemu-system-...: name it by {PROGRAM_VARIABLE}",
                    vm=identity.pid,
                )
            channel, _ = self._listener.accept()
            credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            pid, uid, _ = UCRED.unpack(credentials)
            if pid == identity.pid and uid in (0, os.geteuid()):
                channel.settimeout(LIMIT_SECONDS)
                return channel
            channel.close()

    def _wait(self, channel: socket.socket, identity: ProcessIdentity) -> bool:
        """Until the channel has something (True), or nothing will come any more (False)."""
        poll = select.poll()
        for descriptor in (channel.fileno(), identity.pidfd, self._settled):
            poll.register(descriptor, select.POLLIN)
        if self._userfaultfd >= 0:
            poll.register(self._userfaultfd, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(LIMIT_SECONDS * 1000)}
        if channel.fileno() in ready:
            return True
        if identity.pidfd in ready:
            identity.require_alive()
        if self._userfaultfd in ready:
            # Its thread waits for that page: it would neither answer nor end by itself.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(identity.pidfd, signal.SIGKILL)
            raise AttachError(
                "QEMU touches guest memory while it starts, before there is anything in it",
                hint="leave out what fills memory in advance (loaders, a debugger's stubs), or "
                "restore with --attach-by ptrace",
                vm=identity.pid,
            )
        return False

    def _greet(self, channel: socket.socket, identity: ProcessIdentity) -> None:
        sizes = struct.pack(f"<{len(self._sizes)}Q", *self._sizes)
        welcome = MESSAGE.pack(PROTOCOL, WELCOME, len(self._sizes), 0, 0, 0, 0) + sizes
        device = -1
        # Where we may open the device, QEMU needs no right to do so; else it tries by itself.
        with contextlib.suppress(OSError):
            device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            socket.send_fds(channel, [welcome], [device] if device >= 0 else [])
        finally:
            if device >= 0:
                os.close(device)
        if not self._wait(channel, identity):
            raise AttachError("QEMU's preload library has not handed a userfaultfd over")
        kind, fields, descriptor = _receive(channel, identity)
        if descriptor >= 0:
            self._userfaultfd = descriptor
        if kind != DESCRIPTOR or descriptor < 0 or not registration.is_userfaultfd(descriptor):
            raise AttachError("QEMU's preload library has handed over what is no userfaultfd")
        self._remote_number = fields[0]
        registration.negotiate(descriptor)
        self._before_memory(channel)
        _go_on(channel)

    def _before_memory(self, channel: socket.socket) -> None:
        """QEMU stands still before its `main`: the moment to replace what it loads from."""

    def _take_piece(self, channel: socket.socket, identity: ProcessIdentity) -> None:
        kind, (_, shared, address, size, offset), descriptor = _receive(channel, identity)
        piece = MappedRam(address, size, bool(shared), descriptor, offset)
        self._pieces.append(piece)
        if kind != MAPPED or size not in self._sizes:
            raise AttachError("QEMU's preload library tells of memory that nobody asked for")
        if descriptor >= 0 and not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise AttachError("guest memory is in something that is no regular file")
        registration.register(self._userfaultfd, address, size)
        self._sizes.remove(size)
        _go_on(channel)


def _gone(identity: ProcessIdentity) -> TargetGoneError:
    return TargetGoneError(
        "QEMU has ended, or its preload library has given up",
        hint="its log says why",
        vm=identity.pid,
    )


def _failure(error: OSError, identity: ProcessIdentity) -> PostcopyError:
    if isinstance(error, ConnectionError):
        # A process that ends closes its sockets before it is seen to have ended.
        return _gone(identity)
    return AttachError(
        f"what QEMU's preload library offers cannot be taken: {error}", vm=identity.pid
    )


def _receive(
    channel: socket.socket, identity: ProcessIdentity
) -> tuple[int, tuple[int, int, int, int, int], int]:
    """One message: its kind, its fields, and the descriptor that came along or -1."""
    data, descriptors, flags, _ = socket.recv_fds(channel, MESSAGE.size + 1, 1)
    descriptor = descriptors[0] if descriptors else -1
    for number in descriptors:
        os.set_inheritable(number, False)
    if not data:
        for number in descriptors:
            os.close(number)
        raise _gone(identity)
    wrong = flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(data) != MESSAGE.size
    if wrong or data[:4] != PROTOCOL:
        for number in descriptors:
            os.close(number)
        raise AttachError(
            "QEMU's preload library speaks another protocol",
            hint="it belongs to another installation of qemu-postcopy",
        )
    _, kind, number, shared, address, size, offset = MESSAGE.unpack(data)
    return kind, (number, shared, address, size, offset), descriptor


def _go_on(channel: socket.socket) -> None:
    channel.send(MESSAGE.pack(PROTOCOL, GO_ON, 0, 0, 0, 0, 0))


def _refuse(channel: socket.socket, words: str) -> None:
    """Tells QEMU's log why; it ends in any case when the channel is closed."""
    text = words.replace("\n", " ").encode()[:WORDS_MAX]
    with contextlib.suppress(OSError):
        channel.send(MESSAGE.pack(PROTOCOL, REFUSED, 0, 0, 0, 0, 0) + text)
