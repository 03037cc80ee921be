"""Streams made by hand: every field that can lie does so once, and is refused by name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.streams import (
    DESCRIPTION,
    DEVICES,
    HOSTILE,
    HUGE,
    PAGE,
    RAM,
    XML,
    Stream,
    command,
    page_record,
    save_file,
)

from qemu_postcopy.errors import HostError, ImageError, PostcopyError
from qemu_postcopy.image import libvirt_save, mapped_ram
from qemu_postcopy.image.convert import export, import_image, inspect_file
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.records import BlockHeader
from qemu_postcopy.image.stream import block_file_name, is_lazy_by_default


def import_bytes(tmp_path: Path, data: bytes, **options: object) -> Image:
    (tmp_path / "source").write_bytes(data)
    return import_image(tmp_path / "source", tmp_path / "image", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["commands", "parts"])
def test_state_of_a_device_that_comes_before_the_pages_is_kept(place: str, tmp_path: Path) -> None:
    """virtio-mem's, since QEMU 8.0; what it holds may look like its end."""
    footer = b"\x7e" + struct.pack(">I", 7)
    state = b"bitmap" + footer + b"\1" + bytes(3000) + footer + b"\4\0"
    head = b"\4" + struct.pack(">I", 7) + b"\5early" + struct.pack(">II", 0, 1)
    devices = [{"name": "early", "instance_id": 0}, *DEVICES]
    description = json.dumps({**DESCRIPTION, "devices": devices}).encode()
    stream = Stream(description=description)
    setattr(stream, place, head + state + footer)
    image = import_bytes(tmp_path, stream.pack())
    assert head + state + footer in (image.path / "state.bin").read_bytes()


def test_whole_stream_becomes_an_image_and_comes_back(tmp_path: Path) -> None:
    image = import_bytes(tmp_path, Stream().pack())
    assert [block.name for block in image.manifest.blocks] == ["m0"]
    page_file = (image.path / "ram/m0").read_bytes()
    assert len(page_file) == RAM
    assert page_file[:PAGE] == b"\7" * PAGE
    assert page_file[5 * PAGE : 6 * PAGE] == b"\x08" * PAGE
    assert image.manifest.block("m0").data_bytes == 2 * PAGE
    export(image, tmp_path / "plain")
    again = import_image(tmp_path / "plain", tmp_path / "again")
    assert again.manifest.blocks == image.manifest.blocks
    export(image, tmp_path / "mapped", "mapped-ram")
    mapped = import_image(tmp_path / "mapped", tmp_path / "mapped-image")
    assert mapped.manifest.blocks == image.manifest.blocks
    # The ROM of the mapped file's image is in its state again.
    summary, _ = inspect_file(mapped.path / "state.bin")
    rom = summary.blocks[1]
    assert (rom.name, rom.pages_data) == ("rom", 1)
    assert summary.capabilities == ()


def test_iterations_are_summed_up_and_empty_ones_are_not_kept(tmp_path: Path) -> None:
    part = b"\2" + struct.pack(">I", 2)
    footer = b"\x7e" + struct.pack(">I", 2)
    eos = struct.pack(">Q", 0x10)
    lazy_only = part + page_record(9, "m0", 1) + eos + footer
    with_rom = part + page_record(0, "rom", 2) + eos + footer
    data = Stream(parts=lazy_only * 50 + with_rom + lazy_only).pack()
    image = import_bytes(tmp_path, data)
    source, _ = inspect_file(tmp_path / "source")
    state, _ = inspect_file(image.path / "state.bin")
    assert {s.kind: s.count for s in source.sections} == {"START": 1, "PART": 52, "END": 1}
    assert {s.kind: s.count for s in state.sections} == {"START": 1, "PART": 1, "END": 1}
    assert state.blocks[1].pages_data == 2


def test_switchover_command_is_kept_and_return_path_commands_are_not(tmp_path: Path) -> None:
    commands = command(1) + command(2, b"\0\0\0\1") + command(11)
    image = import_bytes(tmp_path, Stream(commands=commands).pack())
    state, _ = inspect_file(image.path / "state.bin")
    assert [s.name for s in state.sections if s.kind == "COMMAND"] == ["SWITCHOVER_START"]


def test_optional_fields_of_the_block_list_are_read(tmp_path: Path) -> None:
    """As with postcopy-ram and huge pages: a page size behind the blocks that have such pages."""
    blocks = b"\2m0" + struct.pack(">QQ", RAM, 2 << 20) + b"\3rom" + struct.pack(">Q", PAGE)
    advise = command(3, struct.pack(">QQ", 2 << 20, PAGE))
    image = import_bytes(tmp_path, Stream(commands=advise, blocks=blocks).pack())
    assert image.manifest.block("m0").page_size_bytes == 2 << 20
    blocks = b"\3rom" + struct.pack(">Q", PAGE) + b"\2m0" + struct.pack(">QQ", RAM, 2 << 20)
    (tmp_path / "second").write_bytes(Stream(commands=advise, blocks=blocks).pack())
    summary, _ = inspect_file(tmp_path / "second")
    assert [block.page_size_bytes for block in summary.blocks] == [None, 2 << 20]


@pytest.mark.parametrize("name", HOSTILE)
def test_lie_is_refused_by_name_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    stream, words = HOSTILE[name]
    with pytest.raises(ImageError, match=words) as caught:
        import_bytes(tmp_path, stream.pack())
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_stream_cut_at_every_byte_is_refused(tmp_path: Path) -> None:
    whole = Stream().pack()
    page_data = whole.index(b"\7" * PAGE)
    inside_pages = range(page_data + 10, page_data + PAGE - 10)
    for length in range(len(whole)):
        if length not in inside_pages and (length % 3 == 0 or length > len(whole) - 200):
            (tmp_path / "source").write_bytes(whole[:length])
            with pytest.raises(ImageError):
                inspect_file(tmp_path / "source")


def test_random_changes_end_in_an_image_or_an_error_of_ours(tmp_path: Path) -> None:
    """With bounded memory: no length of the stream is believed."""
    whole = Stream().pack()
    interesting = [i for i in range(len(whole)) if whole[i : i + 1] not in b"\7\x08\x09"]
    chance = random.Random(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = tmp_path / "source"
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            data[chance.choice(interesting)] = chance.choice((0, 1, 4, 0x7F, 0x80, 0xFF))
        source.write_bytes(data)
        try:
            inspect_file(source)
        except PostcopyError as error:
            assert error.hint
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


# ---- mapped-ram ----


def mapped_file(tmp_path: Path) -> bytearray:
    image = import_bytes(tmp_path, Stream().pack())
    export(image, tmp_path / "mapped", "mapped-ram")
    return bytearray((tmp_path / "mapped").read_bytes())


@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (0, struct.pack(">I", 2), "version 2"),
        (4, struct.pack(">Q", 8192), "8192 byte pages"),
        (12, struct.pack(">Q", 1 << 62), "do not fit"),
        (12, struct.pack(">Q", 0), "do not fit"),
        (20, struct.pack(">Q", (1 << 64) - PAGE), "do not fit"),
        (20, struct.pack(">Q", 0), "do not fit"),
        (20, struct.pack(">Q", 1 << 40), "do not fit"),
    ],
)
def test_mapped_header_that_lies_is_refused(
    position: int, value: bytes, words: str, tmp_path: Path
) -> None:
    data = mapped_file(tmp_path)
    header = data.index(b"\2m0" + struct.pack(">Q", RAM)) + 11 + position
    data[header : header + len(value)] = value
    (tmp_path / "lie").write_bytes(data)
    with pytest.raises(ImageError, match=words):
        import_image(tmp_path / "lie", tmp_path / "other")


def test_mapped_file_places_pages_as_qemu_demands() -> None:
    blocks = [BlockHeader("m0", RAM), BlockHeader("rom", PAGE)]
    placed = mapped_ram.place_blocks(blocks, 100, PAGE)
    for block in placed:
        assert block.mapped is not None
        assert block.mapped.pages_offset_bytes % (1 << 20) == 0
    assert mapped_ram.bitmap_size_bytes(65 * PAGE, PAGE) == 16


# ---- libvirt save files ----


@pytest.mark.parametrize(
    ("number", "pack"),
    [
        (0, bytes),
        (1, gzip.compress),
        (2, bz2.compress),
        (3, lzma.compress),
    ],
    ids=["raw", "gzip", "bzip2", "xz"],
)
def test_save_file_is_imported_with_its_domain_xml(
    number: int, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    image = import_bytes(tmp_path, save_file(number, pack(Stream().pack())))
    assert image.manifest.domain_xml == XML
    assert image.manifest.architecture == "x86_64"
    assert image.manifest.provenance.guest_name == "web"
    assert image.manifest.block("m0").data_bytes == 2 * PAGE


@pytest.mark.parametrize(("number", "name"), [(4, "lzop"), (5, "zstd")])
def test_save_file_with_other_compression_needs_its_program(
    number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which(name):
        with pytest.raises(ImageError, match=f"{name} data"):
            import_bytes(tmp_path, save_file(number, b"data"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=name):
        import_bytes(tmp_path, save_file(number, b"data"))


def test_damaged_compression_is_told_from_a_damaged_stream(tmp_path: Path) -> None:
    packed = gzip.compress(Stream().pack())
    with pytest.raises(ImageError, match="gzip data"):
        import_bytes(tmp_path, save_file(1, packed[: len(packed) // 2]))
    with pytest.raises(ImageError, match="offset"):
        import_bytes(tmp_path, save_file(1, gzip.compress(Stream().pack()[:-3000])))


def test_sparse_save_file_has_offsets_from_the_file_s_begin(tmp_path: Path) -> None:
    """The header stands in front of a mapped-ram stream whose offsets already count it."""
    head = save_file(6, b"")
    image = import_bytes(tmp_path, Stream().pack())
    export(image, tmp_path / "mapped", "mapped-ram")
    stream = (tmp_path / "mapped").read_bytes()
    # Moved by whole MiB, as pages must be aligned; every header is moved along.
    shift = 1 << 20
    head = head[:20] + struct.pack("<I", shift - 92) + head[24:]
    data = bytearray(head.ljust(shift, b"\0") + stream)
    for name, size in ((b"\2m0", RAM), (b"\3rom", PAGE)):
        at = data.index(name + struct.pack(">Q", size)) + len(name) + 8 + 12
        bitmap, pages = struct.unpack_from(">QQ", data, at)
        struct.pack_into(">QQ", data, at, bitmap + shift, pages + shift)
    (tmp_path / "sparse").write_bytes(data)
    imported = import_image(tmp_path / "sparse", tmp_path / "second")
    assert imported.manifest.blocks == image.manifest.blocks
    summary, header = inspect_file(tmp_path / "sparse")
    assert header is not None
    assert (summary.format, header.format) == ("mapped-ram", "sparse")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (save_file(0, b"", libvirt_save.PARTIAL_MAGIC), "did not finish"),
        (save_file(0, b"")[:50], "not a libvirt"),
        (save_file(0, b"")[:200], "ends in its domain XML"),
        (save_file(77, b""), "format number 77"),
        (libvirt_save.MAGIC + struct.pack("<5I", 2, HUGE, 1, 0, 0) + bytes(56), "announces"),
        (libvirt_save.MAGIC + struct.pack("<5I", 3, 10, 1, 0, 0) + bytes(56), "version 3"),
    ],
)
def test_save_file_header_that_lies_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=words):
        import_bytes(tmp_path, data)


def test_domain_xml_with_entities_is_refused(tmp_path: Path) -> None:
    xml = b"<!DOCTYPE x [<!ENTITY a 'b'>]><domain/>\0"
    head = libvirt_save.MAGIC + struct.pack("<5I", 2, len(xml), 1, 0, 0) + bytes(56)
    with pytest.raises(ImageError, match="entities"):
        import_bytes(tmp_path, head + xml + Stream().pack())


# ---- names ----


def test_block_names_become_safe_file_names() -> None:
    assert block_file_name("pc.ram") == "pc.ram"
    assert block_file_name("/objects/m0") == "%2Fobjects%2Fm0"
    assert block_file_name("..") == "%2E."
    names = {block_file_name("é" * 100 + end) for end in "ab"}
    assert len(names) == 2
    assert all(len(name) <= 200 and "/" not in name for name in names)


def test_roms_and_video_memory_are_not_paged_unless_named() -> None:
    assert is_lazy_by_default(BlockHeader("pc.ram", 64 << 20))
    assert not is_lazy_by_default(BlockHeader("pc.ram", 8 << 20))
    for name in ("0000:00:02.0/vga.vram", "system.flash0", "pc.bios", "virtio-net-pci.rom"):
        assert not is_lazy_by_default(BlockHeader(name, 64 << 20))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="neither"):
        import_bytes(tmp_path, io.BytesIO(b"\x7fELF" + bytes(100)).getvalue())
