"""Memory to be paged, and ways to touch it that never hold Python's lock while a fault waits.

A Python thread that touches watched memory through a memoryview waits with the GIL held, and the
thread that should answer cannot run.  Here every load and store is a C call without the GIL, and
:class:`Touchers` are native threads that never need it.  For tests, and for users who page memory
of their own by :mod:`qemu_postcopy.userfaultfd`.  Safe from any thread; offsets and lengths are
bytes.
"""

from __future__ import annotations

import enum
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from qemu_postcopy._native import ffi, lib
from qemu_postcopy.errors import HostError, UsageError

PAGE_BYTES = mmap.PAGESIZE
HUGE_BYTES = 2 << 20


def _checked(result: int, what: str) -> int:
    if result < 0:
        message = f"{what}: {os.strerror(-result)}"
        raise HostError(message) from OSError(-result, os.strerror(-result))
    return result


class Region:
    """A mapping of this process, and the memfd behind it if it has one; unmapped when closed.

    Where a thread is still touching it then, which may wait for a page, the last one unmaps it.
    """

    def __init__(
        self, length: int, page_bytes: int, descriptor: int, *, shared: bool, alignment: int
    ) -> None:
        if length <= 0 or length % page_bytes:
            raise UsageError(f"{length} bytes are no whole number of pages of {page_bytes}")
        self.length = length
        self.page_bytes = page_bytes
        self.descriptor = descriptor
        self.shared = shared
        self._alignment = alignment
        self._lock = threading.Lock()
        self._users = 0
        self._closed = False
        self._mapped = False
        self.address = _checked(
            lib.qpc_memory_map(length, alignment, descriptor, shared), f"cannot map {length} bytes"
        )
        self._mapped = True

    @classmethod
    def anonymous(cls, length: int, *, alignment: int = PAGE_BYTES, shared: bool = False) -> Self:
        """Anonymous memory; ``alignment`` HUGE_BYTES where huge pages are to fit."""
        return cls(length, PAGE_BYTES, -1, shared=shared, alignment=alignment)

    @classmethod
    def memfd(cls, length: int, *, shared: bool = True) -> Self:
        """Shared memory (tmpfs) with a descriptor."""
        return cls._of_memfd(length, PAGE_BYTES, 0, shared)

    @classmethod
    def hugetlb(cls, length: int, *, shared: bool = True) -> Self:
        """Memory of reserved 2 MiB pages (HostError where too few are reserved)."""
        return cls._of_memfd(length, HUGE_BYTES, os.MFD_HUGETLB | os.MFD_HUGE_2MB, shared)

    @classmethod
    def _of_memfd(cls, length: int, page_bytes: int, flags: int, shared: bool) -> Self:
        descriptor = os.memfd_create("qpc-region", os.MFD_CLOEXEC | flags)
        try:
            os.ftruncate(descriptor, length)
            return cls(length, page_bytes, descriptor, shared=shared, alignment=page_bytes)
        except BaseException:
            os.close(descriptor)
            raise

    def alias(self) -> Region:
        """A second mapping of the same memfd; what is written there is here as well."""
        if self.descriptor < 0:
            raise UsageError("anonymous memory has no second mapping")
        return Region(
            self.length,
            self.page_bytes,
            os.dup(self.descriptor),
            shared=True,
            alignment=self._alignment,
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._unmap_if_unused()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def _unmap_if_unused(self) -> None:
        if self._closed and self._mapped and not self._users:
            self._mapped = False
            lib.qpc_memory_unmap(self.address, self.length)

    def hold(self) -> None:
        """Keeps the mapping until ``release``, also where the region is closed before."""
        with self._lock:
            if self._closed or not self._mapped:
                raise UsageError("the region is closed")
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            self._unmap_if_unused()

    @contextmanager
    def _in_use(self, offset: int, length: int = 8) -> Iterator[int]:
        """The address of an offset, mapped for as long as this lasts."""
        address = self.at(offset, length)
        self.hold()
        try:
            yield address
        finally:
            self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def at(self, offset: int, length: int = 8) -> int:
        """The address of an offset; UsageError where [offset, offset+length) is not inside."""
        if not 0 <= offset <= offset + length <= self.length:
            raise UsageError(f"[{offset}, {offset + length}) is not within {self.length} bytes")
        return self.address + offset

    # -- touching, without the GIL

    def load(self, offset: int) -> int:
        """The 8-byte word at this offset."""
        with self._in_use(offset) as address:
            return int(lib.qpc_memory_load(address))

    def store(self, offset: int, value: int) -> None:
        with self._in_use(offset) as address:
            lib.qpc_memory_store(address, value)

    def fill(self, byte: int, offset: int = 0, length: int | None = None) -> None:
        length = self.length - offset if length is None else length
        with self._in_use(offset, length) as address:
            lib.qpc_memory_fill(address, length, byte)

    def read(self, offset: int, length: int) -> bytes:
        into = ffi.new("unsigned char[]", length)
        with self._in_use(offset, length) as address:
            lib.qpc_memory_read(address, into, length)
        return bytes(ffi.buffer(into))

    def write(self, offset: int, data: bytes) -> None:
        with self._in_use(offset, len(data)) as address:
            lib.qpc_memory_write(address, data, len(data))

    def first_difference(self, offset: int, expected: bytes) -> int | None:
        """Where the first byte is that is not as expected, from ``offset`` on; None if all are."""
        with self._in_use(offset, len(expected)) as address:
            found = lib.qpc_memory_compare(address, expected, len(expected))
        return None if found < 0 else int(found)

    def read_by_kernel(self, offset: int, length: int) -> bytes:
        """By process_vm_readv(2); HostError (EFAULT) where the kernel cannot get it."""
        into = ffi.new("unsigned char[]", length)
        with self._in_use(offset, length) as address:
            count = lib.qpc_memory_read_by_kernel(address, into, length)
        return bytes(ffi.buffer(into, _checked(count, "process_vm_readv")))

    def load_in_child(self, offset: int) -> int:
        """Forks; the child loads the word and exits with its lowest byte. Returns the child's id.

        The call returns when EVENT_FORK, if it is on, has been read.
        """
        with self._in_use(offset) as address:
            return _checked(lib.qpc_memory_load_in_child(address), "fork")

    def buffer(self, offset: int, length: int) -> Any:
        """A memoryview to hand to system calls (os.readv, os.preadv ...), not to be looked into."""
        return memoryview(ffi.buffer(ffi.cast("char *", self.at(offset, length)), length))

    # -- what other system calls do to it (each waits until its event, if it is on, is read)

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """madvise(2) with one of mmap.MADV_*."""
        length = self.length - offset if length is None else length
        with self._in_use(offset, length) as address:
            result = lib.qpc_memory_advise(address, length, advice)
        _checked(result, f"madvise {advice}")

    def remap_onto(self, other: Region) -> None:
        """mremap(2): this memory takes the place of ``other``'s, which has to be as long."""
        if other.length != self.length:
            raise UsageError("both regions must have one length")
        result = lib.qpc_memory_remap(self.address, self.length, other.address)
        _checked(result, "mremap")
        with self._lock:
            self._mapped = False  # what lies there now is the other's

    def unmap(self, offset: int, length: int) -> None:
        _checked(lib.qpc_memory_unmap(self.at(offset, length), length), "munmap")

    # -- what the kernel says of it

    def page_frame(self, offset: int) -> int | None:
        """Physical page number by /proc/self/pagemap (root only), None where nothing is mapped."""
        entry = self._pagemap_entry(offset)
        return entry & ((1 << 55) - 1) if entry >> 63 else None

    def is_write_protected(self, offset: int) -> bool:
        """Whether a userfaultfd protects this page from writes, by /proc/self/pagemap."""
        return bool(self._pagemap_entry(offset) >> 57 & 1)

    def _pagemap_entry(self, offset: int) -> int:
        # Documentation/admin-guide/mm/pagemap.rst: bit 63 present, 57 write-protected by
        # userfaultfd, 0 to 54 the frame
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(self.at(offset) // PAGE_BYTES * 8)
            return int.from_bytes(pagemap.read(8), "little")

    def huge_bytes(self) -> int:
        """How many bytes lie in transparent huge pages (AnonHugePages in /proc/self/smaps)."""
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(" ")
            if "-" in name and ":" not in name:
                start, end = (int(part, 16) for part in name.split("-"))
                inside = self.address <= start and end <= self.address + self.length
            elif inside and name == "AnonHugePages:":
                total += int(rest.split()[0]) * 1024
        return total


class Touch(enum.Enum):
    """What each thread does to each page."""

    READ = lib.QPC_TOUCH_READ  #: loads its first word
    CHECK = lib.QPC_TOUCH_CHECK  #: ... which must be ``base`` + the page's index
    COUNT = lib.QPC_TOUCH_COUNT  #: ... and adds 1 to its second word


class Touchers:
    """Native threads that each touch every page of a region once, in shuffled orders.

    Args: ``base``: see Touch.CHECK; ``seed``: the same one gives the same orders.
    """

    def __init__(
        self, region: Region, threads: int, touch: Touch, *, base: int = 0, seed: int = 1
    ) -> None:
        errnum = ffi.new("int *")
        region.hold()
        self._region = region
        pages = region.length // region.page_bytes
        self._touchers = lib.qpc_touchers_create(
            region.address, region.page_bytes, pages, threads, touch.value, base, seed, errnum
        )
        if self._touchers == ffi.NULL:
            # Held for good: those that were started may still run.
            raise HostError(f"no {threads} threads: {os.strerror(errnum[0])}")
        self._joined = False

    @property
    def touched(self) -> int:
        """Pages touched so far, by all threads."""
        return int(lib.qpc_touchers_touched(self._touchers))

    @property
    def wrong(self) -> int:
        """Pages that were not as expected."""
        return int(lib.qpc_touchers_wrong(self._touchers))

    def join(self, timeout_seconds: float) -> bool:
        """Whether all of them have come to their end within this time; for one thread to call."""
        if not self._joined:
            self._joined = lib.qpc_touchers_join(self._touchers, int(timeout_seconds * 1000)) == 0
            if self._joined:
                self._region.release()
        return self._joined

    def __del__(self) -> None:
        # Threads that still wait keep what they use.
        if getattr(self, "_joined", False):
            lib.qpc_touchers_destroy(self._touchers)
