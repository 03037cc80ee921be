"""Which pages had arrived when a sidecar died: asked of the kernel before another serves.

Step "take over".  The dead pager's thread has ended, so each of its COPYs has been done or will
never be; the ledger says of some pages only that they were about to be filled.  Trusts the kernel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qemu_postcopy.errors import AttachError, TargetGoneError
from qemu_postcopy.paging.ledger import FILLING, Ledger
from qemu_postcopy.vm.emptiness import PRESENT_OR_SWAPPED, SMALL_PAGE_BYTES
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)


def found_anew(block: RamBlock, identity: ProcessIdentity) -> RamBlock:
    """The block as this process reaches it: the path on record may name a descriptor that only the
    dead sidecar had (``vm/preload.py``)."""
    if block.file_key is None:
        return block
    try:
        path = identity.descriptor_path(block.file_key)
    except TargetGoneError:
        raise
    except AttachError:  # no right to look, which serving does not need
        path = None
    return block if path is None else replace(block, file_path=path)


def note_arrived(ledger: Ledger, blocks: Sequence[RamBlock], identity: ProcessIdentity) -> int:
    """Marks pages as filled that were being filled, and are there; returns how many.

    From then on such a page is known to have been there: if the guest gives it back in a way that
    sends no event (a hole punched in hugetlbfs), it reads as zero and not as the image's again.
    """
    count = 0
    try:
        for block in blocks:
            for page in ledger.pages_in(block.name, FILLING):
                if page_present(identity, block, page):
                    ledger.set_present(block.name, page)
                    count += 1
    except OSError as error:
        # A fault finds out: EEXIST says that a small page is there.  Of a huge one it does not
        # (pager_fill.c): where that has arrived it stays marked as missing, though nobody waits.
        log.warning("whether pages had arrived in PID %d is not known: %s", identity.pid, error)
    if count:
        log.info("%d pages had arrived when the sidecar died", count)
    return count


def page_present(identity: ProcessIdentity, block: RamBlock, page: int) -> bool:
    """Whether the kernel has this page (an index) of the block.

    A page of shared memory may be in the file while QEMU's page table has dropped it; it raises no
    missing fault then.  Huge pages are never dropped.  A file that cannot be asked has not said
    that the page is there.

    Raises: OSError without the right to look at QEMU.
    """
    offset = page * block.page_size_bytes
    with Path(f"/proc/{identity.pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek((block.address + offset) // SMALL_PAGE_BYTES * 8)
        entry = pagemap.read(8)
    if len(entry) == 8 and entry[7] in PRESENT_OR_SWAPPED:
        return True
    if block.file_path is None or block.backing == "hugetlb":
        return False
    return _in_file(block, block.file_path, block.file_offset_bytes + offset)


def _in_file(block: RamBlock, path: str, begin: int) -> bool:
    try:
        # A path that leads to something else by now may be a FIFO's.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        if (os.major(status.st_dev), os.minor(status.st_dev), status.st_ino) != block.file_key:
            return False
        return os.lseek(descriptor, begin, os.SEEK_DATA) < begin + block.page_size_bytes
    except OSError:  # ENXIO: no data from there on (lseek(2))
        return False
    finally:
        os.close(descriptor)
