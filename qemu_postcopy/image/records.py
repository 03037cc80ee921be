"""Wire format of QEMU's migration stream: headers, sections, block lists, read and packed.

The lowest step of reading or writing a stream; pages themselves are handled in C
(``_native/stream.h``).  It trusts nothing: every length is bounded before it is used.  One thread
uses a :class:`StreamReader`; only ``cancel`` and ``progress`` may be called from others.  Sources:
QEMU, ``docs/devel/migration/main.rst``, ``migration/{savevm,ram,qemu-file}.c``.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, NoReturn, Self

from qemu_postcopy._native import check, ffi, lib, new_error, raise_error
from qemu_postcopy.errors import ImageError, OperationCancelledError

MAGIC = b"QEVM"
#: Stored in place of MAGIC where pages of lazy blocks are missing, so that QEMU refuses the file.
LAZY_MAGIC = b"QEVL"
VERSION = 3
RAM_SECTION_VERSION = 4
#: QEMU_FILE names are a length byte and the bytes; a machine name has a 32-bit length instead.
NAME_BYTES_MAX = 255
BLOCKS_MAX = 4096
BLOCK_BYTES_MAX = 1 << 46
CAPABILITIES_MAX = 256
#: Where the configuration does not say: every target of ours but 64 KiB ARM pages has 4 KiB.
DEFAULT_PAGE_BITS = 12

FLAG_MEM_SIZE = 0x04
FLAG_EOS = 0x10


class SectionType(IntEnum):
    """First byte of a section (QEMU, migration/savevm.h)."""

    EOF = 0
    START = 1
    PART = 2
    END = 3
    FULL = 4
    SUBSECTION = 5
    VMDESCRIPTION = 6
    CONFIGURATION = 7
    COMMAND = 8
    FOOTER = 0x7E


#: QEMU, migration/savevm.c: enum qemu_vm_cmd.
COMMANDS = {
    1: "OPEN_RETURN_PATH",
    2: "PING",
    3: "POSTCOPY_ADVISE",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "PACKAGED",
    8: "ENABLE_COLO",
    9: "POSTCOPY_RESUME",
    10: "RECV_BITMAP",
    11: "SWITCHOVER_START",
}


@dataclass(frozen=True)
class StreamProgress:
    """How far a stream has been read; pages are of the target's page size."""

    bytes_read: int
    pages_data: int
    pages_zero: int


def fail(message: str, hint: str = "") -> NoReturn:
    """Raises :class:`ImageError` with a hint that fits any malformed stream."""
    raise ImageError(
        message, hint=hint or "the file is damaged, truncated or no stream; take a new snapshot"
    )


class StreamReader:
    """Buffered exact reads from a descriptor, which stays the caller's.

    Args:
        fd: a pipe, socket or file.
        offset: the stream offset of its next byte; equal to the file offset where ``seek`` is used.
    """

    def __init__(self, fd: int, offset: int = 0) -> None:
        self.fd = fd
        self._error = new_error()
        self._lock = threading.Lock()
        self._stream: Any = lib.qpc_stream_create(fd, offset, self._error)
        if self._stream == ffi.NULL:
            raise_error(self._error, hint="free memory or file descriptors")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the reader; no other call of this reader may be under way but ``cancel``."""
        with self._lock:
            stream, self._stream = self._stream, ffi.NULL
            lib.qpc_stream_destroy(stream)

    def cancel(self) -> None:
        """Ends the reading, from any thread; it then raises ``OperationCancelledError``."""
        with self._lock:
            if self._stream != ffi.NULL:
                lib.qpc_stream_cancel(self._stream)

    def progress(self) -> StreamProgress | None:
        """From any thread; None once closed."""
        with self._lock:
            if self._stream == ffi.NULL:
                return None
            ret = ffi.new("struct qpc_stream_progress *")
            lib.qpc_stream_read_progress(self._stream, ret)
        return StreamProgress(ret.bytes, ret.pages_data, ret.pages_zero)

    @property
    def cancel_fd(self) -> int:
        """Readable once cancelled; for copies that go around the reader."""
        return int(lib.qpc_stream_cancel_fd(self._stream))

    def _check(self, result: int) -> int:
        return checked(result, self._error)

    @property
    def offset(self) -> int:
        return int(lib.qpc_stream_offset(self._stream))

    def seek(self, offset: int) -> None:
        """Goes on at ``offset``; the descriptor must be a file."""
        self._check(lib.qpc_stream_seek(self._stream, offset, self._error))

    def read(self, size: int) -> bytes:
        """Exactly ``size`` bytes; the caller has bounded it."""
        data = bytearray(size)
        self._check(lib.qpc_stream_read(self._stream, ffi.from_buffer(data), size, self._error))
        return bytes(data)

    def peek(self, size: int) -> bytes:
        """Up to ``size`` (at most 1024) bytes, fewer at the end; they stay unread."""
        buffer = ffi.new("uint8_t[]", size)
        got = self._check(lib.qpc_stream_peek(self._stream, buffer, size, self._error))
        return bytes(ffi.buffer(buffer, got))

    def u8(self) -> int:
        return self.read(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.read(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self.read(4), "big")

    def u64(self) -> int:
        return int.from_bytes(self.read(8), "big")

    def name(self, what: str, size: int | None = None) -> str:
        """A name of 1 to 255 bytes, its length byte first unless ``size`` is given."""
        at = self.offset
        size = self.u8() if size is None else size
        if not 0 < size <= NAME_BYTES_MAX:
            fail(f"the {what} at offset {at} has a length of {size}")
        try:
            text = self.read(size).decode()
        except UnicodeDecodeError:
            fail(f"the {what} at offset {at} is not text")
        if not text.isprintable():
            fail(f"the {what} at offset {at} has unprintable characters")
        return text

    def add_block(
        self,
        block: BlockHeader,
        page_size_bytes: int,
        page_fd: int = -1,
        page_offset_bytes: int = 0,
    ) -> int:
        """Declares a block of the list; see ``qpc_stream_add_block``."""
        return self._check(
            lib.qpc_stream_add_block(
                self._stream,
                block.name.encode(),
                block.size_bytes,
                page_size_bytes,
                page_fd,
                page_offset_bytes,
                self._error,
            )
        )

    def ram_section(self, records_fd: int) -> None:
        """Consumes the page records of one section; see ``qpc_stream_ram_section``."""
        self._check(lib.qpc_stream_ram_section(self._stream, records_fd, self._error))

    def block_counts(self, index: int) -> tuple[int, int, int]:
        """Data records, zero records, and pages that hold data, of block ``index``."""
        ret = ffi.new("struct qpc_stream_counts *")
        self._check(lib.qpc_stream_read_counts(self._stream, index, ret, self._error))
        return ret.pages_data, ret.pages_zero, ret.pages_written

    def written_bitmap(self, index: int, pages: int) -> bytes:
        """One bit per page of a lazy block, least significant first: holds data."""
        bitmap = lib.qpc_stream_written_bitmap(self._stream, index)
        return bytes(ffi.buffer(bitmap, (pages + 7) // 8))

    def copy_rest(self, out_fd: int) -> None:
        """Appends what is left of the stream to ``out_fd``."""
        self._check(lib.qpc_stream_copy_rest(self._stream, out_fd, self._error))


def checked(result: int, error: Any) -> int:
    """Like ``_native.check``, with hints, and ``OperationCancelledError`` for ECANCELED."""
    if result < 0 and error.errnum == errno.ECANCELED:
        raise OperationCancelledError(ffi.string(error.message).decode(errors="replace"))
    if result < 0 and error.errnum in (errno.ENOSPC, errno.EDQUOT):
        raise_error(error, hint="free disk space, or write the image to another file system")
    if error.code == lib.QPC_FORMAT:
        return check(result, error, hint="the file is damaged or truncated; take a new snapshot")
    return check(result, error, hint="look at the cause; nothing was changed in the guest")


@dataclass(frozen=True)
class Configuration:
    """The CONFIGURATION section: what both sides of a migration must agree on."""

    machine: str
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None

    @property
    def page_size_bytes(self) -> int:
        return 1 << (self.target_page_bits or DEFAULT_PAGE_BITS)

    def with_capability(self, name: str, on: bool) -> Configuration:
        others = tuple(c for c in self.capabilities if c != name)
        return replace(self, capabilities=(*others, name) if on else others)

    def pack(self) -> bytes:
        """The section, its type byte included."""
        machine = self.machine.encode()
        parts = [struct.pack(">BI", SectionType.CONFIGURATION, len(machine)), machine]
        if self.target_page_bits is not None:
            parts += [_subsection("target-page-bits"), struct.pack(">I", self.target_page_bits)]
        if self.capabilities:
            parts += [_subsection("capabilities"), struct.pack(">I", len(self.capabilities))]
            parts += [pack_name(name) for name in self.capabilities]
        if self.uuid is not None:
            parts += [_subsection("uuid"), self.uuid]
        return b"".join(parts)


def pack_name(name: str) -> bytes:
    encoded = name.encode()
    return bytes([len(encoded)]) + encoded


def _subsection(name: str) -> bytes:
    return (
        struct.pack(">B", SectionType.SUBSECTION) + pack_name(f"configuration/{name}") + b"\0\0\0\1"
    )


def read_magic(reader: StreamReader) -> bool:
    """Reads magic and version; returns whether it is a lazy state (``QEVL``)."""
    magic = reader.read(4)
    if magic not in (MAGIC, LAZY_MAGIC):
        fail(
            f"not a migration stream: it begins with {magic!r}",
            "give an image directory, a QEMU migration stream, or a libvirt save file",
        )
    version = reader.u32()
    if version != VERSION:
        fail(f"migration stream version {version} is not known, only {VERSION}")
    return magic == LAZY_MAGIC


def read_configuration(reader: StreamReader) -> Configuration:
    """Reads the section with its type byte and subsections."""
    if reader.u8() != SectionType.CONFIGURATION:
        fail(
            "the stream has no CONFIGURATION section",
            "use a machine type newer than pc-i440fx-2.3, which sends its configuration",
        )
    machine = reader.name("machine name", reader.u32())
    page_bits: int | None = None
    capabilities: tuple[str, ...] = ()
    uuid: bytes | None = None
    seen: set[str] = set()
    while reader.peek(1) == bytes([SectionType.SUBSECTION]):
        at = reader.offset
        reader.u8()
        name = reader.name("configuration subsection's name")
        reader.u32()  # its version: always 1
        if name in seen:
            fail(f"the subsection {name} at offset {at} comes twice")
        seen.add(name)
        if name == "configuration/target-page-bits":
            page_bits = reader.u32()
            if not 10 <= page_bits <= 16:
                fail(f"a target page of 2^{page_bits} bytes is not supported")
        elif name == "configuration/capabilities":
            count = reader.u32()
            if not 0 < count <= CAPABILITIES_MAX:
                fail(f"{count} capabilities at offset {at}")
            capabilities = tuple(reader.name("capability") for _ in range(count))
        elif name == "configuration/uuid":
            uuid = reader.read(16)
        else:
            fail(
                f"the configuration subsection {name} at offset {at} is not known",
                "this QEMU is newer than this program: update qemu-postcopy",
            )
    return Configuration(machine, page_bits, capabilities, uuid)


@dataclass(frozen=True)
class SectionHeader:
    """START and FULL name their section; PART and END repeat the id only."""

    kind: SectionType
    section_id: int
    name: str
    instance_id: int
    version_id: int

    def pack(self, kind: SectionType | None = None) -> bytes:
        """The header, or that of a later section of the same id."""
        kind = self.kind if kind is None else kind
        head = struct.pack(">BI", kind, self.section_id)
        if kind not in (SectionType.START, SectionType.FULL):
            return head
        return head + pack_name(self.name) + struct.pack(">II", self.instance_id, self.version_id)

    def pack_footer(self) -> bytes:
        return struct.pack(">BI", SectionType.FOOTER, self.section_id)


def read_section_header(reader: StreamReader, kind: SectionType) -> SectionHeader:
    """Reads what follows the type byte of START or FULL."""
    section_id = reader.u32()
    name = reader.name("section name")
    return SectionHeader(kind, section_id, name, reader.u32(), reader.u32())


#: of START or FULL: type, id, length of the name, name, instance, version
LONGEST_HEADER_BYTES = 1 + 4 + 1 + 255 + 4 + 4


def begins_section(data: bytes, ram_id: int | None) -> bool:
    """Whether the header of RAM, or of a device's state, may begin here.

    ``ram_id`` is the number that the RAM has, where it has begun.
    """
    kind = data[0] if data else -1
    if kind in (SectionType.PART, SectionType.END):
        return ram_id is not None and data[1:5] == ram_id.to_bytes(4, "big")
    if len(data) < 6 or kind not in (SectionType.START, SectionType.FULL) or not data[5]:
        return False
    name = data[6 : 6 + data[5]]
    if kind == SectionType.START:
        return name == b"ram"
    return len(name) == data[5] and all(0x20 < byte < 0x7F for byte in name)


def read_footer(reader: StreamReader, section_id: int) -> bool:
    """Reads a footer, if there is one (old machine types have none)."""
    if reader.peek(1) != bytes([SectionType.FOOTER]):
        return False
    at = reader.offset
    reader.u8()
    if (found := reader.u32()) != section_id:
        fail(f"the footer at offset {at} is of section {found}, not of {section_id}")
    return True


@dataclass(frozen=True)
class MappedHeader:
    """Where a block's pages are in a mapped-ram file (offsets from the file's begin)."""

    page_size_bytes: int
    bitmap_offset_bytes: int
    pages_offset_bytes: int


@dataclass(frozen=True)
class BlockHeader:
    """One entry of the RAM section's block list."""

    name: str
    size_bytes: int
    #: where postcopy-ram is on and the back-end has pages other than the host's
    page_size_bytes: int | None = None
    #: guest physical address, where x-ignore-shared is on
    address: int | None = None
    mapped: MappedHeader | None = None

    def pack(self) -> bytes:
        """The entry without optional fields."""
        return pack_name(self.name) + struct.pack(">Q", self.size_bytes)


def read_block_list_size(reader: StreamReader, page_size_bytes: int) -> int:
    """Reads the list's head; returns the sum of the blocks' sizes in bytes."""
    at = reader.offset
    head = reader.u64()
    if head & (page_size_bytes - 1) != FLAG_MEM_SIZE:
        fail(f"the RAM section at offset {at} does not begin with its block list")
    return head - FLAG_MEM_SIZE


def read_block_name_and_size(
    reader: StreamReader, known: Sequence[BlockHeader], left_bytes: int, page_size_bytes: int
) -> tuple[str, int]:
    """Reads the fixed part of a list entry."""
    at = reader.offset
    name = reader.name("RAM block's name")
    size = reader.u64()
    if size > min(left_bytes, BLOCK_BYTES_MAX) or size % page_size_bytes:
        fail(f"the RAM block {name} at offset {at} cannot have {size} bytes")
    if any(block.name == name for block in known):
        fail(f"the RAM block {name} at offset {at} is listed twice")
    if len(known) == BLOCKS_MAX:
        fail(f"more than {BLOCKS_MAX} RAM blocks")
    return name, size


def read_optional_fields(
    reader: StreamReader, *, advised: bool, ignore_shared: bool
) -> tuple[int | None, int | None]:
    """Reads page size and address of a list entry, as far as they are there.

    The page size is sent only where it differs from the host's, which a reader cannot know; but a
    name's length byte is never 0, and the page record after the list has flags: what comes next
    tells them apart.
    """
    page_size: int | None = None
    if advised:
        ahead = reader.peek(16)
        if ignore_shared:
            ahead = ahead[8:]
        if ahead[:1] == b"\0" and int.from_bytes(ahead[:8], "big") & 0x3FF == 0:
            page_size = reader.u64()
            if page_size & (page_size - 1) or page_size < 4096:
                fail(f"a page size of {page_size} before offset {reader.offset}")
    return page_size, reader.u64() if ignore_shared else None


def pack_block_list(blocks: Sequence[BlockHeader]) -> bytes:
    """The list's head and its entries, for a plain stream."""
    total = sum(block.size_bytes for block in blocks)
    return struct.pack(">Q", total | FLAG_MEM_SIZE) + b"".join(block.pack() for block in blocks)


def pack_end_of_records() -> bytes:
    return struct.pack(">Q", FLAG_EOS)
