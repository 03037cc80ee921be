"""What the kernel and QEMU print about memory is read exactly, or refused."""

from __future__ import annotations

import pytest

from qemu_postcopy.errors import HostError, QmpError
from qemu_postcopy.vm.layout import (
    FlatRange,
    ListedBlock,
    covering_mappings,
    parse_flat_view,
    parse_ramblocks,
)
from qemu_postcopy.vm.process import Mapping, parse_maps

RAMBLOCK_7_2 = (
    "              Block Name    PSize              Offset               Used              Total\n"
    "                      m0    4 KiB  0x0000000000000000 0x0000000100000000 0x0000000100000000\n"
    "    /rom@etc/acpi/tables    4 KiB  0x0000000100080000 0x0000000000020000 0x0000000000200000\n"
    "    0000:00:02.0/vga.vram   2 MiB  0x0000000100280000 0x0000000001000000 0x0000000001000000\n"
    "                            4 KiB  0x0000000110280000 0x0000000001000000 0x0000000001000000\n"
)
RAMBLOCK_10 = (
    "              Block Name    PSize              Offset               Used              Total"
    "                HVA  RO\n"
    "                      m0    2 MiB  0x0000000000000000 0x0000000004000000 0x0000000004000000"
    " 0x00007f0a5fe00000  rw\n"
    "                 pc.bios    4 KiB  0x0000000004000000 0x0000000000040000 0x0000000000040000"
    " 0x00007f0a6be00000  ro\n"
)
FLAT_VIEW = """FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-00000000000bffff (prio 0, ram): m0 KVM
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-00000000bfffffff (prio 0, ram): m0 @0000000000100000 KVM
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  0000000100000000-000000013fffffff (prio -1, ram): odd @ name @00000000c0000000
"""


def test_block_list_of_qemu_7_2() -> None:
    assert parse_ramblocks(RAMBLOCK_7_2) == [
        ListedBlock("m0", 4096, 4 << 30, None),
        ListedBlock("/rom@etc/acpi/tables", 4096, 0x20000, None),
        ListedBlock("0000:00:02.0/vga.vram", 2 << 20, 16 << 20, None),
        ListedBlock("", 4096, 16 << 20, None),
    ]


def test_block_list_of_qemu_10_has_the_address() -> None:
    assert parse_ramblocks(RAMBLOCK_10) == [
        ListedBlock("m0", 2 << 20, 64 << 20, 0x7F0A5FE00000),
        ListedBlock("pc.bios", 4096, 0x40000, 0x7F0A6BE00000),
    ]


def test_unknown_line_of_the_block_list_is_refused() -> None:
    with pytest.raises(QmpError, match="not understood"):
        parse_ramblocks(RAMBLOCK_7_2 + "something new\n")


def test_flat_view_of_the_guests_memory_alone() -> None:
    assert parse_flat_view(FLAT_VIEW) == [
        FlatRange(0, 0xC0000, "ram", "m0", 0),
        FlatRange(0xC0000, 0x20000, "rom", "pc.rom", 0),
        FlatRange(0x100000, 0xBFF00000, "ram", "m0", 0x100000),
        FlatRange(0xFEE00000, 0x100000, "i/o", "apic-msi", 0),
        FlatRange(0x100000000, 0x40000000, "ram", "odd @ name", 0xC0000000),
    ]
    assert parse_flat_view(FLAT_VIEW, "nowhere") == []


def test_mappings_with_every_kind_of_path() -> None:
    text = (
        b"7f8d7ffff000-7f8e7ffff000 rw-s 00001000 00:01 1136           /memfd:a b (deleted)\n"
        b"7f8ec9b3e000-7f8ec9b3f000 rw-p 00000000 00:00 0 \n"
        b"7f8eca47c000-7f8eca47e000 r-xp 00000000 00:00 0              [vdso]\n"
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 103:1f 0     [vsyscall]\n"
    )
    memfd, anonymous, vdso, vsyscall = parse_maps(text)
    assert memfd == Mapping(
        0x7F8D7FFFF000, 0x7F8E7FFFF000, "rw-s", 4096, 0, 1, 1136, "/memfd:a b (deleted)"
    )
    assert (memfd.file_key, memfd.shared) == ((0, 1, 1136), True)
    assert (anonymous.file_key, anonymous.shared, anonymous.path) == (None, False, "")
    assert vdso.path == "[vdso]"
    assert vsyscall.device_major == 0x103


@pytest.mark.parametrize("line", [b"nonsense", b"1-2 rwxp 0 0:0", b"1-2 rw?p 0 0:0 0", b""])
def test_unknown_mapping_line_is_refused(line: bytes) -> None:
    with pytest.raises(HostError, match="not understood"):
        parse_maps(b"1000-2000 rw-p 00000000 00:00 0\n" + line + b"\n")


def test_coverage_has_no_gap() -> None:
    def mapping(start: int, end: int) -> Mapping:
        return Mapping(start, end, "rw-s", 0, 0, 1, 7, "")

    first, second, far = mapping(0x1000, 0x3000), mapping(0x3000, 0x5000), mapping(0x6000, 0x9000)
    mappings = [far, second, first]
    assert covering_mappings(mappings, 0x1000, 0x2000) == [first]
    assert covering_mappings(mappings, 0x2000, 0x3000) == [first, second]
    assert covering_mappings(mappings, 0x4000, 0x3000) == []
    assert covering_mappings(mappings, 0x8000, 0x2000) == []
    assert covering_mappings(mappings, 0x0, 0x1000) == []
