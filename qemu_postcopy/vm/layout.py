"""Where guest memory lies: the RAM blocks to be paged, their addresses in QEMU, what backs them.

Runs after the attach's rights are clear and before anything is registered, in the caller's event
loop.  QEMU is asked (which blocks, how large, where) and the kernel must agree (/proc/PID/maps):
an address that is not certain is refused, since a wrong one would overwrite something else.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu_postcopy.errors import AttachError, QmpError
from qemu_postcopy.vm.monitor import Monitor
from qemu_postcopy.vm.opening import Question
from qemu_postcopy.vm.process import FileKey, Mapping, ProcessIdentity

Backing = Literal["anonymous", "memfd", "file", "hugetlb"]

# `info ramblock`, a line per block: name, page size, offset, used length, maximal length, and from
# QEMU 8.1 on the address in QEMU ("HVA") and a column for read-only blocks.
RAMBLOCK_LINE = re.compile(
    r"\s*(|\S.*?)\s+(\d+) (B|KiB|MiB|GiB)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+0x([0-9a-f]+)"
    r"(?:\s+0x([0-9a-f]+)(?:\s+\w+)?)?\s*"
)
# `info mtree -f`: first-last guest physical address (prio N, kind): region [@offset in it]
FLAT_RANGE_LINE = re.compile(
    r"\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]+)\): (.*?)(?: @([0-9a-f]{16}))?(?: KVM)?"
)
HOST_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((.*)\) is 0x([0-9a-f]+)\s*")
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
#: File systems whose shared mappings a userfaultfd can control (vma_can_userfault in the kernel).
CONTROLLABLE = ("tmpfs", "devtmpfs", "hugetlbfs")


@dataclass(frozen=True)
class RamBlock:
    """One RAM block of QEMU's that belongs to a memory back-end.

    Attributes:
        name: QEMU's name of it (RAMBlock idstr), as in the migration stream.
        backend_id: the memory back-end's id.
        address: of its first byte, in QEMU's address space.
        size_bytes, page_size_bytes: of the block, of one page of its back-end.
        backing: what kind of memory.
        shared: whether QEMU maps it shared: then its pages are the file's. Those of a private
            mapping are QEMU's own, and where it has none, the file's show through.
        file_key: device and inode, None for anonymous memory.
        file_path: a path in /proc that opens that file from here, None for anonymous memory.
        file_offset_bytes: where in the file the block begins.
    """

    name: str
    backend_id: str
    address: int
    size_bytes: int
    page_size_bytes: int
    backing: Backing
    shared: bool
    file_key: FileKey | None
    file_path: str | None
    file_offset_bytes: int


@dataclass(frozen=True)
class ListedBlock:
    """A line of `info ramblock`. address: None before QEMU 8.1."""

    name: str
    page_size_bytes: int
    size_bytes: int
    address: int | None


@dataclass(frozen=True)
class FlatRange:
    """A range of guest physical memory and the region behind it; all in bytes."""

    guest_address: int
    size_bytes: int
    kind: str
    region: str
    region_offset_bytes: int


def parse_ramblocks(text: str) -> list[ListedBlock]:
    """The answer to `info ramblock`. Raises QmpError for a line that is not understood."""
    blocks = []
    for line in text.splitlines()[1:]:
        match = RAMBLOCK_LINE.fullmatch(line)
        if match is None:
            raise QmpError(
                f"a line of QEMU's 'info ramblock' is not understood: {line!r}",
                hint="This QEMU's format is new to us: please report the line.",
            )
        name, count, unit, _, used, _, address = match.groups()
        blocks.append(
            ListedBlock(
                name=name,
                page_size_bytes=int(count) * UNITS[unit],
                size_bytes=int(used, 16),
                address=int(address, 16) if address else None,
            )
        )
    return blocks


def parse_flat_view(text: str, address_space: str = "memory") -> list[FlatRange]:
    """The ranges of one address space in the answer to `info mtree -f`."""
    for view in re.split(r"^FlatView #\d+$", text, flags=re.MULTILINE):
        lines = view.splitlines()
        if not any(line.startswith(f' AS "{address_space}",') for line in lines):
            continue
        ranges = []
        for line in lines:
            match = FLAT_RANGE_LINE.fullmatch(line.rstrip())
            if match is not None:
                first, last, kind, region, offset = match.groups()
                size_bytes = int(last, 16) - int(first, 16) + 1
                ranges.append(
                    FlatRange(int(first, 16), size_bytes, kind, region, int(offset or "0", 16))
                )
        return ranges
    return []


def block_of(backend_id: str, size_bytes: int, listed: Iterable[ListedBlock]) -> ListedBlock | None:
    """The RAM block of a memory back-end, or None where no device and no machine uses it.

    A block is named after its back-end's id or, before machine types 4.0, its whole path; behind a
    device on a bus, such as virtio-mem, that device's path comes first (vmstate_register_ram in
    migration/savevm.c).
    """
    named = {block.name: block for block in listed}
    if found := named.get(backend_id) or named.get(f"/objects/{backend_id}"):
        return found
    ends = (f"/{backend_id}", f"//objects/{backend_id}")
    behind = [b for name, b in named.items() if name.endswith(ends) and b.size_bytes == size_bytes]
    return behind[0] if len(behind) == 1 else None


async def read_layout(qmp: Monitor, identity: ProcessIdentity) -> list[RamBlock]:
    """Every RAM block that belongs to a memory back-end, in the order of their names.

    Raises: AttachError, with the block's name, where an address cannot be had with certainty or
    the memory is of a kind that cannot be paged.
    """
    # Asked all at once: QEMU answers in order, and each answer alone costs a round trip.
    memdevs, ramblocks, first_page = await asyncio.gather(
        qmp.memory_backends(), qmp.human("info ramblock"), qmp.human("gpa2hva 0")
    )
    backends = {entry["id"]: entry for entry in memdevs}
    listed = parse_ramblocks(ramblocks)
    ranges: list[FlatRange] | None = None
    mappings = identity.maps()
    blocks = []
    for backend_id, backend in backends.items():
        block = block_of(backend_id, backend["size"], listed)
        if block is None:
            # Not the guest's: a block without a name is in no migration stream either.  If there is
            # data for it in an image, that is missed when the two are compared.
            continue
        if block.size_bytes != backend["size"]:
            raise _refused(
                block.name, f"QEMU states two sizes, {block.size_bytes} and {backend['size']} bytes"
            )
        address = block.address
        if address is None:
            address = _begins_at(first_page, block, mappings)
        if address is None:
            if ranges is None:
                ranges = parse_flat_view(await qmp.human("info mtree -f"))
            address = await _address_of(qmp, block, backend_id, ranges)
        blocks.append(describe_block(block, backend_id, address, mappings, identity))
    _refuse_overlap(blocks)
    _refuse_second_mappings(blocks, mappings)
    return sorted(blocks, key=lambda block: block.name)


def _begins_at(first_page: str, block: ListedBlock, mappings: Iterable[Mapping]) -> int | None:
    """The block's address if the guest's first page is its first: so it is where a mapping of
    QEMU's begins there (`gpa2hva 0` tells where that page lies, not where in the block)."""
    match = HOST_ADDRESS.fullmatch(first_page)
    if match is None or match[1] != block.name:
        return None
    address = int(match[2], 16)
    whole = any(
        mapping.start == address and mapping.end - address == block.size_bytes
        for mapping in mappings
    )
    return address if whole else None


async def _address_of(
    qmp: Monitor, block: ListedBlock, backend_id: str, ranges: Iterable[FlatRange]
) -> int:
    """For a QEMU that does not state it: each part of the block that the guest sees is asked for,
    and all answers must lead to one beginning. `gpa2hva` looks up, it touches no memory."""
    path = f"/objects/{backend_id}"
    # The region has the name without the path of the device that the block is behind.
    region = path if block.name.endswith(path) else backend_id
    begins = set()
    parts = list(
        dict.fromkeys(
            part
            for part in ranges
            if part.region == region and part.kind in ("ram", "rom", "nv-ram")
        )
    )
    answers = await asyncio.gather(
        *(qmp.human(f"gpa2hva {part.guest_address:#x}") for part in parts)
    )
    for part, answer in zip(parts, answers, strict=True):
        match = HOST_ADDRESS.fullmatch(answer)
        if match is None or match[1] != region:
            raise _refused(block.name, f"its address cannot be told: QEMU says {answer!r}")
        begins.add(int(match[2], 16) - part.region_offset_bytes)
    if len(begins) != 1:
        raise _refused(
            block.name,
            "its address cannot be told: "
            + ("no part of it is mapped into the guest" if not begins else f"{len(begins)} answers")
            + "; QEMU 8.1 or newer states it",
        )
    return begins.pop()


def confirming_questions(version: str | None) -> tuple[Question, ...]:
    """What :func:`confirm` most likely asks of a QEMU of that version, to be asked ahead."""
    states_addresses = version is not None and tuple(map(int, version.split(".")[:2])) >= (8, 1)
    words = ("info ramblock",) if states_addresses else ("info ramblock", "gpa2hva 0")
    return tuple(("human-monitor-command", {"command-line": word}) for word in words)


async def confirm(qmp: Monitor, presumed: Sequence[RamBlock]) -> None:
    """Checks a layout that was had without QEMU's word against QEMU's own; reads nothing of /proc.

    Raises: AttachError where QEMU states something else, or does not know a block.
    """
    listed = {block.name: block for block in parse_ramblocks(await qmp.human("info ramblock"))}
    ranges: list[FlatRange] | None = None
    for block in presumed:
        stated = listed.get(block.name)
        if stated is None:
            raise _refused(block.name, "QEMU knows no such block")
        address = stated.address
        if address is None:
            # A block that lies where the guest's first page does begins with it.
            match = HOST_ADDRESS.fullmatch(await qmp.human("gpa2hva 0"))
            if match is not None and match[1] == block.name and int(match[2], 16) == block.address:
                address = block.address
        if address is None:
            if ranges is None:
                ranges = parse_flat_view(await qmp.human("info mtree -f"))
            address = await _address_of(qmp, stated, block.backend_id, ranges)
        found = (address, stated.size_bytes, stated.page_size_bytes)
        if found != (block.address, block.size_bytes, block.page_size_bytes):
            raise _refused(
                block.name,
                f"it lies at {address:#x} ({stated.size_bytes} bytes), and was taken to be at "
                f"{block.address:#x}",
            )


def describe_block(
    block: ListedBlock,
    backend_id: str,
    address: int,
    mappings: Iterable[Mapping],
    identity: ProcessIdentity,
) -> RamBlock:
    """The block at an address that is known, with what the kernel says of the memory there.

    Raises: AttachError where the memory is of a kind that cannot be paged.
    """
    covering = covering_mappings(mappings, address, block.size_bytes)
    if not covering:
        raise _refused(block.name, f"no mapping of QEMU's covers it at {address:#x}")
    first = covering[0]
    if any(mapping.permissions[:2] != "rw" for mapping in covering):
        raise _refused(block.name, "QEMU does not map all of it for reading and writing")
    key = first.file_key
    for mapping in covering[1:]:
        gap = mapping.file_offset_bytes - first.file_offset_bytes - mapping.start + first.start
        if mapping.file_key != key or mapping.shared != first.shared or (key and gap):
            raise _refused(block.name, "what QEMU maps there is not one piece of memory")
    if address % block.page_size_bytes or block.size_bytes % block.page_size_bytes:
        raise _refused(
            block.name,
            f"its address {address:#x} or its size, {block.size_bytes} bytes, is not a multiple of "
            f"its page size, {block.page_size_bytes} bytes",
        )
    path = None
    if key is not None:
        path = identity.descriptor_path(key)
        if path is None:
            # Shared anonymous memory has no descriptor; this way needs CAP_SYS_ADMIN (proc(5)).
            path = f"/proc/{identity.pid}/map_files/{first.start:x}-{first.end:x}"
        elif not stat.S_ISREG(Path(path).stat().st_mode):
            # Device DAX and SGX memory lie in /dev, on what is a tmpfs otherwise.
            raise _refused(block.name, f"{first.path} is a device, not a file")
    return RamBlock(
        name=block.name,
        backend_id=backend_id,
        address=address,
        size_bytes=block.size_bytes,
        page_size_bytes=block.page_size_bytes,
        backing=_backing(block, first, identity),
        shared=first.shared,
        file_key=key,
        file_path=path,
        file_offset_bytes=first.file_offset_bytes + address - first.start if key else 0,
    )


def _backing(block: ListedBlock, mapping: Mapping, identity: ProcessIdentity) -> Backing:
    if mapping.file_key is None:
        return "anonymous"
    if block.page_size_bytes > os.sysconf("SC_PAGE_SIZE"):
        return "hugetlb"
    # The kernel's own tmpfs mount appears in no mount table; what lies on it has these names.
    if mapping.path.startswith(("/memfd:", "/dev/zero", "/SYSV")):
        return "memfd"
    mount = _mount(identity, mapping.file_key)
    kind = mount[0] if mount else None
    if kind not in CONTROLLABLE:
        raise _refused(
            block.name,
            f"{mapping.path} lies on {kind or 'an unknown file system'}; only memory on tmpfs "
            "(such as /dev/shm) or hugetlbfs can be paged on demand",
        )
    return "file"


def _mount(identity: ProcessIdentity, key: FileKey) -> tuple[str, str] | None:
    """Type and options of the file system that holds the file, in the target's mount namespace."""
    device = f"{key[0]}:{key[1]}"
    # proc(5): ID, parent, major:minor, ..., then " - ", the type, the source, and its options.
    for line in identity.mounts().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == device:
            kind, _, options = after.split(" ", 2)
            return kind, options
    return None


def can_hold_paged_memory(identity: ProcessIdentity, path: str) -> bool:
    """Whether a file that QEMU makes, or has, at that path lies where userfaultfd handles it."""
    seen = Path(f"/proc/{identity.pid}/root{path}")
    place = next((found for found in (seen, *seen.parents) if found.exists()), seen)
    device = place.stat().st_dev
    mount = _mount(identity, (os.major(device), os.minor(device), 0))
    return mount is not None and mount[0] in CONTROLLABLE


def mount_options(identity: ProcessIdentity, key: FileKey) -> str | None:
    """The options that belong to the file system itself, `size=1g,huge=always`; None if it is in no
    mount table."""
    mount = _mount(identity, key)
    return mount[1] if mount else None


def covering_mappings(mappings: Iterable[Mapping], address: int, size_bytes: int) -> list[Mapping]:
    """The mappings that cover [address, address + size) without a gap; empty if there is one."""
    found = []
    reached = address
    for mapping in sorted(mappings, key=lambda mapping: mapping.start):
        if mapping.end <= reached:
            continue
        if mapping.start > reached:
            break
        found.append(mapping)
        reached = mapping.end
        if reached >= address + size_bytes:
            return found
    return []


def _refuse_overlap(blocks: list[RamBlock]) -> None:
    ordered = sorted(blocks, key=lambda block: block.address)
    for before, after in itertools.pairwise(ordered):
        if before.address + before.size_bytes > after.address:
            raise _refused(after.name, f"it would overlap {before.name}")


def _refuse_second_mappings(blocks: Iterable[RamBlock], mappings: Iterable[Mapping]) -> None:
    """A page of a file that QEMU maps twice would be filled by the first touch through the other
    mapping: with zeros if nobody watches that one."""
    found = list(mappings)
    for block in blocks:
        if block.file_key is None:
            continue
        first, last = block.file_offset_bytes, block.file_offset_bytes + block.size_bytes
        for mapping in found:
            if mapping.file_key != block.file_key:
                continue
            if block.address <= mapping.start < block.address + block.size_bytes:
                continue
            if mapping.start <= block.address < mapping.end:  # one mapping, more than the block
                continue
            begin = mapping.file_offset_bytes
            if begin < last and first < begin + mapping.end - mapping.start:
                raise _refused(
                    block.name,
                    f"QEMU maps the same part of {mapping.path} a second time, at "
                    f"{mapping.start:#x}: give each memory back-end a file, or a part, of its own",
                )


def _refused(block: str, reason: str) -> AttachError:
    return AttachError(
        f"memory {block!r} cannot be paged: {reason}",
        hint="Nothing was changed. Restore this guest eagerly, or give it another back-end.",
        block=block,
    )
