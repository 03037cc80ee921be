"""Writes an initramfs: a cpio archive in the "newc" format, the same bytes for the same files.

A step of the image build.  It trusts its caller's file list, does no I/O of its own and may run in
any thread.  The format is that of the kernel's Documentation/driver-api/early-userspace/
buffer-format.rst: ASCII headers of 110 bytes, name and data each padded to 4 bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from dataclasses import dataclass

_CONSOLE_MAJOR_MINOR = (5, 1)


@dataclass(frozen=True)
class Entry:
    """One file of the archive: its full mode (type and permissions), data, and device numbers."""

    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory() -> Entry:
    return Entry(stat.S_IFDIR | 0o755)


def regular_file(data: bytes, *, executable: bool = False) -> Entry:
    return Entry(stat.S_IFREG | (0o755 if executable else 0o644), data)


def console_device() -> Entry:
    """/dev/console, which the kernel opens for the first process before anything is mounted."""
    return Entry(stat.S_IFCHR | 0o600, device=_CONSOLE_MAJOR_MINOR)


def write_cpio(entries: Mapping[str, Entry]) -> bytes:
    """The archive of `entries` (relative path to entry), uncompressed.

    Sorted by path, which also puts a directory before what it holds; every time and owner is 0,
    inode numbers count from 1.  Raises ValueError for an absolute path, or one whose directory is
    not in the archive.
    """
    archive = bytearray()
    for inode, path in enumerate(sorted(entries), start=1):
        parent = path.rpartition("/")[0]
        if path.startswith("/") or (parent and parent not in entries):
            raise ValueError(f"{path!r}: not a relative path inside a directory of the archive")
        archive += _record(path, entries[path], inode)
    archive += _record("TRAILER!!!", Entry(0), 0)
    return bytes(archive)


def _record(path: str, entry: Entry, inode: int) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (
        *(inode, entry.mode, 0, 0, links, 0, len(entry.data)),  # user, group and time are 0
        *(0, 0, *entry.device, len(name), 0),
    )
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
