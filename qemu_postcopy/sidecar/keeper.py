"""A process that holds a VMM's userfaultfd and does nothing else, so that no death loses a guest.

If nobody holds a userfaultfd the kernel unregisters the memory, and whoever waits for a page runs
on with zeros (userfaultfd_release, fs/userfaultfd.c).  A QEMU of ours has a copy of its own.  A VMM
that hands its descriptor over may keep none, or none that we may take; so the server forks a keeper
when it gets one.  It sleeps, gives copies to whoever takes over (a socket of mode 0600 in the run
directory, the peer's user is checked), and ends with the VMM, or when it is told to.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import struct
from contextlib import suppress
from pathlib import Path

from qemu_postcopy.errors import HostError, SidecarError
from qemu_postcopy.paging.registration import is_userfaultfd

ANSWER_SECONDS = 5.0
GIVE, END = b"g", b"e"
UCRED = struct.Struct("3i")


def start(path: Path, userfaultfd: int, pidfd: int) -> int:
    """Forks the keeper; returns its PID.  Only for a process with a single thread.

    Args:
        path: of its socket; one that is there is removed.
        pidfd: of the VMM.

    Raises:
        HostError: the socket or the process cannot be made.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        path.unlink(missing_ok=True)
        # fchmod on an unbound socket sets the mode that bind() gives the file.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        listener.listen(4)
        pid = os.fork()
    except OSError as error:
        listener.close()
        raise HostError(
            f"no process can be had that keeps the userfaultfd: {error.strerror}",
            hint="look at the limits of processes and open files, and at the room in the "
            "run directory; end the VMM, and resume it from the same image",
        ) from error
    if pid:
        listener.close()
        return pid
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        Path("/proc/self/comm").write_text("qpc-keeper")  # for ps(1)
        _close_others({listener.fileno(), userfaultfd, pidfd})
        _keep(listener, userfaultfd, pidfd)
        path.unlink(missing_ok=True)
    finally:
        os._exit(0)


def _close_others(kept: set[int]) -> None:
    """The run directory's lock and whatever else was inherited would seem to be in use."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    end = 3
    for number in sorted(kept):
        os.closerange(end, number)
        end = number + 1
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    os.closerange(end, limit if limit > 0 else 1 << 30)


def _keep(listener: socket.socket, userfaultfd: int, pidfd: int) -> None:
    watched = select.poll()
    for descriptor in (listener.fileno(), pidfd):
        watched.register(descriptor, select.POLLIN)
    while True:
        if pidfd in dict(watched.poll()):
            return
        with suppress(OSError), listener.accept()[0] as peer:
            peer.settimeout(ANSWER_SECONDS)
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size)
            if UCRED.unpack(credentials)[1] not in (0, os.geteuid()):
                continue
            asked = peer.recv(1)
            if asked == END:
                return
            if asked == GIVE:
                socket.send_fds(peer, [GIVE], [userfaultfd])


def take(path: Path) -> int:
    """A copy of the descriptor, the caller's.

    Raises:
        SidecarError: there is no keeper, or what it gives is no userfaultfd.
    """
    try:
        with _ask(path, GIVE) as channel:
            _, descriptors, _, _ = socket.recv_fds(channel, 1, 1, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise SidecarError(
            f"no keeper of it answers at {path}: {error.strerror or error}",
            hint="it ends with the VMM, or was killed",
        ) from error
    if not descriptors or not is_userfaultfd(descriptors[0]):
        for descriptor in descriptors:
            os.close(descriptor)
        raise SidecarError(f"what answers at {path} keeps no userfaultfd")
    return descriptors[0]


def end(path: Path) -> None:
    """Ends the keeper, if there is one: nothing is registered any more."""
    with suppress(OSError):
        _ask(path, END).close()


def _ask(path: Path, what: bytes) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        channel.settimeout(ANSWER_SECONDS)
        channel.connect(str(path))
        channel.sendall(what)
    except OSError:
        channel.close()
        raise
    return channel
