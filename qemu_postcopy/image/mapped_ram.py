"""QEMU's mapped-ram files (QEMU 9 and newer): each page of a block at a fixed place in the file.

Such a file is a migration stream whose block list has, per block, a header that says where a bitmap
and the pages are; the stream goes on behind the pages.  Read when a file is imported, written when
an image is exported; no header is trusted.  Source: QEMU, ``docs/devel/migration/mapped-ram.rst``
and ``migration/ram.c`` (``MappedRamHeader``: packed, big-endian; the bitmap: little-endian words).
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import replace

from qemu_postcopy.image.records import FLAG_MEM_SIZE, BlockHeader, MappedHeader, StreamReader, fail

CAPABILITY = "mapped-ram"
HEADER_VERSION = 1
HEADER = struct.Struct(">IQQQ")
PAGES_ALIGNMENT_BYTES = 1 << 20


def bitmap_size_bytes(size_bytes: int, page_size_bytes: int) -> int:
    """Length of a block's bitmap in the file: whole 64-bit words."""
    return (size_bytes // page_size_bytes + 63) // 64 * 8


def read_mapped_header(
    reader: StreamReader, name: str, size_bytes: int, page_size_bytes: int
) -> MappedHeader:
    """Reads a block's header and goes on behind its pages.

    Raises:
        ImageError: the header points backwards, outside of the file, or at other page sizes.
    """
    at = reader.offset
    status = os.fstat(reader.fd)
    if not stat.S_ISREG(status.st_mode):
        fail(
            "a mapped-ram stream can be read from a file only",
            "save it to a file first, or migrate with the capability mapped-ram off",
        )
    version, page_size, bitmap, pages = HEADER.unpack(reader.read(HEADER.size))
    if version != HEADER_VERSION:
        fail(f"the mapped-ram header at offset {at} has version {version}, not {HEADER_VERSION}")
    if page_size != page_size_bytes:
        fail(f"the mapped-ram header of {name} at offset {at} has {page_size} byte pages")
    bitmap_end = bitmap + bitmap_size_bytes(size_bytes, page_size)
    if not reader.offset <= bitmap <= bitmap_end <= pages <= pages + size_bytes <= status.st_size:
        fail(
            f"mapped-ram block {name}: bitmap at {bitmap} and {size_bytes} bytes of pages at "
            f"{pages} do not fit behind offset {at} of a file of {status.st_size} bytes"
        )
    reader.seek(pages + size_bytes)
    return MappedHeader(page_size, bitmap, pages)


def read_bitmap(reader: StreamReader, block: BlockHeader) -> bytes:
    """The bitmap of a block read by :func:`read_mapped_header`: one bit per page in the file."""
    assert block.mapped is not None
    size = (block.size_bytes // block.mapped.page_size_bytes + 7) // 8
    bitmap = os.pread(reader.fd, size, block.mapped.bitmap_offset_bytes)
    if len(bitmap) != size:
        fail(f"the bitmap of block {block.name} is cut short")
    return bitmap


def place_blocks(
    blocks: Sequence[BlockHeader], list_offset_bytes: int, page_size_bytes: int
) -> list[BlockHeader]:
    """The blocks with the places that their bitmaps and pages get in a file.

    Args:
        list_offset_bytes: where the block list begins in the file.
    """
    position = list_offset_bytes + 8
    placed = []
    for block in blocks:
        bitmap = position + len(block.pack()) + HEADER.size
        pages = bitmap + bitmap_size_bytes(block.size_bytes, page_size_bytes)
        pages = -(-pages // PAGES_ALIGNMENT_BYTES) * PAGES_ALIGNMENT_BYTES
        placed.append(replace(block, mapped=MappedHeader(page_size_bytes, bitmap, pages)))
        position = pages + block.size_bytes
    return placed


def write_block_list(fd: int, blocks: Sequence[BlockHeader], list_offset_bytes: int) -> int:
    """Writes the list's head and the headers of placed blocks; returns the offset behind it all."""
    total = sum(block.size_bytes for block in blocks)
    os.pwrite(fd, struct.pack(">Q", total | FLAG_MEM_SIZE), list_offset_bytes)
    position = list_offset_bytes + 8
    for block in blocks:
        assert block.mapped is not None
        mapped = block.mapped
        header = HEADER.pack(
            HEADER_VERSION,
            mapped.page_size_bytes,
            mapped.bitmap_offset_bytes,
            mapped.pages_offset_bytes,
        )
        os.pwrite(fd, block.pack() + header, position)
        position = mapped.pages_offset_bytes + block.size_bytes
    return position
