"""The device state: the opaque rest of a stream behind its RAM, and what QEMU gets of it.

Reads the JSON description at the stream's end (its presence proves that the stream is whole), finds
the devices' sections by it, and hands the state of an image to QEMU as a sealed memfd.  The file is
our own, but its content is not trusted.  Source: QEMU, ``migration/savevm.c``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.records import LAZY_MAGIC, MAGIC, SectionType, fail, pack_name

if TYPE_CHECKING:
    from qemu_postcopy.image.image import Image

_DESCRIPTION_BYTES_MAX = 64 << 20
_PART_BYTES = 1 << 20


@dataclass(frozen=True)
class DeviceSection:
    """One FULL section; offset and size are of the whole section, in the stream."""

    name: str
    instance_id: int
    version_id: int
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class DevicePart:
    """The rest of a stream behind its RAM."""

    devices: tuple[DeviceSection, ...]
    #: VMDESCRIPTION, parsed
    description: dict[str, Any]


def read_device_part(
    fd: int,
    begin_bytes: int,
    end_bytes: int,
    stream_offset_bytes: int,
    *,
    sections: bool,
    early: int = 0,
) -> DevicePart:
    """Checks that the device part is whole and reads its description.

    Args:
        fd: a file that nobody else writes; begin_bytes, end_bytes: the part's place in it.
        stream_offset_bytes: the stream offset of ``begin_bytes``, for what is reported.
        sections: find the devices' sections too; otherwise ``devices`` is empty.
        early: how many devices' states came before the RAM's end; the description names them first.

    Raises:
        ImageError: the part is truncated or does not match its description.
    """
    if end_bytes <= begin_bytes:
        fail(f"the stream ends at offset {stream_offset_bytes}, before the device state")
    with mmap.mmap(fd, end_bytes, access=mmap.ACCESS_READ) as data:
        if data[begin_bytes] not in (SectionType.FULL, SectionType.EOF):
            fail(f"unexpected section type {data[begin_bytes]} at offset {stream_offset_bytes}")
        end_of_sections, description = _read_description(data, begin_bytes, end_bytes)
        devices: tuple[DeviceSection, ...] = ()
        if sections:
            devices = _find_sections(
                data,
                begin_bytes,
                end_of_sections,
                stream_offset_bytes - begin_bytes,
                _section_keys(description)[early:],
            )
    return DevicePart(devices, description)


def end_of_sections(state: int) -> int:
    """Where the EOF byte of a device state is (a descriptor, as :func:`open_device_state` has it).

    QEMU takes a stream that ends before that byte for broken, and one that ends within the
    description behind it for whole (qemu_loadvm_state, migration/savevm.c).

    Raises:
        ImageError: it has no description.
    """
    with mmap.mmap(state, 0, access=mmap.ACCESS_READ) as data:
        head, _ = _find_description(data, 0, len(data))
    return head


def _find_description(data: mmap.mmap, begin: int, end: int) -> tuple[int, int]:
    """Returns the offsets of the EOF byte and of the description's JSON.

    The JSON has no NUL byte and its length is less than 2^24, so the last NUL of the stream is in
    the length field just before it, or in the EOF byte.
    """
    last_nul = data.rfind(b"\0", max(begin, end - _DESCRIPTION_BYTES_MAX), end)
    brace = data.find(b"{", max(last_nul, begin), end) if last_nul >= 0 else -1
    head = brace - 6
    if (
        brace < 0
        or head < begin
        or data[head] != SectionType.EOF
        or data[head + 1] != SectionType.VMDESCRIPTION
        or int.from_bytes(data[head + 2 : brace], "big") != end - brace
    ):
        fail(
            "the stream has no whole description at its end: it is truncated",
            "take a new snapshot; machine types without description (suppress-vmdesc) do not work",
        )
    return head, brace


def _read_description(data: mmap.mmap, begin: int, end: int) -> tuple[int, dict[str, Any]]:
    """Returns the offset of the EOF byte and the description that follows it."""
    head, brace = _find_description(data, begin, end)
    try:
        description = json.loads(data[brace:end])
    except (ValueError, RecursionError):
        fail("the description at the stream's end is no JSON")
    if not isinstance(description, dict):
        fail("the description at the stream's end is no JSON object")
    return head, description


def _find_sections(
    data: mmap.mmap, begin: int, end: int, shift: int, keys: list[tuple[str, int]]
) -> tuple[DeviceSection, ...]:
    """Walks the FULL sections; lengths are not in the stream, but the next header is known."""
    starts: list[int] = []
    position = begin
    for index, (name, instance_id) in enumerate(keys):
        key = pack_name(name) + struct.pack(">I", instance_id)
        found = data.find(key, position, end)
        while found >= 0 and not _is_section_start(data, found - 5, starts, index):
            found = data.find(key, found + 1, end)
        if found < 0 or (index == 0 and found - 5 != begin):
            fail(f"the device {name} of the description is not in the stream")
        starts.append(found - 5)
        position = found + len(key)
    if not keys and begin != end:
        fail("the description names no device, but the stream has some")
    sections = []
    for start, following, (name, instance_id) in zip(starts, [*starts[1:], end], keys, strict=True):
        version_at = start + 5 + len(pack_name(name)) + 4
        sections.append(
            DeviceSection(
                name,
                instance_id,
                int.from_bytes(data[version_at : version_at + 4], "big"),
                start + shift,
                following - start,
            )
        )
    return tuple(sections)


def _is_section_start(data: mmap.mmap, start: int, starts: list[int], index: int) -> bool:
    """A FULL section begins here, behind the footer of the one before where that has one."""
    if start < 0 or data[start] != SectionType.FULL:
        return False
    if index == 0:
        return True
    footer = bytes([SectionType.FOOTER]) + data[starts[-1] + 1 : starts[-1] + 5]
    if index > 1:
        # Footers are on for all sections or for none.
        before = bytes([SectionType.FOOTER]) + data[starts[-2] + 1 : starts[-2] + 5]
        if data[starts[-1] - 5 : starts[-1]] != before:
            return True
    return bytes(data[start - 5 : start]) == footer


def _section_keys(description: dict[str, Any]) -> list[tuple[str, int]]:
    devices = description.get("devices")
    if not isinstance(devices, list):
        fail("the description at the stream's end lists no devices")
    keys = []
    for device in devices:
        name = device.get("name") if isinstance(device, dict) else None
        instance_id = device.get("instance_id") if isinstance(device, dict) else None
        if (
            not isinstance(name, str)
            or not 0 < len(name.encode(errors="replace")) < 256
            or type(instance_id) is not int
            or not 0 <= instance_id < 1 << 32
        ):
            fail("the description at the stream's end has a device without name or instance")
        keys.append((name, instance_id))
    return keys


def open_device_state(image: Image) -> int:
    """The state of an image as QEMU can load it: a sealed memfd at offset 0, magic restored.

    The checksum is of the very bytes that QEMU gets.  The descriptor is the caller's.  Pass it by
    QMP ``getfd`` and ``migrate-incoming fd:NAME`` to a QEMU whose lazy blocks are registered:
    restored without them it would run on zeros.

    Raises:
        ImageError: the file is not what the manifest says.
    """
    state = image.manifest.state
    fd = os.memfd_create("qemu-postcopy-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        digest = hashlib.sha256()
        with contextlib.closing(image.open_state()) as source:
            size = 0
            while part := source.read(_PART_BYTES):
                size += len(part)
                if size > state.size_bytes:
                    break
                digest.update(part)
                if size == len(part):
                    if part[: len(LAZY_MAGIC)] != LAZY_MAGIC:
                        fail(f"{state.file} does not begin with {LAZY_MAGIC!r}")
                    part = MAGIC + part[len(MAGIC) :]
                _write_all(fd, part)
        if size != state.size_bytes or digest.hexdigest() != state.sha256:
            raise ImageError(
                f"{image.path / state.file} was altered: its SHA-256 is not the manifest's",
                hint="take a new snapshot, or copy the image again from a good one",
            )
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
