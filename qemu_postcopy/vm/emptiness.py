"""Emptying RAM blocks: every page of a block must be missing before it is registered.

Runs after the layout is known and before registration; a page that is there would never fault, so
the guest would see whatever it holds.  What QEMU filled ahead (`prealloc=on`, `mem-lock=on`) or an
earlier guest left in a file is taken out from here, private pages by QEMU itself at our word;
memory that somebody else maps is left alone and refused.  Asks the kernel, trusts no option.

A private mapping of a file has pages in two places: QEMU's own, and those of the file, which are
seen where QEMU has none.  Both must be empty.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from qemu_postcopy.errors import AttachError
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.process import ProcessIdentity, mappers_of

#: fallocate(2)
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
#: /proc/PID/pagemap has 8 bytes per page of this size; bit 63 says present, bit 62 swapped out.
SMALL_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PAGEMAP_READ_BYTES = 1 << 20
PRESENT_OR_SWAPPED = bytes(value for value in range(256) if value & 0xC0)
#: Asks the same of a range (Linux 6.7, Documentation/admin-guide/mm/pagemap.rst).
PAGEMAP_SCAN = 0xC0606610
PAGE_IS_PRESENT, PAGE_IS_SWAPPED = 1 << 3, 1 << 4
#: struct pm_scan_arg: its size, flags, start, end, where the walk ended, where regions go, how many
#: of them, how many pages, four sets of categories (inverted, all of, any of, to be told).
SCAN = struct.Struct("12Q")
#: st_blocks is in units of this (stat(2)).
BLOCK_BYTES = 512


@dataclass(frozen=True)
class Emptied:
    """What was found and done: ``removed_bytes`` is 0 where the block was empty already."""

    block: str
    removed_bytes: int


def ensure_empty(block: RamBlock, identity: ProcessIdentity) -> Emptied:
    """Removes every page of the block; :func:`require_empty` makes sure that it worked.

    Hugetlb pages go back to the pool, and QEMU's reservation of them ends: the pool must be large
    enough when they are filled.

    Raises: AttachError where another process maps the memory (the old guest, a vhost-user
    back-end), where a private mapping lies over a file with data, which is not ours to remove, or
    where QEMU may not be traced and its private memory is filled.
    """
    refuse_other_mappers(block, identity)
    removed_bytes = 0
    if block.file_key is not None:
        removed_bytes = _empty_file(block, identity)
    if not block.shared and not _empty_from_birth(block, identity):
        removed_bytes += _discard_private_pages(block, identity)
    return Emptied(block.name, removed_bytes)


def _empty_file(block: RamBlock, identity: ProcessIdentity) -> int:
    """Returns how many bytes the block's part of the file had."""
    descriptor = _open(block, identity, os.O_RDONLY)
    try:
        filled_bytes = _filled_bytes(descriptor, block)
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    # Asked of the whole file: what fallocate(2) has made is not seen in a part of it.
    if status.st_blocks:
        if not block.shared and status.st_nlink:
            raise _shows_through(block, identity)
        descriptor = _open(block, identity, os.O_RDWR)
        try:
            _punch(descriptor, block)
        finally:
            os.close(descriptor)
    return filled_bytes


def require_empty(block: RamBlock, identity: ProcessIdentity) -> None:
    """Checks only.  Asked once more when the block is registered: from then on no page can come but
    by a fault, so what is missing now was never there.

    Raises: AttachError where a page is present.
    """
    if block.file_key is not None:
        descriptor = _open(block, identity, os.O_RDONLY)
        try:
            filled_bytes = _filled_bytes(descriptor, block)
            whole = _is_whole_file(descriptor, block)
        finally:
            os.close(descriptor)
        if filled_bytes and block.backing == "hugetlb" and not whole:
            raise AttachError(
                f"the file of memory {block.name!r} holds data outside of it, and hugetlbfs does "
                "not tell where",
                hint="Give the guest a file of its own.",
                vm=identity.pid,
                block=block.name,
            )
        if filled_bytes:
            raise AttachError(
                f"memory {block.name!r} of QEMU (PID {identity.pid}) was written to while it was "
                f"attached to: {filled_bytes} bytes",
                hint="Stop whatever writes to it; QEMU itself must wait in -incoming defer.",
                vm=identity.pid,
                block=block.name,
            )
    if block.shared or _empty_from_birth(block, identity):
        return
    if _pages_present(identity, block.address, block.size_bytes):
        raise AttachError(
            f"private memory {block.name!r} of QEMU (PID {identity.pid}) is filled again and again",
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


def refuse_used_files(paths: Iterable[str]) -> None:
    """AttachError if a file is another process's memory already: asked before a QEMU is started on
    it, which by mem-lock=on alone would put zeros where that guest's pages are missing."""
    for path in paths:
        try:
            status = Path(path).stat()
        except OSError:
            continue  # QEMU will make it, or say itself what is wrong
        if not stat.S_ISREG(status.st_mode):
            continue  # a directory: QEMU makes a file of its own in it
        key = (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino)
        mappers = ", ".join(f"{mapper.name} (PID {mapper.pid})" for mapper in mappers_of(key))
        if mappers:
            raise AttachError(
                f"{path}, which is to be guest memory, is mapped by {mappers}",
                hint="End that guest first, or give this one another file: the QEMU command line "
                "goes after --.",
            )


def _shows_through(block: RamBlock, identity: ProcessIdentity) -> AttachError:
    return AttachError(
        f"memory {block.name!r} of QEMU (PID {identity.pid}) is a private mapping (share=off) of a "
        "file with data, which would show through where a page is missing",
        hint="Give it an empty file, or use share=on, which has the file emptied.",
        vm=identity.pid,
        block=block.name,
    )


def _is_whole_file(descriptor: int, block: RamBlock) -> bool:
    return block.file_offset_bytes == 0 and os.fstat(descriptor).st_size <= block.size_bytes


def _filled_bytes(descriptor: int, block: RamBlock) -> int:
    """Bytes of the block's part of the file that are allocated; exact for zero where the block is
    the whole file."""
    allocated = os.fstat(descriptor).st_blocks * BLOCK_BYTES
    # hugetlbfs knows no SEEK_DATA.  That of tmpfs passes over pages that fallocate(2) has made,
    # which are there all the same: a touch finds zeros, not a missing page.
    if not allocated or block.backing == "hugetlb" or _is_whole_file(descriptor, block):
        return allocated
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


def _empty_from_birth(block: RamBlock, identity: ProcessIdentity) -> bool:
    return identity.registered_from_birth(block.address, block.size_bytes)


def _discard_private_pages(block: RamBlock, identity: ProcessIdentity) -> int:
    """Returns the size of the block where QEMU had any page of its own, which is gone now."""
    if not _pages_present(identity, block.address, block.size_bytes):
        return 0
    # Imported here: the way by ptrace may not be this one's, and most restores need nothing of it.
    from qemu_postcopy.vm.attach import discard_private_pages

    discard_private_pages(identity, block.address, block.size_bytes)
    return block.size_bytes


def _pages_present(identity: ProcessIdentity, address: int, size_bytes: int) -> bool:
    """Whether QEMU's page table has any page there, swapped-out ones included."""
    with Path(f"/proc/{identity.pid}/pagemap").open("rb", buffering=0) as pagemap:
        try:
            return _scan(pagemap.fileno(), address, size_bytes)
        except OSError as error:
            identity.require_alive()
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        return _read_entries(pagemap, identity, address, size_bytes)


def _scan(pagemap: int, address: int, size_bytes: int) -> bool:
    from qemu_postcopy._native import ffi

    wanted = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    region = ffi.new("uint64_t[3]")
    into = int(ffi.cast("uintptr_t", region))
    end = address + size_bytes
    request = SCAN.pack(SCAN.size, 0, address, end, 0, into, 1, 1, 0, 0, wanted, wanted)
    regions: int = fcntl.ioctl(pagemap, PAGEMAP_SCAN, bytearray(request))
    return regions > 0


def _read_entries(
    pagemap: FileIO, identity: ProcessIdentity, address: int, size_bytes: int
) -> bool:
    pagemap.seek(address // SMALL_PAGE_BYTES * 8)
    remaining = size_bytes // SMALL_PAGE_BYTES * 8
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
