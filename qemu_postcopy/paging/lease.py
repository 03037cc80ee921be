"""A lease on a file that page data comes from: whoever wants to write to it waits until we let go.

Page data of somebody else's file must not be overwritten or cut short while a guest lacks some of
it.  The kernel holds an open for writing and a truncation of a leased file back until the holder
gives the lease up, for ``/proc/sys/fs/lease-break-time`` at most (fcntl(2), "Leases"); a removal or
a rename it does not hold back.  The kernel tells by a signal: to one thread of this module's, which
makes a descriptor readable.  Any thread may use it.  What a lease cannot do is protect a file whose
holder is dead; what is read must be checked to be the same as before all the same.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import queue
import signal
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_postcopy.errors import LeaseRefusedError

#: fcntl(2), include/uapi/asm-generic/fcntl.h
F_SETOWN_EX = 15
F_OWNER_TID = 0
#: For the watching thread only, which waits for it: it is never delivered.
SIGNAL = signal.SIGRTMIN + 3
#: SIGIO: what the kernel sends where no more real-time signals can be queued (fs/fcntl.c).
SIGNALS = (SIGNAL, signal.SIGIO)
_BREAK_TIME = Path("/proc/sys/fs/lease-break-time")

_WHY = {
    errno.EAGAIN: ("another process has it open for writing", "wait until that has ended"),
    errno.EACCES: (
        "it is another user's, and this process has no CAP_LEASE",
        "run this as root, or as the owner of the file",
    ),
    errno.EINVAL: (
        "its file system gives no leases",
        "put the file on a local file system (ext4, xfs, btrfs, tmpfs)",
    ),
}


def break_seconds() -> float:
    """For how long the kernel keeps a writer waiting at most; 0 where it does not say.

    Infinite where the setting is 0: then a lease is never broken by force (past_time, fs/locks.c).
    """
    try:
        return int(_BREAK_TIME.read_text()) or math.inf
    except (OSError, ValueError):
        return 0.0


class Lease:
    """Held until :meth:`release`, or the death of this process.

    Args:
        descriptor: of a regular file, open for reading only; a duplicate of it is kept.
        name: of the file, for messages.

    Raises:
        LeaseRefusedError: it is open for writing, not ours, or on a file system without leases.
    """

    def __init__(self, descriptor: int, name: str = "the file") -> None:
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._descriptor = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 0)
        self._ended = False
        self._broken = False
        taken: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._watch, args=(taken,), name="qpc-lease", daemon=True
        )
        self._thread.start()
        if number := taken.get():
            self._thread.join()
            os.close(self._descriptor)
            os.close(self._event)
            self._descriptor = self._event = -1
            why, hint = _WHY.get(number, (os.strerror(number), "give a local file"))
            raise LeaseRefusedError(
                f"{name} cannot be kept from being overwritten: {why}", hint=hint, errno=number
            )

    def fileno(self) -> int:
        """Readable from when somebody wants to write to the file; stays so."""
        return self._event

    @property
    def is_broken(self) -> bool:
        """Whether somebody wants to write: waits for :meth:`release`, or has waited too long."""
        return self._broken or (self._descriptor >= 0 and not _is_held(self._descriptor))

    def release(self) -> None:
        """Lets writers go on; may be called twice."""
        if self._descriptor < 0:
            return
        with contextlib.suppress(BlockingIOError):  # EAGAIN: the kernel has taken it by force
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        self._ended = True
        # The thread waits until it is told: its id is its own until then.
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, SIGNAL)
        self._thread.join()
        os.close(self._descriptor)
        os.close(self._event)
        self._descriptor = self._event = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _watch(self, taken: queue.SimpleQueue[int]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            # Before the lease: which sets the whole process as its owner, unless there is one.
            owner = struct.pack("=ii", F_OWNER_TID, threading.get_native_id())
            fcntl.fcntl(self._descriptor, F_SETOWN_EX, owner)
            fcntl.fcntl(self._descriptor, fcntl.F_SETSIG, SIGNAL)
            fcntl.fcntl(self._descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        except OSError as error:
            taken.put(error.errno or errno.EINVAL)
            return
        taken.put(0)
        while True:
            signal.sigwaitinfo(SIGNALS)
            if self._ended:
                return
            if not self._broken and not _is_held(self._descriptor):
                self._broken = True
                os.write(self._event, (1).to_bytes(8, "little"))


def _is_held(descriptor: int) -> bool:
    """One that is to be given up is reported as given up already (fcntl_getlease, fs/locks.c)."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK
