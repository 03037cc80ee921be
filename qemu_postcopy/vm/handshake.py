"""The message by which a VMM hands its own userfaultfd over: put together from its parts, checked.

First step of serving a VMM that is no QEMU.  Firecracker's protocol
(docs/snapshotting/handling-page-faults-on-snapshot-resume.md there): on a UNIX stream socket one
JSON array, an object per memory region, and one descriptor beside it (SCM_RIGHTS).  Pure: no I/O
and no state but the bytes; whoever receives feeds them in.  Nothing the peer says is trusted.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from qemu_postcopy.errors import HandshakeError

#: A region takes some 100 bytes, and a VMM has a handful; a stream may come in any pieces.
MESSAGE_BYTES_MAX = 1 << 20
REGIONS_MAX = 512
#: [ and { of a well-formed message nest twice.
_DEPTH_MAX = 8
SMALL_PAGE_BYTES = 4096
PAGE_BYTES_MAX = 1 << 30
#: User space ends far below, on every architecture.
ADDRESS_END = 1 << 62
_HINT = "the VMM must send what Firecracker sends: a JSON array of regions and one userfaultfd"


@dataclass(frozen=True)
class Region:
    """One piece of guest memory; all in bytes.

    ``address`` in the VMM, ``offset_bytes`` of its first byte in the memory file.
    """

    address: int
    size_bytes: int
    offset_bytes: int
    page_size_bytes: int


class HandshakeReader:
    """Puts one message together.  Not thread-safe.

    Feed it what each recvmsg(2) returned until it says that the message is whole.
    """

    def __init__(self) -> None:
        self._received = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._descriptors = 0
        #: offset behind the closing bracket, 0 before it has come
        self._end = 0

    def feed(self, data: bytes, descriptor_count: int = 0, flags: int = 0) -> bool:
        """Takes in one part.

        Args:
            data: empty for the end of the stream.
            descriptor_count: how many descriptors came with it.
            flags: as recvmsg(2) returned them.

        Returns:
            whether the message is whole.

        Raises:
            HandshakeError: it can become no message any more.
        """
        # recvmsg(2): MSG_CTRUNC, control data was discarded, and with it descriptors.
        if flags & socket.MSG_CTRUNC:
            _refuse("more descriptors came than one, or the limit of open files is reached")
        if flags & socket.MSG_TRUNC:
            _refuse("a part of it was cut off")
        self._descriptors += descriptor_count
        if self._descriptors > 1:
            _refuse(f"{self._descriptors} descriptors came, not one")
        if not data:
            _refuse(
                "the VMM hung up before it had sent anything"
                if not self._received
                else f"it ends after {len(self._received)} bytes, before its closing bracket"
            )
        self._received += data
        if len(self._received) > MESSAGE_BYTES_MAX:
            _refuse(f"it is longer than {MESSAGE_BYTES_MAX} bytes")
        self._scan()
        if self._end and bytes(self._received[self._end :]).strip():
            _refuse("something follows its closing bracket")
        return bool(self._end)

    def regions(self) -> list[Region]:
        """What the whole message says, in the order of the addresses.

        Raises:
            HandshakeError: it is not whole, came without a descriptor, or makes no sense.
        """
        if not self._end:
            _refuse("it is not whole")
        if self._descriptors != 1:
            _refuse("no descriptor came with it")
        return parse_regions(bytes(self._received[: self._end]))

    def _scan(self) -> None:
        """Looks for the closing bracket, each byte once."""
        for at in range(self._scanned, len(self._received)):
            byte = self._received[at]
            if self._end:
                break
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif byte == 0x5C:  # \
                    self._escaped = True
                elif byte == 0x22:  # "
                    self._in_string = False
            elif byte == 0x22:
                self._in_string = True
            elif byte in b"[{":
                self._depth += 1
                if self._depth > _DEPTH_MAX:
                    _refuse("it nests too deep")
            elif byte in b"]}":
                self._depth -= 1
                if self._depth == 0:
                    self._end = at + 1
            if self._depth == 0 and not self._end and byte not in b" \t\r\n":
                _refuse("it is no JSON array")
        self._scanned = len(self._received)


def parse_regions(text: bytes) -> list[Region]:
    """The regions of a whole message.

    Keys that are not known are left alone: newer Firecrackers have added some.

    Raises:
        HandshakeError: no array of regions, or one that cannot be.
    """
    try:
        document = json.loads(
            text.decode(), object_pairs_hook=_without_doubles, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise HandshakeError(f"the handshake is no JSON: {error}", hint=_HINT) from error
    if not isinstance(document, list):
        _refuse("it is no JSON array")
    if not 0 < len(document) <= REGIONS_MAX:
        _refuse(f"it has {len(document)} regions, not 1 to {REGIONS_MAX}")
    regions = [_parse_region(entry, index) for index, entry in enumerate(document)]
    regions.sort(key=lambda region: region.address)
    for before, after in itertools.pairwise(regions):
        if before.address + before.size_bytes > after.address:
            _refuse(f"regions overlap at {after.address:#x}")
    return regions


def check_within(regions: Iterable[Region], pieces: Sequence[int]) -> None:
    """Every region lies inside one of the memory file's pieces.

    Args:
        pieces: their sizes in bytes; they follow each other, the first at offset 0.

    Raises:
        HandshakeError: one begins or ends where there is no data.
    """
    ends = list(itertools.accumulate(pieces))
    for region in regions:
        end = region.offset_bytes + region.size_bytes
        if not any(
            begin <= region.offset_bytes and end <= stop
            for begin, stop in zip([0, *ends], ends, strict=False)
        ):
            _refuse(
                f"the region at {region.address:#x} wants bytes {region.offset_bytes} to {end}, "
                f"and the image has pieces of {', '.join(map(str, pieces))} bytes"
            )


def _parse_region(entry: Any, index: int) -> Region:
    if not isinstance(entry, dict):
        _refuse(f"region {index} is no object")
    page = _page_size(entry, index)
    region = Region(
        address=_number(entry, "base_host_virt_addr", index, ADDRESS_END),
        size_bytes=_number(entry, "size", index, ADDRESS_END),
        offset_bytes=_number(entry, "offset", index, ADDRESS_END),
        page_size_bytes=page,
    )
    if region.size_bytes == 0:
        _refuse(f"region {index} is empty")
    if region.address == 0 or region.address + region.size_bytes > ADDRESS_END:
        _refuse(f"region {index} lies outside of every address space")
    for name, value in (
        ("base_host_virt_addr", region.address),
        ("size", region.size_bytes),
        ("offset", region.offset_bytes),
    ):
        if value % page:
            _refuse(f"{name} of region {index} is no multiple of its page size {page}")
    return region


def _page_size(entry: dict[str, Any], index: int) -> int:
    """``page_size``; or ``page_size_kib``, deprecated, which holds bytes too; or, before both
    existed (Firecracker 1.6), 4 KiB, which was all there was."""
    sizes = {
        _number(entry, key, index, PAGE_BYTES_MAX)
        for key in ("page_size", "page_size_kib")
        if key in entry
    } or {SMALL_PAGE_BYTES}
    if len(sizes) > 1:
        _refuse(f"page_size and page_size_kib of region {index} differ; both are in bytes")
    page = sizes.pop()
    if page < SMALL_PAGE_BYTES or page & (page - 1):
        _refuse(f"region {index} has pages of {page} bytes")
    return page


def _number(entry: dict[str, Any], key: str, index: int, most: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 <= value <= most:
        _refuse(f"{key} of region {index} is no number from 0 to {most}")
    return value


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _refuse(why: str) -> NoReturn:
    raise HandshakeError(f"the handshake cannot be served: {why}", hint=_HINT)
