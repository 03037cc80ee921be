"""Which piece of memory is which block, where several have one size: QEMU itself is asked.

Step "attach" of a plain ``virsh restore``, while QEMU's monitor is closed to everybody and its load
stands still.  QEMU is given its stream up to the list of its blocks, and then one page of each
block in question, as a stock stream carries it.  It writes that page where the block lies, which is
missing memory: the fault says where.  Nothing is timed or presumed.  The pages are those of the
image, so what is written is what the guest has there anyway; a QEMU that was asked in vain has no
device state, and no guest.  One thread, before the pager's.  Sources: QEMU, ``ram_load_precopy``
in ``migration/ram.c``, ``qemu_loadvm_section_part_end`` in ``migration/savevm.c``.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qemu_postcopy.errors import AttachError, Outcome, UserfaultfdError
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.manifest import Block
from qemu_postcopy.image.records import (
    BlockHeader,
    SectionHeader,
    SectionType,
    StreamReader,
    fail,
    pack_end_of_records,
    pack_name,
    read_block_list_size,
    read_block_name_and_size,
    read_configuration,
    read_footer,
    read_magic,
    read_section_header,
)
from qemu_postcopy.userfaultfd import Feature, Operation, PageFault, Userfaultfd
from qemu_postcopy.vm.preload import MappedRam
from qemu_postcopy.vm.process import ProcessIdentity

#: RAM_SAVE_FLAG_PAGE (migration/ram.c): a page's content follows.
FLAG_PAGE = 0x08
#: How long QEMU may take to write a page that it was given.
ANSWER_SECONDS = 60.0
#: Between tries where the kernel wants an event to be read first (ioctl_userfaultfd(2)).
RETRY_SECONDS = 0.001


@dataclass(frozen=True)
class StreamBegin:
    """A device state up to where its blocks are known to QEMU.

    Attributes:
        size_bytes: what QEMU has read by then.
        ram: the section that lists them.
        has_footer: whether sections have one.
        page_size_bytes: of the pages in the stream.
    """

    size_bytes: int
    ram: SectionHeader
    has_footer: bool
    page_size_bytes: int

    def pack_page(self, block: str, content: bytes) -> bytes:
        """A section with the first page of that block."""
        record = struct.pack(">Q", FLAG_PAGE) + pack_name(block) + content[: self.page_size_bytes]
        footer = self.ram.pack_footer() if self.has_footer else b""
        return self.ram.pack(SectionType.PART) + record + pack_end_of_records() + footer


def read_begin(state: int) -> StreamBegin:
    """Of a descriptor that :func:`qemu_postcopy.image.device_state.open_device_state` made.

    Raises: ImageError where the list of blocks is not the first that comes.
    """
    os.lseek(state, 0, os.SEEK_SET)
    with StreamReader(state) as reader:
        read_magic(reader)
        page_size = read_configuration(reader).page_size_bytes
        kind = reader.u8()
        if kind != SectionType.START:
            fail(
                f"a section of type {kind} comes before the list of memory blocks",
                "restore it by qemu-postcopy restore --connect",
            )
        ram = read_section_header(reader, SectionType.START)
        left = read_block_list_size(reader, page_size)
        blocks: list[BlockHeader] = []
        while left:
            name, size = read_block_name_and_size(reader, blocks, left, page_size)
            blocks.append(BlockHeader(name, size))
            reader.add_block(blocks[-1], page_size)
            left -= size
        reader.ram_section(-1)
        has_footer = read_footer(reader, ram.section_id)
        return StreamBegin(reader.offset, ram, has_footer, page_size)


def in_question(blocks: Iterable[Block], sizes: Iterable[int]) -> list[Block]:
    """Those blocks that their sizes do not tell apart; ``sizes`` are of QEMU's memory."""
    count = Counter(sizes)
    return [block for block in blocks if count[block.size_bytes] > 1]


def ask_places(
    image: Image,
    blocks: Sequence[Block],
    begin: StreamBegin,
    give: Callable[[bytes], None],
    userfaultfd: int,
    pieces: Sequence[MappedRam],
    identity: ProcessIdentity,
) -> dict[str, int]:
    """The address of each of the blocks in QEMU, which has read its stream up to ``begin``.

    Args:
        give: writes to QEMU's stream.
        pieces: where the blocks may be: registered, and empty.

    Raises:
        TargetGoneError: QEMU has ended; it has no such block, for one.
        AttachError: it writes elsewhere.
        ImageError, HostError: the page data cannot be read.
    """
    watched = Userfaultfd(userfaultfd, Feature.NONE, Operation.NONE)
    places: dict[str, int] = {}
    for block in blocks:
        candidates = [piece for piece in pieces if piece.size_bytes == block.size_bytes]
        size = max([begin.page_size_bytes, *map(_page_size, candidates)])
        content = _first_page(image, block.name, size)
        give(begin.pack_page(block.name, content))
        address = _await_fault(watched, identity)
        found = next((p for p in candidates if 0 <= address - p.address < _page_size(p)), None)
        if found is None or found.address in places.values():
            raise AttachError(
                f"QEMU has written the first page of memory {block.name} to {address:#x}, where no "
                "memory of that size begins",
                hint="restore it by qemu-postcopy restore --connect",
                vm=identity.pid,
                block=block.name,
            )
        places[block.name] = found.address
        _fill(watched, found.address, content[: _page_size(found)])
    return places


def _page_size(piece: MappedRam) -> int:
    """In bytes; a file of hugetlbfs tells that of its pages (fstatvfs(3)), tmpfs 4 KiB."""
    if piece.descriptor < 0:
        return os.sysconf("SC_PAGE_SIZE")
    return os.fstatvfs(piece.descriptor).f_bsize


def _first_page(image: Image, block: str, size_bytes: int) -> bytes:
    source, offset, bitmap = image.open_source(block, size_bytes)
    with source:
        return source.read(offset, size_bytes) if bitmap[0] & 1 else bytes(size_bytes)


def _await_fault(watched: Userfaultfd, identity: ProcessIdentity) -> int:
    poll = select.poll()
    poll.register(watched.fileno(), select.POLLIN)
    poll.register(identity.pidfd, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(ANSWER_SECONDS * 1000)}
    for event in watched.read(1) if watched.fileno() in ready else ():
        if isinstance(event, PageFault):
            return event.address
        raise AttachError(
            f"QEMU changes its memory while it is asked where that lies: {event}",
            hint="restore it by qemu-postcopy restore --connect",
            vm=identity.pid,
        )
    identity.require_alive()
    raise AttachError(
        "QEMU does not write the page that it was given to any memory that it has offered",
        hint="restore it by qemu-postcopy restore --connect",
        vm=identity.pid,
    )


def _fill(watched: Userfaultfd, address: int, content: bytes) -> None:
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            watched.copy(address, content)
            return
        except UserfaultfdError as error:
            if error.outcome is not Outcome.EVENT_WAITS or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_SECONDS)
