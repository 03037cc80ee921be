"""Small migration streams and save files made by hand, good ones and such as lie."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field

from qemu_postcopy.image import libvirt_save
from qemu_postcopy.image.records import Configuration

PAGE = 4096
RAM = 16 << 20
DEVICES = [{"name": "timer", "instance_id": 0, "version": 2}]
DESCRIPTION = {"page_size": PAGE, "devices": DEVICES}


def page_record(page: int, name: str, fill: int) -> bytes:
    head = struct.pack(">Q", page * PAGE | 0x08) + bytes([len(name)]) + name.encode()
    return head + bytes([fill]) * PAGE


def zero_record(page: int, name: str) -> bytes:
    return struct.pack(">Q", page * PAGE | 0x02) + bytes([len(name)]) + name.encode() + b"\0"


@dataclass
class Stream:
    """A small whole stream, each part of which a test may replace."""

    magic: bytes = b"QEVM\0\0\0\3"
    configuration: bytes = field(
        default_factory=lambda: Configuration("pc-i440fx-7.2", None, ()).pack()
    )
    commands: bytes = b""
    start: bytes = b"\1" + struct.pack(">I", 2) + b"\3ram" + struct.pack(">II", 0, 4)
    total: bytes = struct.pack(">Q", RAM + PAGE | 4)
    blocks: bytes = b"\2m0" + struct.pack(">Q", RAM) + b"\3rom" + struct.pack(">Q", PAGE)
    first_records: bytes = struct.pack(">Q", 0x10)
    first_footer: bytes = b"\x7e" + struct.pack(">I", 2)
    parts: bytes = b""
    end: bytes = b"\3" + struct.pack(">I", 2)
    last_records: bytes = (
        page_record(0, "m0", 7)
        + page_record(5, "m0", 8)
        + zero_record(6, "m0")
        + page_record(0, "rom", 9)
        + struct.pack(">Q", 0x10)
    )
    last_footer: bytes = b"\x7e" + struct.pack(">I", 2)
    devices: bytes = (
        b"\4" + struct.pack(">I", 9) + b"\5timer" + struct.pack(">II", 0, 2) + b"state" + b"\x7e"
        b"\0\0\0\x09"
    )
    end_mark: bytes = b"\0"
    description: bytes = json.dumps(DESCRIPTION).encode()

    def pack(self) -> bytes:
        return b"".join(
            [
                self.magic,
                self.configuration,
                self.commands,
                self.start,
                self.total,
                self.blocks,
                self.first_records,
                self.first_footer,
                self.parts,
                self.end,
                self.last_records,
                self.last_footer,
                self.devices,
                self.end_mark,
                b"\6" + struct.pack(">I", len(self.description)),
                self.description,
            ]
        )


def command(number: int, data: bytes = b"") -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(data)) + data


def configured(*subsections: bytes) -> bytes:
    return Configuration("pc-i440fx-7.2").pack() + b"".join(subsections)


def subsection(name: str, data: bytes) -> bytes:
    return b"\5" + bytes([len(name)]) + name.encode() + b"\0\0\0\1" + data


HUGE = 0xFFFFFFFF
HOSTILE: dict[str, tuple[Stream, str]] = {
    "other magic": (Stream(magic=b"QEVX\0\0\0\3"), "neither"),
    "other version": (Stream(magic=b"QEVM\0\0\0\4"), "version 4"),
    "state of an image": (Stream(magic=b"QEVL\0\0\0\3"), "state of an image"),
    "no configuration": (Stream(configuration=b""), "CONFIGURATION"),
    "huge machine name": (Stream(configuration=b"\7" + struct.pack(">I", HUGE)), "machine name"),
    "binary machine name": (Stream(configuration=b"\7\0\0\0\2\xff\xfe"), "not text"),
    "escape in machine name": (Stream(configuration=b"\7\0\0\0\2\x1b["), "unprintable"),
    "unknown subsection": (Stream(configuration=configured(subsection("new", b""))), "new"),
    "subsection twice": (
        Stream(configuration=configured(*[subsection("configuration/uuid", bytes(16))] * 2)),
        "twice",
    ),
    "many capabilities": (
        Stream(
            configuration=configured(
                subsection("configuration/capabilities", struct.pack(">I", HUGE))
            )
        ),
        "capabilities",
    ),
    "page of 2^40": (
        Stream(
            configuration=configured(
                subsection("configuration/target-page-bits", struct.pack(">I", 40))
            )
        ),
        "2\\^40",
    ),
    "x-ignore-shared": (
        Stream(configuration=Configuration("pc", None, ("x-ignore-shared",)).pack()),
        "x-ignore-shared",
    ),
    "packaged": (Stream(commands=command(7, struct.pack(">I", HUGE))), "PACKAGED"),
    "unknown command": (Stream(commands=command(99)), "command 99"),
    "other iterated section": (
        Stream(start=b"\1" + struct.pack(">I", 2) + b"\5block" + struct.pack(">II", 0, 1)),
        "block at offset",
    ),
    "state before RAM": (
        Stream(start=b"\4" + struct.pack(">I", 2) + b"\3dev" + struct.pack(">II", 0, 1)),
        "before the RAM's end",
    ),
    "RAM version": (
        Stream(start=b"\1" + struct.pack(">I", 2) + b"\3ram" + struct.pack(">II", 0, 5)),
        "version 5",
    ),
    "no list": (Stream(total=struct.pack(">Q", 0x10)), "block list"),
    "empty list": (Stream(total=struct.pack(">Q", 4), blocks=b""), "no block"),
    "block longer than total": (Stream(total=struct.pack(">Q", PAGE | 4)), "cannot have"),
    "huge block": (
        Stream(total=struct.pack(">Q", 1 << 60 | 4), blocks=b"\2m0" + struct.pack(">Q", 1 << 60)),
        "cannot have",
    ),
    "unaligned block": (Stream(blocks=b"\2m0" + struct.pack(">Q", 100)), "cannot have"),
    "unnamed block": (Stream(blocks=b"\0" + struct.pack(">Q", PAGE)), "length of 0"),
    "block twice": (Stream(blocks=(b"\2m0" + struct.pack(">Q", PAGE)) * 2), "twice"),
    "second list": (Stream(first_records=struct.pack(">Q", PAGE | 4)), "second block list"),
    "multifd": (Stream(first_records=struct.pack(">Q", 0x200)), "multifd"),
    "xbzrle": (Stream(last_records=struct.pack(">Q", 0x40)), "xbzrle"),
    "continues nothing": (Stream(last_records=struct.pack(">Q", 0x28)), "none was named"),
    "page outside": (Stream(last_records=page_record(RAM // PAGE, "m0", 1)), "outside"),
    "unknown block": (Stream(last_records=page_record(0, "m1", 1)), "not announced"),
    "wrong footer": (Stream(first_footer=b"\x7e" + struct.pack(">I", 3)), "footer"),
    "wrong section": (Stream(end=b"\3" + struct.pack(">I", 3)), "not open"),
    "no end": (
        Stream(end=b"", last_records=b"", last_footer=b""),
        "before the RAM's end",
    ),
    "no page at all": (Stream(last_records=struct.pack(">Q", 0x10)), "no page of RAM block m0"),
    "section type": (Stream(parts=b"\x33"), "0x33"),
    "no device part": (Stream(devices=b"\x09"), "section type"),
    "description no JSON": (Stream(description=b"{nonsense"), "no JSON"),
    "description no object": (Stream(description=b"[{}]"), "description"),
    "description too deep": (Stream(description=b'{"a":' + b"[" * 100_000), "no JSON"),
    "no end mark": (Stream(end_mark=b"\1"), "truncated"),
}


XML = "<domain type='qemu'><name>web</name><os><type arch='x86_64'>hvm</type></os></domain>"


def save_file(number: int, stream: bytes, magic: bytes = libvirt_save.MAGIC) -> bytes:
    xml = XML.encode() + b"\0"
    data = xml + b"<cookie/>\0" + bytes(1000)
    head = magic + struct.pack("<5I", 2, len(data), 1, number, len(xml)) + bytes(56)
    return head + data + stream
