"""The whole kernel interface of userfaultfd, typed: memory whose faults a program answers itself.

A :class:`Userfaultfd` watches ranges of the process that opened it; whoever holds the descriptor
reads what happened there (:meth:`Userfaultfd.read`) and answers (``copy``, ``zeropage``, ``move``,
``continue_``, ``write_protect``, ``poison``, ``wake``).  A process may have any number of them.
The restore path does not run through here: its faults are answered in C (``_native/pager.c``).

Rests on userfaultfd(2), ioctl_userfaultfd(2) and Documentation/admin-guide/mm/userfaultfd.rst, and
trusts the kernel only.  Every call may be made by any thread and releases the GIL while the kernel
works.  Memory that is watched must never be touched by Python itself: the thread would wait with
the GIL held, and with it the thread that should answer.  :mod:`qemu_postcopy.region` touches it
safely.

Addresses and lengths are bytes, multiples of the mapping's page size.  Failures raise
:class:`~qemu_postcopy.errors.UserfaultfdError`, whose ``outcome`` is a name for what happened.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import math
import os
import select
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from qemu_postcopy._native import ffi, lib
from qemu_postcopy.errors import Outcome, UserfaultfdError


class Feature(enum.IntFlag, boundary=enum.KEEP):
    """UFFD_FEATURE_*; bits of kernels to come are kept as they are."""

    NONE = 0
    PAGEFAULT_FLAG_WP = 0x1
    EVENT_FORK = 0x2  #: needs CAP_SYS_PTRACE
    EVENT_REMAP = 0x4
    EVENT_REMOVE = 0x8
    MISSING_HUGETLBFS = 0x10
    MISSING_SHMEM = 0x20
    EVENT_UNMAP = 0x40
    SIGBUS = 0x80  #: a fault is a SIGBUS, not an event
    THREAD_ID = 0x100
    MINOR_HUGETLBFS = 0x200
    MINOR_SHMEM = 0x400
    EXACT_ADDRESS = 0x800  #: the byte, not the page
    WP_HUGETLBFS_SHMEM = 0x1000
    WP_UNPOPULATED = 0x2000
    POISON = 0x4000  #: Linux 6.6
    WP_ASYNC = 0x8000  #: Linux 6.7: the kernel lifts the protection itself; PAGEMAP_SCAN tells
    MOVE = 0x10000  #: Linux 6.8


class Operation(enum.IntFlag, boundary=enum.KEEP):
    """What a descriptor or a registered range allows (``uffdio_api.ioctls``)."""

    NONE = 0
    REGISTER = 1 << 0x0
    UNREGISTER = 1 << 0x1
    WAKE = 1 << 0x2
    COPY = 1 << 0x3
    ZEROPAGE = 1 << 0x4
    MOVE = 1 << 0x5
    WRITEPROTECT = 1 << 0x6
    CONTINUE = 1 << 0x7
    POISON = 1 << 0x8
    API = 1 << 0x3F


class Mode(enum.IntFlag, boundary=enum.KEEP):
    """Which faults of a range are told: nothing there, write-protected, or not mapped yet."""

    MISSING = 1
    WP = 2
    MINOR = 4


class Way(enum.Enum):
    """How a descriptor is had: the device asks for file permissions, the call for a capability."""

    DEVICE = lib.QPC_WAY_DEVICE
    SYSCALL = lib.QPC_WAY_SYSCALL


class FaultFlag(enum.IntFlag, boundary=enum.KEEP):
    """UFFD_PAGEFAULT_FLAG_*."""

    NONE = 0
    WRITE = 1
    WP = 2
    MINOR = 4


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread waits at ``address`` (of its page, or the very byte with EXACT_ADDRESS)."""

    address: int
    flags: FaultFlag
    #: in the reader's PID namespace; None without Feature.THREAD_ID
    thread_id: int | None


@dataclass(frozen=True, slots=True)
class Fork:
    """The process has forked; ``child`` watches the child's memory, and is yours to close."""

    child: Userfaultfd


@dataclass(frozen=True, slots=True)
class Remap:
    """mremap(2) has moved a watched range."""

    old_address: int
    new_address: int
    length: int


@dataclass(frozen=True, slots=True)
class Remove:
    """madvise(2) is emptying [start, end); answers there get EVENT_WAITS until this is read."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """munmap(2) has taken [start, end) away."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class UnknownEvent:
    """One that a kernel to come may send: its number and its 24 bytes."""

    number: int
    payload: bytes


Event = PageFault | Fork | Remap | Remove | Unmap | UnknownEvent

MESSAGE_BYTES = 32  # sizeof(struct uffd_msg), checked in uffd_calls.c

OUTCOMES = {
    errno.EEXIST: Outcome.PRESENT,
    errno.ENOENT: Outcome.NOT_REGISTERED,
    errno.EBUSY: Outcome.BUSY,
    errno.ESRCH: Outcome.GONE,
    errno.EFAULT: Outcome.FAULT,
    errno.EPERM: Outcome.REFUSED,
    errno.EACCES: Outcome.REFUSED,
    errno.EINVAL: Outcome.INVALID,
}


def outcome_of(errnum: int, done: int, operation: Operation = Operation.NONE) -> Outcome:
    """The name of a failure: ``errnum`` of the call, ``done`` as the kernel gave it."""
    if errnum == errno.EAGAIN:
        return Outcome.PARTIAL if done > 0 else Outcome.EVENT_WAITS
    if errnum == errno.ENOENT and operation is Operation.MOVE:
        return Outcome.HOLE
    return OUTCOMES.get(errnum, Outcome.FAILED)


@dataclass(frozen=True, slots=True)
class Registration:
    """A watched range; leaving it as a context manager unregisters it, which wakes who waits."""

    userfaultfd: Userfaultfd
    address: int
    length: int
    mode: Mode
    #: the operations that this range allows
    operations: Operation

    def unregister(self) -> None:
        self.userfaultfd.unregister(self.address, self.length)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if not self.userfaultfd.closed:
            self.unregister()


class Userfaultfd:
    """One userfaultfd, ready for use (UFFDIO_API is done).

    ``Userfaultfd.open()`` makes one; ``Userfaultfd(descriptor, features)`` takes a descriptor over
    that came from elsewhere (SCM_RIGHTS, pidfd_getfd(2)) and has been through UFFDIO_API.  Closing
    the last copy of a descriptor unregisters everything, and whoever waits goes on with what is
    there, zeros where nothing is: close it when all is filled, or when nobody is to use the memory.
    """

    def __init__(self, descriptor: int, features: Feature, operations: Operation) -> None:
        self._descriptor = descriptor
        #: what was asked for and is on
        self.features = features
        #: what the descriptor as such allows (``uffdio_api.ioctls``)
        self.operations = operations

    @classmethod
    def open(
        cls,
        features: Feature = Feature.NONE,
        *,
        optional: Feature = Feature.NONE,
        way: Way | None = None,
        blocking: bool = False,
        user_mode_only: bool = False,
    ) -> Self:
        """A new descriptor for this process's memory.

        Args:
            features: must be had; where the kernel lacks one the error names it.
            optional: taken where the kernel has them.
            way: None tries the device, then the system call.
            blocking: reads wait; poll(2), asyncio and ``wait`` then do not work.
            user_mode_only: faults inside system calls fail (EFAULT) instead of being told.
        Raises:
            UserfaultfdError: REFUSED without the right, INVALID without a feature.
        """
        if optional or features:
            known = known_features(way=way, user_mode_only=user_mode_only)
            if lacking := features & ~known:
                raise UserfaultfdError(
                    f"this kernel lacks {lacking!r}", Outcome.INVALID, errno.EINVAL
                )
            features |= optional & known
        descriptor = _open_descriptor(way, blocking, user_mode_only)
        try:
            _, operations = _negotiate(descriptor, features)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, features, operations)

    # -- the descriptor

    def fileno(self) -> int:
        """The descriptor; ValueError once it is closed."""
        if self.closed:
            raise ValueError("the userfaultfd is closed")
        return self._descriptor

    @property
    def closed(self) -> bool:
        return self._descriptor < 0

    def detach(self) -> int:
        """Gives the descriptor away: it stays open, and is the caller's."""
        descriptor = self.fileno()
        self._descriptor = -1
        return descriptor

    def close(self) -> None:
        """Closes it; see the class for what this does to who waits. Harmless when repeated."""
        if not self.closed:
            os.close(self.detach())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what happened

    def read(self, limit: int = 64) -> list[Event]:
        """Up to ``limit`` events; an empty list if there are none (a blocking one waits)."""
        try:
            data = os.read(self.fileno(), limit * MESSAGE_BYTES)
        except BlockingIOError:
            return []
        return [
            self._event(data[i : i + MESSAGE_BYTES]) for i in range(0, len(data), MESSAGE_BYTES)
        ]

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Whether there is an event to read within this time (None: waits for ever).

        Another reader may be faster; for descriptors that do not block.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        milliseconds = None if timeout_seconds is None else math.ceil(timeout_seconds * 1000)
        return any(mask & select.POLLIN for _, mask in poll.poll(milliseconds))

    async def read_async(self, limit: int = 64) -> list[Event]:
        """At least one event, as soon as there is one; one task at a time may wait."""
        loop = asyncio.get_running_loop()
        while not (events := self.read(limit)):
            readable = asyncio.Event()
            descriptor = self.fileno()
            loop.add_reader(descriptor, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(descriptor)
        return events

    async def events(self) -> AsyncIterator[Event]:
        """Every event from now on, one by one; ends when the task is cancelled."""
        while True:
            for event in await self.read_async():
                yield event

    def _event(self, message: bytes) -> Event:
        # struct uffd_msg: the event's number, 7 reserved bytes, 24 bytes that depend on it
        first, second, third = struct.unpack_from("=QQQ", message, 8)
        match message[0]:
            case 0x12:
                thread = third & 0xFFFFFFFF if Feature.THREAD_ID in self.features else None
                return PageFault(second, FaultFlag(first), thread)
            case 0x13:
                child = Userfaultfd(first & 0xFFFFFFFF, self.features, self.operations)
                return Fork(child)
            case 0x14:
                return Remap(first, second, third)
            case 0x15:
                return Remove(first, second)
            case 0x16:
                return Unmap(first, second)
        return UnknownEvent(message[0], message[8:])

    # -- ranges

    def register(self, address: int, length: int, mode: Mode = Mode.MISSING) -> Registration:
        """Watches a range from now on; BUSY where another descriptor does."""
        operations = ffi.new("uint64_t *")
        result = lib.qpc_call_register(self.fileno(), address, length, mode, operations)
        if result < 0:
            raise UserfaultfdError(
                "UFFDIO_REGISTER", outcome_of(-result, 0), -result, address=address
            )
        return Registration(self, address, length, mode, Operation(operations[0]))

    def unregister(self, address: int, length: int) -> None:
        """Watches it no longer; who waits there goes on with what is there, or zeros."""
        self._call(Operation.UNREGISTER, address, length)

    # -- answers; each returns the bytes done, which is all of them

    def copy(
        self, address: int, data: Any, *, wake: bool = True, write_protect: bool = False
    ) -> int:
        """Fills missing pages with ``data`` (anything with a buffer), and wakes who waits there.

        Raises: PRESENT, EVENT_WAITS, PARTIAL, NOT_REGISTERED, GONE.
        """
        source = ffi.from_buffer(data)
        length = len(source)
        return self.copy_from(
            address,
            int(ffi.cast("uintptr_t", source)),
            length,
            wake=wake,
            write_protect=write_protect,
        )

    def copy_from(
        self,
        address: int,
        source: int,
        length: int,
        *,
        wake: bool = True,
        write_protect: bool = False,
    ) -> int:
        """As ``copy``, from an address of the calling process."""
        mode = (0 if wake else 1) | (2 if write_protect else 0)
        return self._call(Operation.COPY, address, length, mode, source)

    def zeropage(self, address: int, length: int, *, wake: bool = True) -> int:
        """Fills missing pages with zeros, without taking memory where it is private."""
        return self._call(Operation.ZEROPAGE, address, length, 0 if wake else 1)

    def continue_(
        self, address: int, length: int, *, wake: bool = True, write_protect: bool = False
    ) -> int:
        """Maps what the page cache has (MINOR); FAULT where it has nothing."""
        mode = (0 if wake else 1) | (2 if write_protect else 0)
        return self._call(Operation.CONTINUE, address, length, mode)

    def move(
        self,
        destination: int,
        source: int,
        length: int,
        *,
        allow_holes: bool = False,
        wake: bool = True,
    ) -> int:
        """Moves pages without copying; both ranges in the calling process, private and anonymous.

        Strict: PRESENT where the destination is filled, HOLE where the source is empty unless
        ``allow_holes``, BUSY where a page is pinned or mapped more than once.  A huge page that
        fits is moved whole.
        """
        mode = (0 if wake else 1) | (2 if allow_holes else 0)
        return self._call(Operation.MOVE, destination, length, mode, source)

    def move_range(
        self, destination: int, source: int, length: int, *, allow_holes: bool = False
    ) -> int:
        """As ``move``, but goes on after a part until all is moved, or until the reason is known.

        The error then has that reason instead of PARTIAL: ``done`` bytes of the range are moved,
        and ``address`` is that of the destination's page where it stopped.
        """
        moved = 0
        while moved < length:
            at, rest = destination + moved, length - moved
            try:
                moved += self.move(at, source + moved, rest, allow_holes=allow_holes)
            except UserfaultfdError as error:
                if error.outcome is not Outcome.PARTIAL:
                    raise UserfaultfdError(
                        "UFFDIO_MOVE", error.outcome, error.errno, moved, at
                    ) from error
                moved += error.done
        return moved

    def write_protect(self, address: int, length: int) -> int:
        """Writes there are told (or, with WP_ASYNC, noted) from now on.

        Empty pages are only protected with Feature.WP_UNPOPULATED (always so in shared memory).
        """
        return self._call(Operation.WRITEPROTECT, address, length, 1)

    def write_unprotect(self, address: int, length: int, *, wake: bool = True) -> int:
        """Lets writes pass again."""
        return self._call(Operation.WRITEPROTECT, address, length, 0 if wake else 2)

    def poison(self, address: int, length: int, *, wake: bool = True) -> int:
        """Whoever touches these missing pages gets SIGBUS (EFAULT inside system calls).

        ``copy`` heals them; ``zeropage`` does in shared memory only (PRESENT in private one).
        """
        return self._call(Operation.POISON, address, length, 0 if wake else 1)

    def wake(self, address: int, length: int) -> None:
        """Who waits in this range, and nobody else, tries again."""
        self._call(Operation.WAKE, address, length)

    def _call(
        self, operation: Operation, address: int, length: int, mode: int = 0, source: int = 0
    ) -> int:
        done = ffi.new("int64_t *")
        number = operation.bit_length() - 1
        result = lib.qpc_call_operation(self.fileno(), number, address, source, length, mode, done)
        if result < 0:
            outcome = outcome_of(-result, done[0], operation)
            raise UserfaultfdError(f"UFFDIO_{operation.name}", outcome, -result, done[0], address)
        return int(done[0])


def known_features(*, way: Way | None = None, user_mode_only: bool = False) -> Feature:
    """Every feature that this kernel has, asked of a descriptor made for this; unknown bits too."""
    descriptor = _open_descriptor(way, False, user_mode_only)
    try:
        return _negotiate(descriptor, Feature.NONE)[0]
    finally:
        os.close(descriptor)


def _open_descriptor(way: Way | None, blocking: bool, user_mode_only: bool) -> int:
    result = -errno.EPERM
    for attempt in (way,) if way else (Way.DEVICE, Way.SYSCALL):
        result = lib.qpc_call_open(attempt.value, not blocking, user_mode_only)
        if result >= 0:
            return int(result)
    # ENOENT here is the device's
    outcome = Outcome.REFUSED if -result == errno.ENOENT else outcome_of(-result, 0)
    raise UserfaultfdError("no userfaultfd can be opened", outcome, -result)


def _negotiate(descriptor: int, features: Feature) -> tuple[Feature, Operation]:
    known, operations = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    result = lib.qpc_call_api(descriptor, features, known, operations)
    if result < 0:
        raise UserfaultfdError(f"UFFDIO_API with {features!r}", outcome_of(-result, 0), -result)
    return Feature(known[0]), Operation(operations[0])
