"""The offer that a hook makes to the QEMU which libvirt is about to start, and its acceptance.

Step "attach" of a plain ``virsh restore``.  The hook has put the preload library and a socket into
the domain's environment; the sidecar listens there.  QEMU connects before its `main`, hands its
userfaultfd over, has what it would load its state from replaced by a pipe of ours, and each piece
of its memory registered as it is mapped.  The socket may be reached by every user, because
QEMU runs as one of its own.  Its name is no secret (/proc/net/unix); so who connects must be a QEMU
with the domain's UUID that has the very save file open, or, where that is compressed, the pipe
into which a program of libvirt's unpacks it.  Anybody else is sent away.  One thread, until QEMU's
memory is there; nothing here may call libvirt, which waits for QEMU meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import stat
import threading
from pathlib import Path

from qemu_postcopy.errors import (
    AttachError,
    HostError,
    OperationCancelledError,
    PostcopyError,
    TargetGoneError,
)
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.records import MAGIC, VERSION
from qemu_postcopy.libvirt import places
from qemu_postcopy.libvirt.blocks import backends_of
from qemu_postcopy.paging import registration
from qemu_postcopy.vm.attach import TakenDescriptor
from qemu_postcopy.vm.layout import can_hold_paged_memory
from qemu_postcopy.vm.preload import (
    BLOCKS_MAX,
    LEAVE,
    LIMIT_SECONDS,
    MESSAGE,
    PROTOCOL,
    STREAM,
    UCRED,
    PreloadedProcess,
    PreloadServer,
    listen_at,
)
from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)

#: Root's; others' QEMUs run as themselves, and find the socket in the run directory.
SOCKETS = Path("/run/qemu-postcopy-hook")
#: How long libvirt may take from its hook to QEMU.
ACCEPT_SECONDS = 300.0
#: How long the domain's own QEMU may take when another, or itself, was sent away.
SENT_AWAY_SECONDS = 10.0
#: How long who is no QEMU may take to say what it wants.
STRANGER_SECONDS = 1.0
#: Begin of every stream.
FIRST = MAGIC + VERSION.to_bytes(4, "big")
#: Smaller blocks come with the device state, as in an import (image/stream.py).
SMALLEST_BYTES = 16 << 20


class Offer(PreloadServer):
    """One offer, to the QEMU of one domain.

    Args:
        run_directory: holds a link to the socket, by which the offer is found and withdrawn.
        uuid: of the domain.
        source: device and inode of the save file that libvirt restores.
        packed: it is compressed, and QEMU loads from the program that unpacks it.
    """

    def __init__(
        self, run_directory: Path, uuid: str, source: tuple[int, int], *, packed: bool = False
    ) -> None:
        path = run_directory / "offer.sock"
        mode = 0o600
        if os.geteuid() == 0:
            SOCKETS.mkdir(mode=0o711, exist_ok=True)
            found = SOCKETS.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
                raise HostError(
                    f"{SOCKETS} is not a directory that only root can write to",
                    hint="remove it: it is made anew",
                )
            SOCKETS.chmod(0o711)
            path, mode = SOCKETS / secrets.token_urlsafe(16), 0o666
        super().__init__(run_directory, [SMALLEST_BYTES], listening=(path, listen_at(path, mode)))
        link_of(run_directory).symlink_to(path)
        self._uuid = uuid
        self.source = source
        self._channel: socket.socket | None = None
        self._packed = packed
        self._stream_number = -1
        self._feed = -1
        self._fed = False
        # How much of its stream QEMU was given to be asked, beyond FIRST.
        self._given_bytes = len(FIRST)
        #: address and size of each piece of memory, once :meth:`known` was called
        self.registered: set[tuple[int, int]] = set()
        #: who has accepted
        self.identity: ProcessIdentity | None = None

    def take(self) -> TakenDescriptor:
        """Waits for QEMU and takes its memory; blocks.

        Raises:
            OperationCancelledError: withdrawn, or QEMU was not started in time.
            AttachError: QEMU is restored eagerly instead, or has ended: it was never to run on
                memory that is not there.
        """
        self._channel, self.identity, self._stream_number = self._await_qemu()
        try:
            self._sizes = self._wanted(self.identity)
        except PostcopyError:
            _send_away(self._channel)
            raise
        return self.serve(self.identity)

    def places(self, image: Image, state: int, userfaultfd: int) -> dict[str, int]:
        """Where those blocks lie that their sizes do not tell apart, as QEMU itself shows; once,
        after :meth:`take` and before :meth:`known`; blocks.

        Args:
            state: the stream that :meth:`feed` goes on with.

        Raises:
            AttachError, ImageError, TargetGoneError: it cannot be told; there is no guest then.
        """
        blocks = places.in_question(image.manifest.blocks, [p.size_bytes for p in self._pieces])
        if not blocks:
            return {}
        assert self.identity is not None
        begin = places.read_begin(state)
        self._give(os.pread(state, begin.size_bytes - self._given_bytes, self._given_bytes))
        self._given_bytes = begin.size_bytes
        return places.ask_places(
            image, blocks, begin, self._give, userfaultfd, self._pieces, self.identity
        )

    def _give(self, data: bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._feed, view) :]
        except OSError as error:
            raise _does_not_load(error) from error

    def known(self) -> PreloadedProcess:
        """Whom to ask where the memory lies; once, after :meth:`take`."""
        assert self.identity is not None
        self.registered = {(piece.address, piece.size_bytes) for piece in self._pieces}
        return self.process(self.identity)

    def feed(self, descriptor: int) -> None:
        """Gives QEMU its state, all of what is behind the descriptor; blocks.

        Raises:
            TargetGoneError: it has ended, or does not read.
        """
        offset = self._given_bytes
        self._fed = True
        try:
            while part := os.pread(descriptor, 1 << 16, offset):
                offset += os.write(self._feed, part)
        except OSError as error:
            raise _does_not_load(error) from error
        finally:
            self.end_stream()

    def end_stream(self) -> None:
        """QEMU sees the end of its stream; one that has not all of it fails to load it."""
        if self._feed >= 0:
            os.close(self._feed)
            self._feed = -1

    def abandon(self, userfaultfd: int) -> None:
        """QEMU is to fail, and not to hang in memory that nobody fills, if nothing was loaded yet.

        Once it was given its state it may have all of it, and a guest: then its memory stays as it
        is, and what is missing is waited for.
        """
        if self._fed:
            return
        pieces = self.registered or {(p.address, p.size_bytes) for p in self._pieces}
        for address, size in pieces:
            with contextlib.suppress(PostcopyError):
                registration.unregister(userfaultfd, address, size)
        self.end_stream()

    def close(self) -> None:
        """Closes what it holds; what was handed out stays."""
        self.end_stream()
        super().close()

    # --- inside ----------------------------------------------------------------------------------

    def _await_qemu(self) -> tuple[socket.socket, ProcessIdentity, int]:
        sent_away: AttachError | None = None
        while True:
            limit = SENT_AWAY_SECONDS if sent_away else ACCEPT_SECONDS
            if not select.select([self._listener], [], [], limit)[0]:
                raise sent_away or OperationCancelledError(f"no QEMU came within {limit:g} s")
            channel, _ = self._listener.accept()
            channel.settimeout(LIMIT_SECONDS)
            credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            pid, uid, _ = UCRED.unpack(credentials)
            try:
                identity = ProcessIdentity.open(pid)
                if self._is_meant(identity):
                    stream = self._find_stream(identity)
                    if stream is not None:
                        return channel, identity, stream
                    # The domain's own, if it is started now, or a stranger.
                    sent_away = AttachError(
                        f"what QEMU (process {pid}) is to load its state from cannot be told from "
                        "its other descriptors",
                        hint="restore it by qemu-postcopy restore --connect",
                    )
                    log.warning("%s", sent_away.message)
                    _send_away(channel)
                    identity.close()
                    continue
                identity.close()
            except (PostcopyError, OSError) as error:
                log.info("a stranger at the offer has gone: %s", error)
            with channel:
                if uid in (0, os.geteuid()) and _says(channel) == b"withdraw":
                    raise sent_away or OperationCancelledError("libvirt has not started the domain")

    def _is_meant(self, identity: ProcessIdentity) -> bool:
        try:
            identity.require_qemu()
        except AttachError:
            return False
        words = identity.cmdline()
        return any(
            option == "-uuid" and value == self._uuid
            for option, value in zip(words, words[1:], strict=False)  # noqa: RUF007
        )

    def _wanted(self, identity: ProcessIdentity) -> list[int]:
        """Sizes of the memory back-ends.

        Raises:
            AttachError: there is none, there are too many, or one cannot be paged.
        """
        backends = [b for b in backends_of(identity.cmdline()) if b.size_bytes >= SMALLEST_BYTES]
        for backend in backends:
            if backend.path and not can_hold_paged_memory(identity, backend.path):
                raise AttachError(
                    f"{backend.path} is not on tmpfs or hugetlbfs: only memory there can be paged "
                    "on demand",
                    hint="mount a tmpfs there",
                )
        sizes = [backend.size_bytes for backend in backends]
        if len(sizes) > BLOCKS_MAX:
            raise AttachError(
                f"the domain has {len(sizes)} memory back-ends, and {BLOCKS_MAX} can be paged",
                hint="restore it by qemu-postcopy restore --connect",
            )
        if not sizes:
            raise AttachError(
                "the domain has no memory back-end",
                hint="restore it by qemu-postcopy restore --connect",
            )
        return sizes

    def _find_stream(self, identity: ProcessIdentity) -> int | None:
        """The number of the descriptor that libvirt has QEMU load from: the save file itself, or
        the pipe of the program that unpacks it; nobody else could have them.  None: it has neither,
        or has it twice.
        """
        files, pipes = [], []
        for entry in Path(f"/proc/{identity.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found = entry.stat()
                number = int(entry.name)
                if number <= 2:
                    continue
                if (found.st_dev, found.st_ino) == self.source:
                    files.append(number)
                elif (
                    self._packed
                    and stat.S_ISFIFO(found.st_mode)
                    and entry.lstat().st_mode & 0o400
                    and self._is_unpacked_into(found)
                ):
                    pipes.append(number)
        identity.require_alive()
        candidates = files or pipes
        return candidates[0] if len(candidates) == 1 else None

    def _is_unpacked_into(self, pipe: os.stat_result) -> bool:
        """A process of libvirt's user, which is ours, has the save file and this pipe open."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if process.stat().st_uid != os.geteuid():
                    continue
                found = [_key_of(entry) for entry in (process / "fd").iterdir()]
                if self.source in found and (pipe.st_dev, pipe.st_ino) in found:
                    return True
        return False

    def _drain(self, pid: int, number: int) -> None:
        """libvirt gives the restore up if the program that unpacks cannot write all of it."""
        pipe = os.open(f"/proc/{pid}/fd/{number}", os.O_RDONLY | os.O_CLOEXEC)

        def drain() -> None:
            with contextlib.suppress(OSError):
                while os.read(pipe, 1 << 20):
                    pass
            os.close(pipe)

        threading.Thread(target=drain, name="qpc-drain", daemon=True).start()

    def _accept(self, identity: ProcessIdentity) -> socket.socket:
        assert self._channel is not None
        return self._channel

    def _before_memory(self, channel: socket.socket) -> None:
        # Only now: until it has handed its userfaultfd over QEMU may load the stream by itself.
        if self._packed:
            assert self.identity is not None
            self._drain(self.identity.pid, self._stream_number)
        read_end, self._feed = os.pipe()
        # A pipe that ends without a byte has QEMU poll for ever (POLLHUP alone does not wake its
        # watch); one that ends after these is an error, also if this process dies.
        os.write(self._feed, FIRST)
        message = MESSAGE.pack(PROTOCOL, STREAM, self._stream_number, 0, 0, 0, 0)
        try:
            socket.send_fds(channel, [message], [read_end])
        finally:
            os.close(read_end)


def _does_not_load(error: OSError) -> TargetGoneError:
    return TargetGoneError(
        f"QEMU does not load its state: {error.strerror}",
        hint="libvirt's log of the domain says why",
    )


def _key_of(entry: Path) -> tuple[int, int] | None:
    try:
        found = entry.stat()
    except OSError:  # closed meanwhile
        return None
    return found.st_dev, found.st_ino


def _send_away(channel: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended
        channel.send(MESSAGE.pack(PROTOCOL, LEAVE, 0, 0, 0, 0, 0))
    channel.close()


def _says(channel: socket.socket) -> bytes:
    """What a stranger says at once; QEMU is not to wait for one that says nothing."""
    channel.settimeout(STRANGER_SECONDS)
    with contextlib.suppress(OSError):
        return channel.recv(16)
    return b""


def link_of(run_directory: Path) -> Path:
    """By which an offer is found."""
    return run_directory / "offer"


def withdraw(run_directory: Path) -> None:
    """libvirt will not start the domain: whoever offers is to end.  Does nothing if nobody does."""
    link = link_of(run_directory)
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as client,
    ):
        client.settimeout(1)
        client.connect(str(link.readlink()))
        client.send(b"withdraw")
