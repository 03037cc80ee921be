"""The ledger file: what is known of each page, kept where a killed sidecar cannot take it along.

The file lies in the run directory: a header, the journal (the messages of the userfaultfd that were
read last), and one byte per page (``enum qpc_page_state`` of ``_native/pager.h``).  It is mapped
shared; the pager thread writes it without system calls.  What is in it survives the process, not
the host.  Only this module knows its layout.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_postcopy._native import lib
from qemu_postcopy.errors import HostError, ImageError

MAGIC = b"QPCLEDG\x01"
#: magic, count of blocks
HEADER = struct.Struct("<8sI4x")
#: name (UTF-8, NUL-padded), page size and length in bytes, offset of the states in the file
ENTRY = struct.Struct("<256sQQQ")
ALIGNMENT = 4096
MOST_BLOCKS = 1024
#: bytes kept for the journal; ``QPC_PAGER_JOURNAL_SIZE`` of them are used
JOURNAL_BYTES = 4096
#: enum qpc_page_state
MISSING, FILLING, PRESENT, REMOVED, UNMAPPED, RETURNED = (
    lib.QPC_PAGE_MISSING,
    lib.QPC_PAGE_FILLING,
    lib.QPC_PAGE_PRESENT,
    lib.QPC_PAGE_REMOVED,
    lib.QPC_PAGE_UNMAPPED,
    lib.QPC_PAGE_RETURNED,
)
MAPPED_RUN = re.compile(b"[^" + re.escape(bytes((UNMAPPED,))) + b"]+")
KNOWN_STATES = bytes((MISSING, FILLING, PRESENT, REMOVED, UNMAPPED, RETURNED))


@dataclass(frozen=True)
class LedgerBlock:
    """One block in the ledger: ``length`` and ``page_size`` in bytes, ``offset`` in the file."""

    name: str
    page_size: int
    length: int
    offset: int = 0

    @property
    def page_count(self) -> int:
        """Pages, and bytes of state."""
        return self.length // self.page_size


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _journal_offset(blocks: int) -> int:
    return _align(HEADER.size + ENTRY.size * blocks)


class Ledger:
    """A mapped ledger file.  Not thread-safe itself; the states are written by the pager thread.

    Use :meth:`create` for a fresh guest, :meth:`open` to take over from a sidecar that died.
    """

    def __init__(self, path: Path, mapping: mmap.mmap, blocks: list[LedgerBlock]) -> None:
        self.path = path
        self.mapping = mapping
        self.blocks = blocks

    @classmethod
    def create(cls, path: Path, blocks: list[LedgerBlock]) -> Self:
        """Makes the file (0600, all pages missing) and maps it.

        It is there under its name only when it is whole: one that is not is damaged, and not one
        that nobody has served from.

        Raises:
            HostError: no space for it; the file is reserved in full, so that it cannot run out
                of space while faults are served.
            FileExistsError: there is one.
        """
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        offset = _journal_offset(len(blocks)) + JOURNAL_BYTES
        placed = []
        for block in blocks:
            placed.append(LedgerBlock(block.name, block.page_size, block.length, offset))
            offset = _align(offset + block.page_count)
        unfinished = path.with_name(f"{path.name}.new")
        unfinished.unlink(missing_ok=True)
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, offset)
            mapping = mmap.mmap(descriptor, offset)
        except OSError as error:
            unfinished.unlink()
            raise HostError(
                f"no space for the ledger ({offset} bytes) in {path.parent}: {error.strerror}",
                hint="free some space there, or choose another place by QEMU_POSTCOPY_RUN_DIR",
            ) from error
        finally:
            os.close(descriptor)
        HEADER.pack_into(mapping, 0, MAGIC, len(placed))
        for index, block in enumerate(placed):
            ENTRY.pack_into(
                mapping,
                HEADER.size + index * ENTRY.size,
                block.name.encode(),
                block.page_size,
                block.length,
                block.offset,
            )
        unfinished.rename(path)
        return cls(path, mapping, placed)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Maps an existing ledger.

        Raises:
            ImageError: it is not a ledger, or is damaged.
        """
        try:
            with path.open("r+b") as file:
                size = os.fstat(file.fileno()).st_size
                if size < HEADER.size:
                    raise _damaged(path, "too short")
                mapping = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        magic, count = HEADER.unpack_from(mapping, 0)
        if magic != MAGIC or count > MOST_BLOCKS or _journal_offset(count) + JOURNAL_BYTES > size:
            raise _damaged(path, "bad header")
        blocks: list[LedgerBlock] = []
        reached = _journal_offset(count) + JOURNAL_BYTES
        for index in range(count):
            raw, page_size, length, offset = ENTRY.unpack_from(
                mapping, HEADER.size + index * ENTRY.size
            )
            name = raw.rstrip(b"\0").decode(errors="replace")
            if page_size < 4096 or page_size & (page_size - 1) or length % page_size:
                raise _damaged(path, f"bad sizes of block {name}")
            if any(other.name == name for other in blocks):
                raise _damaged(path, f"block {name} comes twice")
            block = LedgerBlock(name, page_size, length, offset)
            # In the order in which they were made: so none lies over another or over the header.
            if offset % ALIGNMENT or not reached <= offset <= size - block.page_count:
                raise _damaged(path, f"block {name} lies outside of its place")
            reached = offset + block.page_count
            blocks.append(block)
        return cls(path, mapping, blocks)

    @property
    def journal_offset(self) -> int:
        """Where in the mapping messages are read to."""
        return _journal_offset(len(self.blocks))

    def block(self, name: str) -> LedgerBlock:
        """The entry of one block; KeyError if there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def states(self, name: str) -> bytes:
        """A copy of one block's states, one byte per page."""
        block = self.block(name)
        return self.mapping[block.offset : block.offset + block.page_count]

    def require_sound(self) -> None:
        """ImageError where a byte of it is no page's state."""
        for block in self.blocks:
            if self.states(block.name).translate(None, KNOWN_STATES):
                raise _damaged(self.path, f"a page of block {block.name} has an unknown state")

    def pages_in(self, name: str, state: int) -> list[int]:
        """The indices of one block's pages in this state, ascending."""
        states = self.states(name)
        wanted = bytes((state,))
        pages = []
        page = states.find(wanted)
        while page >= 0:
            pages.append(page)
            page = states.find(wanted, page + 1)
        return pages

    def mapped_runs(self, name: str) -> list[tuple[int, int]]:
        """First page and count of each part of a block that the mapper has not unmapped."""
        found = MAPPED_RUN.finditer(self.states(name))
        return [(run.start(), run.end() - run.start()) for run in found]

    def set_present(self, name: str, page: int) -> None:
        """Marks one page as filled.  Only while no pager has the ledger."""
        self.mapping[self.block(name).offset + page] = PRESENT

    def close(self) -> None:
        """Unmaps; the file stays.  Any buffer taken from the mapping must be released before."""
        self.mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _damaged(path: Path, why: str) -> ImageError:
    return ImageError(
        f"{path} is not a usable ledger: {why}",
        hint="it cannot be known which pages the guest gave back; restore the image anew",
    )
