"""Imports of other files as images, and exports of images for a stock QEMU.

Import picks the format by content: a plain migration stream, a mapped-ram file, a libvirt save file
(raw, compressed, sparse).  Export writes a file that ``-incoming`` restores eagerly, with every
page in it.  Input is not trusted; an output file appears under its name only when it is whole.
Any thread, one call per file.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qemu_postcopy.errors import HostError, ImageError, UsageError
from qemu_postcopy.image import libvirt_save, mapped_ram
from qemu_postcopy.image.device_state import open_device_state
from qemu_postcopy.image.image import Image, Progress
from qemu_postcopy.image.page_data import copy_pages, write_page_records
from qemu_postcopy.image.records import (
    LAZY_MAGIC,
    MAGIC,
    VERSION,
    BlockHeader,
    Configuration,
    SectionHeader,
    SectionType,
    StreamReader,
    fail,
    pack_end_of_records,
    read_block_list_size,
    read_block_name_and_size,
    read_configuration,
    read_footer,
    read_magic,
    read_section_header,
)
from qemu_postcopy.image.stream import Demultiplexer, StreamSummary, read_summary
from qemu_postcopy.image.writer import ImageWriter

ExportFormat = Literal["plain", "mapped-ram"]

#: Machine types that one architecture has; "virt" is shared by several and so not among them.
_ARCHITECTURES = {"pc-": "x86_64", "microvm": "x86_64", "s390-": "s390x", "pseries-": "ppc64"}


@dataclass(frozen=True)
class SourceFile:
    """A file that holds a migration stream, recognised by its content."""

    #: "stream" (plain or mapped-ram) or "libvirt-save"
    kind: str
    fd: int
    offset_bytes: int
    save_header: libvirt_save.SaveHeader | None


@contextmanager
def open_source(path: str | Path) -> Iterator[SourceFile]:
    """Opens a stream, mapped-ram or save file, decompressing where needed.

    Raises:
        ImageError: the content is none of these, or cannot be decompressed here.
        HostError: the file cannot be read.
    """
    path = Path(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"{path} cannot be read: {error.strerror}", hint="look at the path and its permissions"
        ) from error
    try:
        try:
            head = os.pread(fd, 16, 0)
        except OSError as error:
            raise ImageError(
                f"{path} is no file: {error.strerror}", hint="save a pipe's content to a file first"
            ) from error
        if head[:4] in (MAGIC, LAZY_MAGIC):
            yield SourceFile("stream", fd, 0, None)
        elif head in (libvirt_save.MAGIC, libvirt_save.PARTIAL_MAGIC):
            header = libvirt_save.read_save_header(fd)
            with libvirt_save.open_stream(fd, header) as (stream_fd, offset):
                yield SourceFile("libvirt-save", stream_fd, offset, header)
        else:
            fail(
                f"{path} is neither a migration stream nor a libvirt save file",
                "give a file that QEMU's migrate or virsh save wrote",
            )
    finally:
        os.close(fd)


def inspect_file(path: str | Path) -> tuple[StreamSummary, libvirt_save.SaveHeader | None]:
    """The structure of a stream, mapped-ram or save file, or of an image's ``state.bin``."""
    with open_source(path) as source:
        return read_summary(source.fd, source.offset_bytes), source.save_header


def import_image(
    source_path: str | Path,
    target: str | Path,
    *,
    lazy_block_names: Collection[str] | None = None,
    architecture: str | None = None,
    qemu_version: str | None = None,
    launch: Mapping[str, Any] | None = None,
    page_sizes_bytes: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Image:
    """Makes an image of a file that QEMU or libvirt wrote.

    Args:
        lazy_block_names: None: blocks of 16 MiB and more that are no ROM, flash or video memory.
        architecture: None: told by the domain XML or the machine type.
        progress: of the checksums, as for ``ImageWriter.finish``.

    Raises:
        ImageError: malformed, truncated or not supported input.
        UsageError: the target is there already, a named block is not in the file, or the
            architecture is not known.
    """
    with ImageWriter(target) as writer:
        with open_source(source_path) as source:
            header = source.save_header
            summary = Demultiplexer(
                source.fd, writer.directory, lazy_block_names, offset_bytes=source.offset_bytes
            ).run()
        xml = header.domain_xml if header else None
        guest_name = None
        if xml is not None:
            xml_architecture, guest_name = read_domain(xml)
            architecture = architecture or xml_architecture
        if header is not None and launch is None:
            launch = noted_launch(header)
        return writer.finish(
            summary,
            architecture=architecture or guess_architecture(summary.machine),
            source=f"{source.kind} file {Path(source_path).name}",
            qemu_version=qemu_version,
            guest_name=guest_name,
            launch=launch,
            page_sizes_bytes=page_sizes_bytes,
            domain_xml=xml,
            progress=progress,
        )


def noted_launch(header: libvirt_save.SaveHeader) -> dict[str, Any]:
    """What a save file's header says beside the XML, for a restore through libvirt."""
    return {"libvirt": {"cookie": header.cookie, "was_running": header.was_running}}


def guess_architecture(machine: str) -> str:
    """As in the QEMU binary's name.

    Raises:
        UsageError: several have a machine of that name.
    """
    for prefix, architecture in _ARCHITECTURES.items():
        if machine.startswith(prefix):
            return architecture
    raise UsageError(
        f"the architecture of a {machine} is not known",
        hint="say it with --architecture, as in the QEMU binary's name (aarch64)",
    )


def read_domain(xml: str) -> tuple[str | None, str | None]:
    """Architecture and name in libvirt's domain XML."""
    from xml.etree import ElementTree

    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        fail("the domain XML declares entities, which libvirt never writes")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        fail(f"the domain XML is malformed: {error}")
    # The save file's root may be <domstatus> or such; the domain is in it or is it.
    domain = root if root.tag == "domain" else root.find(".//domain")
    if domain is None:
        return None, None
    kind = domain.find("os/type")
    architecture = kind.get("arch") if kind is not None else None
    if architecture == "i686":
        architecture = "i386"
    return architecture, domain.findtext("name")


def export(
    image: Image,
    path: str | Path,
    format: ExportFormat = "plain",
) -> None:
    """Writes the whole guest as one file that a stock QEMU restores with ``-incoming``.

    The plain format suits every QEMU; mapped-ram needs QEMU 9, ``file:`` and the capability.

    Raises:
        UsageError: the file is there already.
        ImageError: the image was altered.
        HostError: it cannot be written.
    """
    path = Path(path)
    if path.exists():
        raise UsageError(f"{path} is there already", hint="choose another name, or remove it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.qpc-partial")
    image.check_data()
    try:
        out_fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            state_fd = open_device_state(image)
            try:
                if format == "plain":
                    _export_plain(image, state_fd, out_fd)
                else:
                    _export_mapped(image, state_fd, out_fd)
            finally:
                os.close(state_fd)
            os.fsync(out_fd)
        finally:
            os.close(out_fd)
        temporary.rename(path)
    except OSError as error:
        raise HostError(
            f"{path} cannot be written: {error.strerror}", hint="look at its directory and disk"
        ) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


@dataclass(frozen=True)
class _StateHead:
    """The begin of a state: up to the page records of the RAM START section."""

    configuration: Configuration
    ram: SectionHeader
    #: offset of the START section
    ram_offset_bytes: int
    blocks: tuple[BlockHeader, ...]


def _read_head(reader: StreamReader) -> _StateHead:
    read_magic(reader)
    configuration = read_configuration(reader)
    page_size = configuration.page_size_bytes
    while reader.peek(1) == bytes([SectionType.COMMAND]):
        reader.read(3)
        reader.read(reader.u16())
    ram_offset = reader.offset
    if reader.u8() != SectionType.START:
        fail("the state does not begin with a RAM section")
    ram = read_section_header(reader, SectionType.START)
    blocks: list[BlockHeader] = []
    left = read_block_list_size(reader, page_size)
    while left:
        name, size = read_block_name_and_size(reader, blocks, left, page_size)
        blocks.append(BlockHeader(name, size))
        left -= size
    return _StateHead(configuration, ram, ram_offset, tuple(blocks))


def _check_blocks(image: Image, head: _StateHead) -> None:
    sizes = {block.name: block.size_bytes for block in head.blocks}
    for block in image.manifest.blocks:
        if sizes.get(block.name) != block.size_bytes:
            raise ImageError(
                f"the state has no RAM block {block.name} of {block.size_bytes} bytes",
                hint="manifest and state are not of the same image; copy it again",
                block=block.name,
            )


def _export_plain(image: Image, state_fd: int, out_fd: int) -> None:
    """The state with all pages of the lazy blocks put into its RAM START section."""
    with StreamReader(state_fd) as reader:
        head = _read_head(reader)
        _check_blocks(image, head)
        position = reader.offset
        _copy_range(state_fd, 0, position, out_fd)
        for block in image.manifest.blocks:
            fd, offset = image.open_block(block.name)
            try:
                write_page_records(
                    fd,
                    offset,
                    block.size_bytes,
                    image.manifest.target_page_size_bytes,
                    block.name,
                    out_fd,
                )
            finally:
                os.close(fd)
        # What follows in the state is the section's other records or its end mark.
        _copy_range(state_fd, position, os.fstat(state_fd).st_size, out_fd)


def _export_mapped(image: Image, state_fd: int, out_fd: int) -> None:
    """Every page at its place, then the RAM section's end and the device state."""
    with StreamReader(state_fd) as reader:
        head = _read_head(reader)
        _check_blocks(image, head)
        page_size = head.configuration.page_size_bytes
        configuration = head.configuration.with_capability(mapped_ram.CAPABILITY, True).pack()
        start = MAGIC + VERSION.to_bytes(4, "big") + configuration + head.ram.pack()
        os.pwrite(out_fd, start, 0)
        placed = mapped_ram.place_blocks(head.blocks, len(start), page_size)
        end = mapped_ram.write_block_list(out_fd, placed, len(start))
        # Pages of eager blocks are in the state's records: the same reader brings them to their
        # places in the file.
        for block in placed:
            assert block.mapped is not None
            reader.add_block(block, page_size, out_fd, block.mapped.pages_offset_bytes)
        footer = _read_ram_sections(reader, head.ram)
        lazy = {block.name for block in image.manifest.blocks}
        for index, block in enumerate(placed):
            if block.name in lazy:
                bitmap = _copy_lazy_block(image, block, page_size, out_fd)
            else:
                bitmap = reader.written_bitmap(index, block.size_bytes // page_size)
            assert block.mapped is not None
            os.pwrite(out_fd, bitmap, block.mapped.bitmap_offset_bytes)
        mark = pack_end_of_records() + (head.ram.pack_footer() if footer else b"")
        tail = mark + head.ram.pack(SectionType.END) + mark
        os.pwrite(out_fd, tail, end)
        os.lseek(out_fd, end + len(tail), os.SEEK_SET)
        reader.copy_rest(out_fd)


def _read_ram_sections(reader: StreamReader, ram: SectionHeader) -> bool:
    """Consumes all RAM records of a state; returns whether its sections have footers."""
    reader.ram_section(-1)
    footer = read_footer(reader, ram.section_id)
    while True:
        kind = reader.u8()
        if kind == SectionType.COMMAND:
            reader.read(2)
            reader.read(reader.u16())
            continue
        if kind not in (SectionType.PART, SectionType.END) or reader.u32() != ram.section_id:
            fail(f"unexpected section type {kind:#x} at offset {reader.offset}")
        reader.ram_section(-1)
        read_footer(reader, ram.section_id)
        if kind == SectionType.END:
            return footer


def _copy_lazy_block(image: Image, block: BlockHeader, page_size: int, out_fd: int) -> bytes:
    assert block.mapped is not None
    fd, offset = image.open_block(block.name)
    try:
        return bytes(
            copy_pages(
                fd, offset, block.size_bytes, page_size, out_fd, block.mapped.pages_offset_bytes
            )
        )
    finally:
        os.close(fd)


def _copy_range(source_fd: int, begin: int, end: int, out_fd: int) -> None:
    while begin < end:
        part = os.pread(source_fd, min(1 << 20, end - begin), begin)
        if not part:
            fail(f"the state ends at offset {begin}")
        begin += len(part)
        view = memoryview(part)
        while view:
            view = view[os.write(out_fd, view) :]
