"""Emptying RAM blocks: every page of a block must be missing before it is registered.

Runs after the layout is known and before registration; a page that is there would never fault, so
the guest would see whatever it holds.  What QEMU filled ahead (`prealloc=on`) or an earlier guest
left in a file is taken out from here; memory that somebody else maps is left alone and refused.
Asks the kernel, trusts no option of QEMU's.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.errors import AttachError
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.process import ProcessIdentity

#: fallocate(2)
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
#: /proc/PID/pagemap has 8 bytes per page of this size; bit 63 says present, bit 62 swapped out.
SMALL_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PAGEMAP_READ_BYTES = 1 << 20
PRESENT_OR_SWAPPED = bytes(value for value in range(256) if value & 0xC0)


@dataclass(frozen=True)
class Emptied:
    """What was found and done: ``removed_bytes`` is 0 where the block was empty already."""

    block: str
    removed_bytes: int


def ensure_empty(block: RamBlock, identity: ProcessIdentity) -> Emptied:
    """Makes sure that no page of the block is present, removing what is.

    Hugetlb pages go back to the pool, and QEMU's reservation of them ends: the pool must be large
    enough when they are filled.

    Raises: AttachError where another process maps the memory (the old guest, a vhost-user
    back-end), or private memory is filled already, which cannot be emptied from outside
    (process_madvise(2) offers no MADV_DONTNEED for another process).
    """
    if block.file_key is None:
        require_empty(block, identity)
        return Emptied(block.name, 0)
    refuse_other_mappers(block, identity)
    descriptor = _open(block, identity, os.O_RDWR)
    try:
        filled_bytes = _filled_bytes(descriptor, block)
        if filled_bytes:
            _punch(descriptor, block)
            if _filled_bytes(descriptor, block):
                raise AttachError(
                    f"memory {block.name!r} of QEMU (PID {identity.pid}) is filled again and "
                    "again: somebody writes to it",
                    hint="Stop whatever writes to it; QEMU itself must wait in -incoming defer.",
                    vm=identity.pid,
                    block=block.name,
                )
    finally:
        os.close(descriptor)
    return Emptied(block.name, filled_bytes)


def require_empty(block: RamBlock, identity: ProcessIdentity) -> None:
    """Checks only.  Asked once more when the block is registered: from then on no page can come but
    by a fault, so what is missing now was never there.

    Raises: AttachError where a page is present.
    """
    if block.file_key is None:
        if identity.registered_from_birth(block.address, block.size_bytes):
            return
        if _pages_present(identity, block.address, block.size_bytes):
            raise AttachError(
                f"private memory {block.name!r} of QEMU (PID {identity.pid}) is filled already, "
                "and cannot be emptied from outside",
                hint="Start QEMU without prealloc=on and mem-lock, or with memory-backend-memfd.",
                vm=identity.pid,
                block=block.name,
            )
        return
    descriptor = _open(block, identity, os.O_RDONLY)
    try:
        filled_bytes = _filled_bytes(descriptor, block)
    finally:
        os.close(descriptor)
    if filled_bytes:
        raise AttachError(
            f"memory {block.name!r} of QEMU (PID {identity.pid}) was written to while it was "
            f"attached to: {filled_bytes} bytes",
            hint="Stop whatever writes to it; QEMU itself must wait in -incoming defer.",
            vm=identity.pid,
            block=block.name,
        )


def _open(block: RamBlock, identity: ProcessIdentity, flags: int) -> int:
    assert block.file_path is not None
    try:
        return os.open(block.file_path, flags | os.O_CLOEXEC)
    except OSError as error:
        identity.require_alive()
        raise AttachError(
            f"cannot open the memory {block.name!r} of QEMU (PID {identity.pid}) by "
            f"{block.file_path}: {error.strerror}",
            hint="Run as root, or as the user that QEMU runs as.",
            vm=identity.pid,
            block=block.name,
        ) from error


def refuse_other_mappers(block: RamBlock, identity: ProcessIdentity) -> None:
    """AttachError if another process maps the block's file: it would see zeros where a page is
    missing, and emptying would take its memory away."""
    # A memfd has no name: others get it from QEMU only, as vhost-user back-ends do, and those are
    # refused as devices. Looking through every process of a busy host takes long.
    if block.file_key is None or block.backing == "memfd":
        return
    others = identity.other_mappers(block.file_key)
    if others:
        named = ", ".join(f"{mapper.name} (PID {mapper.pid})" for mapper in others)
        raise AttachError(
            f"memory {block.name!r} is mapped by another process too: {named}",
            hint="End that process first: the old guest, or a vhost-user back-end.",
            vm=identity.pid,
            block=block.name,
        )


def _filled_bytes(descriptor: int, block: RamBlock) -> int:
    """Bytes of the block's part of the file that are allocated; exact for zero."""
    if block.backing == "hugetlb":
        # hugetlbfs knows no SEEK_DATA; its block count is of the whole file (512-byte units).
        return os.fstat(descriptor).st_blocks * 512
    filled = 0
    position = block.file_offset_bytes
    end = position + block.size_bytes
    while position < end:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on (lseek(2))
                break
            raise
        if start >= end:
            break
        position = min(end, os.lseek(descriptor, start, os.SEEK_HOLE))
        filled += position - start
    return filled


def _punch(descriptor: int, block: RamBlock) -> None:
    # Python has no fallocate(2) with flags; most restores have nothing to empty and import nothing.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    offset, size = ctypes.c_int64(block.file_offset_bytes), ctypes.c_int64(block.size_bytes)
    if libc.fallocate(descriptor, mode, offset, size) != 0:
        number = ctypes.get_errno()
        raise AttachError(
            f"memory {block.name!r} cannot be emptied: {os.strerror(number)}",
            hint="Start QEMU without prealloc=on and without a sealed memory file.",
            block=block.name,
        )


def _pages_present(identity: ProcessIdentity, address: int, size_bytes: int) -> bool:
    position = address // SMALL_PAGE_BYTES * 8
    remaining = size_bytes // SMALL_PAGE_BYTES * 8
    with Path(f"/proc/{identity.pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(position)
        while remaining:
            entries = pagemap.read(min(remaining, PAGEMAP_READ_BYTES))
            if not entries:
                identity.require_alive()
                raise AttachError(f"the page table of process {identity.pid} cannot be read")
            # The top byte of each little-endian entry, with the two bits or without.
            tops = entries[7::8]
            if len(tops.translate(None, PRESENT_OR_SWAPPED)) != len(tops):
                return True
            remaining -= len(entries)
    return False
