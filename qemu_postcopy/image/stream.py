"""A whole migration stream: what it consists of, and its parting into an image's files.

The snapshot's data path: stream in, ``state.bin`` and one page file per lazy block out; the same
walk serves ``image inspect`` (nothing written) and imports.  Nothing in the stream is trusted.  A
:class:`Demultiplexer` runs in one thread, with the page loop in C and without the GIL; ``cancel``
and ``progress`` may be called from any thread.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.image import mapped_ram, page_data
from qemu_postcopy.image.device_state import DeviceSection, read_device_part
from qemu_postcopy.image.manifest import RAM_DIRECTORY, STATE_FILE
from qemu_postcopy.image.records import (
    COMMANDS,
    LAZY_MAGIC,
    LONGEST_HEADER_BYTES,
    RAM_SECTION_VERSION,
    VERSION,
    BlockHeader,
    Configuration,
    SectionHeader,
    SectionType,
    StreamProgress,
    StreamReader,
    begins_section,
    fail,
    pack_block_list,
    pack_end_of_records,
    read_block_list_size,
    read_block_name_and_size,
    read_configuration,
    read_footer,
    read_magic,
    read_optional_fields,
    read_section_header,
)

#: Imports serve smaller blocks eagerly: they are ROMs and tables, and load in no time.
LAZY_BLOCK_BYTES_MIN = 16 << 20
#: Parts of names of blocks that devices and firmware use while the device state is loaded.
EAGER_NAME_PARTS = ("vga.vram", ".rom", "bios", "flash")
_COMMANDS_MAX = 4096
#: What ``open_block`` of a :class:`Walk` returns for a block whose pages stay where they are.
INDEXED = -2
#: virtio-mem has a bit for each of its blocks, of 1 MiB at least
_EARLY_BYTES_MAX = 16 << 20
_AHEAD_BYTES = 1024
#: Kept in state.bin: the destination acts on it (QEMU, MIG_CMD_SWITCHOVER_START).
_KEPT_COMMANDS = ("SWITCHOVER_START",)
#: They prepare a post-copy or a return path, which a file has not.
_DROPPED_COMMANDS = ("OPEN_RETURN_PATH", "PING", "POSTCOPY_ADVISE")


@dataclass(frozen=True)
class BlockSummary:
    """A RAM block and the page records found for it."""

    name: str
    size_bytes: int
    lazy: bool
    pages_data: int
    pages_zero: int
    #: lazy blocks: pages that hold data in the page file
    pages_written: int
    #: as far as the stream says so (postcopy-ram with huge pages)
    page_size_bytes: int | None
    #: lazy blocks: the page file, relative to the image's directory
    file: str | None


@dataclass(frozen=True)
class SectionSummary:
    """A section outside of the device state; PART sections are summed up in one entry."""

    kind: str
    name: str
    section_id: int
    offset_bytes: int
    size_bytes: int
    count: int


@dataclass(frozen=True)
class StreamSummary:
    """The structure of a stream; offsets are from its first byte."""

    #: "plain" or "mapped-ram"
    format: str
    #: true for an image's state.bin: pages of lazy blocks are not in it
    lazy_state: bool
    machine: str
    target_page_size_bytes: int
    capabilities: tuple[str, ...]
    blocks: tuple[BlockSummary, ...]
    sections: tuple[SectionSummary, ...]
    #: filled by :func:`read_summary` only
    devices: tuple[DeviceSection, ...]
    size_bytes: int


def is_lazy_by_default(block: BlockHeader) -> bool:
    """The rule for imports, where nobody names the lazy blocks."""
    if block.size_bytes < LAZY_BLOCK_BYTES_MIN:
        return False
    # Memory of a device has the device's path in its name (qemu_ram_set_idstr, system/physmem.c),
    # and back-ends have theirs on old machine types.
    if "/" in block.name and not block.name.startswith("/objects/"):
        return False
    return not any(part in block.name for part in EAGER_NAME_PARTS)


def block_file_name(name: str) -> str:
    """A file name for a block: percent-encoded, never hidden, never too long."""
    quoted = urllib.parse.quote(name, safe="")
    if quoted.startswith("."):
        quoted = "%2E" + quoted[1:]
    if len(quoted) > 200:
        quoted = f"{quoted[:100]}-{sha256(name.encode()).hexdigest()}"
    return quoted


class Demultiplexer:
    """Takes one stream apart into the files of an image.

    Args:
        fd: the stream, read to its end: a pipe or socket as QEMU writes it, or a file (mapped-ram
            needs one).  Stays the caller's.
        directory: where ``state.bin`` and ``ram/`` are made (see ``ImageWriter.directory``); they
            must not be there.  What a failure leaves is the caller's to remove.
        lazy_block_names: blocks whose pages go to files; None: :func:`is_lazy_by_default`.
        offset_bytes: the descriptor's file offset, where it is a file read from its middle.
    """

    def __init__(
        self,
        fd: int,
        directory: Path,
        lazy_block_names: Collection[str] | None = None,
        *,
        offset_bytes: int = 0,
    ) -> None:
        self._reader = StreamReader(fd, offset_bytes)
        self._directory = directory
        self._names = None if lazy_block_names is None else frozenset(lazy_block_names)
        self._files: dict[str, str] = {}
        self._open_fds: list[int] = []

    def cancel(self) -> None:
        """From any thread: ``run`` then raises ``OperationCancelledError``."""
        self._reader.cancel()

    def progress(self) -> StreamProgress | None:
        """From any thread; None after the end."""
        return self._reader.progress()

    def run(self) -> StreamSummary:
        """Reads the whole stream; call once.

        Raises:
            ImageError: malformed, truncated, or made with a capability that cannot be read.
            UsageError: a lazy block is not in the stream.
            HostError: reading or writing failed; ``__cause__.errno`` tells (ENOSPC: disk full).
            OperationCancelledError: ``cancel`` was called.
        """
        try:
            (self._directory / RAM_DIRECTORY).mkdir(mode=0o700)
            state_fd = os.open(
                self._directory / STATE_FILE,
                os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
                0o600,
            )
            self._open_fds.append(state_fd)
            walk = Walk(self._reader, state_fd, self._open_block, self._check_names)
            summary = walk.run(devices=False)
            return replace(
                summary,
                blocks=tuple(replace(b, file=self._files.get(b.name)) for b in summary.blocks),
            )
        except OSError as error:
            raise HostError(
                f"the image's files cannot be written: {error.strerror}",
                hint="look at the target's directory, and whether its disk is full",
            ) from error
        finally:
            for fd in self._open_fds:
                os.close(fd)
            self._reader.close()

    def _check_names(self, blocks: Collection[BlockHeader]) -> None:
        missing = (self._names or frozenset()) - {block.name for block in blocks}
        if missing:
            raise UsageError(
                f"the stream has no RAM block {', '.join(sorted(missing))}",
                hint="it has " + ", ".join(block.name for block in blocks),
            )

    def _open_block(self, block: BlockHeader) -> int | None:
        lazy = is_lazy_by_default(block) if self._names is None else block.name in self._names
        if not lazy:
            return None
        file = f"{RAM_DIRECTORY}/{block_file_name(block.name)}"
        fd = os.open(
            self._directory / file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        self._open_fds.append(fd)
        os.ftruncate(fd, block.size_bytes)
        self._files[block.name] = file
        return fd


def demultiplex(
    fd: int, directory: Path, lazy_block_names: Collection[str] | None = None
) -> StreamSummary:
    """Stream in, ``state.bin`` and page files out: see :class:`Demultiplexer`."""
    return Demultiplexer(fd, directory, lazy_block_names).run()


def read_summary(fd: int, offset_bytes: int = 0) -> StreamSummary:
    """The structure of a stream or of an image's ``state.bin``, with nothing written.

    Raises:
        ImageError: malformed or truncated.
    """
    import tempfile  # here: a snapshot, which must be quick, does not need it

    with (
        StreamReader(fd, offset_bytes) as reader,
        tempfile.TemporaryFile(prefix="qemu-postcopy-") as rest,
    ):
        return Walk(reader, rest.fileno()).run(devices=True)


class Walk:
    """One pass over a stream.

    With ``open_block``, which opens a lazy block's page file, and ``check_blocks``, which is shown
    the block list, it becomes an image: it must be complete and is written to ``state_fd`` in the
    form of ``state.bin``.  Otherwise only the device part is, to be looked at.
    """

    def __init__(
        self,
        reader: StreamReader,
        state_fd: int,
        open_block: Callable[[BlockHeader], int | None] | None = None,
        check_blocks: Callable[[Collection[BlockHeader]], None] | None = None,
    ) -> None:
        self._reader = reader
        self._state_fd = state_fd
        self._open_block = open_block
        self._check_blocks = check_blocks
        self._strict = open_block is not None
        self._base = reader.offset
        self._configuration = Configuration("")
        self._advised = False
        self._ram: SectionHeader | None = None
        self._ram_ended = False
        self._blocks: list[BlockHeader] = []
        self._page_fds: list[int | None] = []
        self._mapped_counts: dict[str, tuple[int, int, int]] = {}
        #: of mapped-ram blocks whose pages stay where they are: where, and which have data
        self.mapped: dict[str, tuple[int, bytes]] = {}
        self._sections: dict[tuple[SectionType, int], SectionSummary] = {}
        # How many devices' states came before the RAM's end.
        self._early = 0

    def run(self, *, devices: bool) -> StreamSummary:
        reader = self._reader
        lazy_state = read_magic(reader)
        if lazy_state and self._strict:
            fail("this is the state of an image: the pages are not in it", "give the image itself")
        self._configuration = read_configuration(reader)
        if self._strict and "x-ignore-shared" in self._configuration.capabilities:
            fail(
                "the stream was made with x-ignore-shared: pages of shared memory are not in it",
                "switch the migration capability x-ignore-shared off and take a new snapshot",
            )
        self._put(LAZY_MAGIC + VERSION.to_bytes(4, "big"))
        self._put(self._configuration.with_capability(mapped_ram.CAPABILITY, False).pack())
        while self._read_section():
            pass
        part_offset = reader.offset
        part_begin = os.lseek(self._state_fd, 0, os.SEEK_CUR)
        reader.copy_rest(self._state_fd)
        part_end = os.lseek(self._state_fd, 0, os.SEEK_CUR)
        part = read_device_part(
            self._state_fd,
            part_begin,
            part_end,
            part_offset - self._base,
            sections=devices,
            early=self._early,
        )
        blocks = tuple(self._summarise(i, block) for i, block in enumerate(self._blocks))
        if self._strict and not self._is_mapped:
            for block in blocks:
                if block.lazy and block.size_bytes and not block.pages_data + block.pages_zero:
                    fail(
                        f"the stream has no page of RAM block {block.name}",
                        "switch the migration capabilities multifd and x-ignore-shared off",
                    )
        return StreamSummary(
            mapped_ram.CAPABILITY if self._is_mapped else "plain",
            lazy_state,
            self._configuration.machine,
            self._configuration.page_size_bytes,
            self._configuration.capabilities,
            blocks,
            tuple(self._sections.values()),
            part.devices,
            reader.offset - self._base,
        )

    @property
    def _is_mapped(self) -> bool:
        return mapped_ram.CAPABILITY in self._configuration.capabilities

    def _put(self, data: bytes) -> None:
        if self._strict:
            view = memoryview(data)
            while view:
                view = view[os.write(self._state_fd, view) :]

    def _read_section(self) -> bool:
        """Reads one section; false where the device part begins."""
        reader = self._reader
        at = reader.offset
        kind = reader.peek(1)[0] if reader.peek(1) else -1
        if kind in (SectionType.FULL, SectionType.EOF) and self._ram_ended:
            return False
        if kind == SectionType.FULL:
            self._read_early_section(at)
            return True
        if kind == -1:
            fail(f"the stream ends at offset {at}, before the device state")
        reader.u8()
        if kind == SectionType.START:
            self._start_ram(read_section_header(reader, SectionType.START), at)
        elif kind in (SectionType.PART, SectionType.END):
            self._continue_ram(SectionType(kind), at)
        elif kind == SectionType.COMMAND:
            self._read_command(at)
        else:
            fail(f"unexpected section type {kind:#x} at offset {at}")
        return True

    def _count(self, kind: SectionType, name: str, section_id: int, at: int) -> None:
        size = self._reader.offset - at
        old = self._sections.get((kind, section_id))
        self._sections[kind, section_id] = SectionSummary(
            kind.name,
            name,
            section_id,
            old.offset_bytes if old else at - self._base,
            size + (old.size_bytes if old else 0),
            1 + (old.count if old else 0),
        )

    def _read_early_section(self, at: int) -> None:
        """The state of a device that must be there before pages are: virtio-mem's, since QEMU 8.0.

        Its length is not in the stream.  It ends with the first footer of its own that the header
        of another section follows; all machine types that send it have footers.
        """
        reader = self._reader
        reader.u8()
        header = read_section_header(reader, SectionType.FULL)
        self._put(header.pack())
        footer = header.pack_footer()
        ram_id = None if self._ram is None else self._ram.section_id
        while reader.offset - at <= _EARLY_BYTES_MAX:
            ahead = reader.peek(_AHEAD_BYTES)
            end = ahead.find(footer)
            while end >= 0 and not begins_section(ahead[end + len(footer) :], ram_id):
                end = ahead.find(footer, end + 1)
            if end >= 0:
                self._put(reader.read(end + len(footer)))
                self._early += 1
                self._count(SectionType.FULL, header.name, header.section_id, at)
                return
            if len(ahead) < _AHEAD_BYTES:
                break
            self._put(reader.read(_AHEAD_BYTES - len(footer) - LONGEST_HEADER_BYTES))
        fail(f"the state of {header.name} at offset {at}, before the RAM's end, does not end")

    def _start_ram(self, header: SectionHeader, at: int) -> None:
        reader = self._reader
        if header.name != "ram":
            fail(
                f"the section {header.name} at offset {at} is sent in iterations",
                "only RAM may be: remove the device or switch off its migration capability "
                "(dirty-bitmaps, block)",
            )
        if self._ram is not None:
            fail(f"a second RAM section begins at offset {at}")
        if header.version_id != RAM_SECTION_VERSION:
            fail(f"the RAM section at offset {at} has version {header.version_id}")
        self._ram = header
        self._read_block_list()
        self._put(header.pack() + pack_block_list(self._blocks))
        if self._is_mapped:
            for block, page_fd in zip(self._blocks, self._page_fds, strict=True):
                self._take_mapped_pages(block, page_fd)
        reader.ram_section(self._state_fd if self._strict else -1)
        self._put(pack_end_of_records())
        if read_footer(reader, header.section_id):
            self._put(header.pack_footer())
        self._count(SectionType.START, "ram", header.section_id, at)

    def _read_block_list(self) -> None:
        reader = self._reader
        page_size = self._configuration.page_size_bytes
        left = read_block_list_size(reader, page_size)
        while left:
            name, size = read_block_name_and_size(reader, self._blocks, left, page_size)
            mapped = None
            own_page_size, address = read_optional_fields(
                reader,
                advised=self._advised,
                ignore_shared="x-ignore-shared" in self._configuration.capabilities,
            )
            if self._is_mapped:
                mapped = mapped_ram.read_mapped_header(reader, name, size, page_size)
            block = BlockHeader(name, size, own_page_size, address, mapped)
            left -= size
            page_fd = self._open_block(block) if self._open_block else None
            self._blocks.append(block)
            self._page_fds.append(page_fd)
            reader.add_block(block, page_size, -1 if page_fd is None else page_fd)
        if not self._blocks:
            fail("the RAM section lists no block")
        if self._check_blocks:
            self._check_blocks(self._blocks)

    def _take_mapped_pages(self, block: BlockHeader, page_fd: int | None) -> None:
        assert block.mapped is not None
        reader = self._reader
        bitmap = mapped_ram.read_bitmap(reader, block)
        pages = block.size_bytes // block.mapped.page_size_bytes
        data = int.from_bytes(bitmap, "little").bit_count()
        written = 0
        source = (reader.fd, block.mapped.pages_offset_bytes, block.size_bytes)
        page_size = block.mapped.page_size_bytes
        if page_fd == INDEXED:
            self.mapped[block.name] = block.mapped.pages_offset_bytes, bitmap
            written = data
        elif page_fd is not None:
            copied = page_data.copy_pages(
                *source, page_size, page_fd, 0, source_bitmap=bitmap, cancel_fd=reader.cancel_fd
            )
            written = int.from_bytes(copied, "little").bit_count()
        elif self._strict:
            page_data.write_page_records(
                *source,
                page_size,
                block.name,
                self._state_fd,
                source_bitmap=bitmap,
                cancel_fd=reader.cancel_fd,
            )
        self._mapped_counts[block.name] = (data, pages - data, written)

    def _continue_ram(self, kind: SectionType, at: int) -> None:
        reader = self._reader
        section_id = reader.u32()
        header = self._ram
        if header is None or section_id != header.section_id or self._ram_ended:
            fail(f"the section {section_id} continued at offset {at} is not open")
        position = os.lseek(self._state_fd, 0, os.SEEK_CUR)
        self._put(header.pack(kind))
        records_begin = os.lseek(self._state_fd, 0, os.SEEK_CUR)
        reader.ram_section(self._state_fd if self._strict else -1)
        empty = os.lseek(self._state_fd, 0, os.SEEK_CUR) == records_begin
        footer = read_footer(reader, section_id)
        self._ram_ended = kind == SectionType.END
        if empty and not self._ram_ended:
            os.ftruncate(self._state_fd, position)
            os.lseek(self._state_fd, position, os.SEEK_SET)
        else:
            self._put(pack_end_of_records() + (header.pack_footer() if footer else b""))
        self._count(kind, "ram", section_id, at)

    def _read_command(self, at: int) -> None:
        reader = self._reader
        number, length = reader.u16(), reader.u16()
        name = COMMANDS.get(number, str(number))
        if name not in _KEPT_COMMANDS + _DROPPED_COMMANDS:
            fail(
                f"the command {name} at offset {at} is not for a file",
                "take the snapshot by a plain migration, without post-copy and COLO",
            )
        data = reader.read(length)
        if name == "POSTCOPY_ADVISE":
            self._advised = True
        if name in _KEPT_COMMANDS:
            self._put(
                bytes([SectionType.COMMAND])
                + number.to_bytes(2, "big")
                + length.to_bytes(2, "big")
                + data
            )
        self._count(SectionType.COMMAND, name, number, at)
        if self._sections[SectionType.COMMAND, number].count > _COMMANDS_MAX:
            fail(f"more than {_COMMANDS_MAX} commands of type {name}")

    def _summarise(self, index: int, block: BlockHeader) -> BlockSummary:
        counts = self._mapped_counts.get(block.name) or self._reader.block_counts(index)
        lazy = self._page_fds[index] is not None
        return BlockSummary(
            block.name, block.size_bytes, lazy, *counts, block.page_size_bytes, None
        )
