"""Page data in files: which pages hold data, checksums that holes do not change, copies.

Used when an image is made, verified and served.  The loops over pages are in C
(``_native/page_file.h``).  Nothing here keeps state; files are read with pread(2), never mapped, so
that a file cut short meanwhile is an error and not a SIGBUS.  Any thread may call any function.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

from qemu_postcopy._native import ffi, lib, new_error
from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.records import checked

#: Checksums are per segment of a block, so that two threads, or a part of an image, can be checked.
SEGMENT_BYTES = 64 << 20
#: The unit in which data and zeros are told apart in a checksum, whatever the block's page size.
HASH_PAGE_BYTES = 4096
_PART_BYTES = 4 << 20


def data_bitmap(fd: int, offset_bytes: int, size_bytes: int, page_size_bytes: int) -> bytearray:
    """One bit per page, least significant first: set where the page may hold data.

    A clear bit is a hole, so a page known to be zero.  On a file system without holes every bit is
    set.  Moves the descriptor's own offset.
    """
    return counted_bitmap(fd, offset_bytes, size_bytes, page_size_bytes)[0]


def counted_bitmap(
    fd: int, offset_bytes: int, size_bytes: int, page_size_bytes: int
) -> tuple[bytearray, int]:
    """The same, and how many bytes are in the pages whose bit is set."""
    bitmap = bytearray((size_bytes // page_size_bytes + 7) // 8)
    error = new_error()
    count = checked(
        lib.qpc_page_file_bitmap(
            fd, offset_bytes, size_bytes, page_size_bytes, ffi.from_buffer(bitmap), error
        ),
        error,
    )
    return bitmap, count * page_size_bytes


def copy_pages(
    source_fd: int,
    source_offset_bytes: int,
    size_bytes: int,
    page_size_bytes: int,
    target_fd: int,
    target_offset_bytes: int,
    *,
    source_bitmap: bytes | None = None,
    cancel_fd: int = -1,
) -> bytearray:
    """Copies the pages that are not zero into a hole of another file.

    Returns:
        one bit per page copied.
    """
    written = bytearray((size_bytes // page_size_bytes + 7) // 8)
    error = new_error()
    checked(
        lib.qpc_page_file_copy(
            source_fd,
            source_offset_bytes,
            _bitmap_pointer(source_bitmap),
            size_bytes,
            page_size_bytes,
            target_fd,
            target_offset_bytes,
            ffi.from_buffer(written),
            cancel_fd,
            error,
        ),
        error,
    )
    return written


def write_page_records(
    source_fd: int,
    source_offset_bytes: int,
    size_bytes: int,
    page_size_bytes: int,
    name: str,
    target_fd: int,
    *,
    source_bitmap: bytes | None = None,
    cancel_fd: int = -1,
) -> None:
    """Appends one record per page of a block to a migration stream, zero pages included."""
    error = new_error()
    checked(
        lib.qpc_page_file_write_records(
            source_fd,
            source_offset_bytes,
            _bitmap_pointer(source_bitmap),
            size_bytes,
            page_size_bytes,
            name.encode(),
            target_fd,
            cancel_fd,
            error,
        ),
        error,
    )


def _bitmap_pointer(bitmap: bytes | None) -> Any:
    return ffi.NULL if bitmap is None else ffi.from_buffer("uint8_t[]", bitmap)


def hash_segment(fd: int, offset_bytes: int, begin_bytes: int, size_bytes: int) -> tuple[str, int]:
    """SHA-256 of one segment of a block, and how many of its bytes are in pages that are not zero.

    The digest is over the 4 KiB pages that are not all zero, in order, and then a bitmap of which
    these are (least significant bit first).  So it is the same whether zeros are stored or left
    out, and pages that moved change it.

    Args:
        fd, offset_bytes: the file, and where the block begins in it.
        begin_bytes: the segment's begin in the block; size_bytes: at most ``SEGMENT_BYTES``.

    Raises:
        ImageError: the file ends too early.
    """
    digest = hashlib.sha256()
    pages = 0
    data_bytes = 0
    buffer = bytearray(_PART_BYTES)
    view = memoryview(buffer)
    runs = ffi.new("uint64_t[]", _PART_BYTES // HASH_PAGE_BYTES + 2)
    position = offset_bytes + begin_bytes
    end = position + size_bytes
    while (extent := _next_data(fd, position, end)) is not None:
        # Parts begin at page boundaries of the segment, whatever the extent's begin.
        begin = extent[0] - (extent[0] - offset_bytes) % HASH_PAGE_BYTES
        position = min(begin + _PART_BYTES, end)
        length = min(position, -(-extent[1] // HASH_PAGE_BYTES) * HASH_PAGE_BYTES, end) - begin
        length = min(-(-length // HASH_PAGE_BYTES) * HASH_PAGE_BYTES, end - begin)
        position = begin + length
        _read_exactly(fd, view[:length], begin)
        count = lib.qpc_page_runs(ffi.from_buffer(buffer), length, HASH_PAGE_BYTES, runs)
        for run in range(count):
            run_begin, run_length = runs[2 * run], runs[2 * run + 1]
            digest.update(view[run_begin : run_begin + run_length])
            first = (begin + run_begin - offset_bytes - begin_bytes) // HASH_PAGE_BYTES
            pages |= ((1 << -(-run_length // HASH_PAGE_BYTES)) - 1) << first
            data_bytes += run_length
    page_count = -(-size_bytes // HASH_PAGE_BYTES)
    digest.update(pages.to_bytes((page_count + 7) // 8, "little"))
    return digest.hexdigest(), data_bytes


def _next_data(fd: int, offset_bytes: int, end_bytes: int) -> tuple[int, int] | None:
    if offset_bytes >= end_bytes:
        return None
    extent = ffi.new("uint64_t[2]")
    error = new_error()
    if not checked(lib.qpc_page_file_next_data(fd, offset_bytes, end_bytes, extent, error), error):
        return None
    return extent[0], extent[1]


def _read_exactly(fd: int, view: memoryview, offset_bytes: int) -> None:
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset_bytes + done)
        if got == 0:
            raise ImageError(
                f"page data ends at {offset_bytes + done} bytes, too early",
                hint="the image was truncated; take a new snapshot or copy it again",
            )
        done += got


def hash_file(fd: int, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a whole file, read from its begin; ``progress`` gets the bytes of each step."""
    digest = hashlib.sha256()
    buffer = bytearray(_PART_BYTES)
    view = memoryview(buffer)
    position = 0
    while got := os.preadv(fd, [view], position):
        digest.update(view[:got])
        position += got
        if progress:
            progress(got)
    return digest.hexdigest()
