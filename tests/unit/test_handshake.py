"""The handshake message: read in any pieces, and every lie in it refused by name."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_postcopy.errors import HandshakeError
from qemu_postcopy.vm.handshake import (
    MESSAGE_BYTES_MAX,
    REGIONS_MAX,
    HandshakeReader,
    Region,
    check_within,
    parse_regions,
)

MIB = 1 << 20
#: As Firecracker 1.10 writes it.
FIRST = {
    "base_host_virt_addr": 0x7F1200000000,
    "size": 3 * MIB,
    "offset": 0,
    "page_size": 4096,
    "page_size_kib": 4096,
}
SECOND = {**FIRST, "base_host_virt_addr": 0x7F1300000000, "offset": 3 * MIB, "size": MIB}


def message(*regions: Any) -> bytes:
    return json.dumps(list(regions)).encode()


def test_regions_are_read_as_firecracker_writes_them() -> None:
    reader = HandshakeReader()
    assert reader.feed(message(SECOND, FIRST), 1)
    assert reader.regions() == [
        Region(0x7F1200000000, 3 * MIB, 0, 4096),
        Region(0x7F1300000000, MIB, 3 * MIB, 4096),
    ]


@pytest.mark.parametrize(
    ("sizes", "page"),
    [
        ({"page_size": 2 * MIB, "page_size_kib": 2 * MIB}, 2 * MIB),
        ({"page_size": 4096}, 4096),
        ({"page_size_kib": 4096}, 4096),
        ({}, 4096),
    ],
)
def test_page_sizes_of_every_firecracker_are_bytes(sizes: dict[str, int], page: int) -> None:
    region = {"base_host_virt_addr": 1 << 40, "size": 4 * MIB, "offset": 0, **sizes}
    assert parse_regions(message(region))[0].page_size_bytes == page


def test_a_key_that_a_newer_firecracker_adds_is_left_alone() -> None:
    assert parse_regions(message({**FIRST, "guest_memfd": None}))


@given(st.lists(st.integers(1, 400)), st.integers(0, 3))
def test_it_does_not_matter_in_which_pieces_a_message_comes(sizes: list[int], late: int) -> None:
    regions = [{**FIRST, "base_host_virt_addr": (i + 1) << 40} for i in range(20)]
    rest = b" \n" + message(*regions) + b"\n"
    reader = HandshakeReader()
    whole = False
    for number, size in enumerate([*sizes, len(rest)]):
        part, rest = rest[:size], rest[size:]
        if part:
            whole = reader.feed(part, int(number == min(late, len(sizes))))
    assert whole
    if reader._descriptors:
        assert len(reader.regions()) == 20


def test_brackets_in_text_do_not_end_a_message() -> None:
    reader = HandshakeReader()
    assert not reader.feed(b'[{"note": "]}\\"]", ', 1)
    assert reader.feed(message(FIRST)[2:])
    assert len(reader.regions()) == 1


HOSTILE: dict[str, tuple[Any, str]] = {
    "nothing": ([], "0 regions"),
    "too many": ([FIRST] * (REGIONS_MAX + 1), "regions"),
    "not objects": ([1], "no object"),
    "overlap": ([FIRST, {**SECOND, "base_host_virt_addr": 0x7F1200001000}], "overlap"),
    "same twice": ([FIRST, FIRST], "overlap"),
    "no address": ([{"size": 4096, "offset": 0}], "base_host_virt_addr"),
    "address zero": ([{**FIRST, "base_host_virt_addr": 0}], "outside"),
    "address misaligned": ([{**FIRST, "base_host_virt_addr": 4097}], "multiple"),
    "address beyond": ([{**FIRST, "base_host_virt_addr": (1 << 62) - 4096}], "outside"),
    "address a float": ([{**FIRST, "base_host_virt_addr": 4096.0}], "no number"),
    "address a text": ([{**FIRST, "base_host_virt_addr": "0x1000"}], "no number"),
    "size zero": ([{**FIRST, "size": 0}], "empty"),
    "size negative": ([{**FIRST, "size": -4096}], "no number"),
    "size misaligned": ([{**FIRST, "size": 4095}], "multiple"),
    "size of 128 bits": ([{**FIRST, "size": 1 << 127}], "no number"),
    "size true": ([{**FIRST, "size": True}], "no number"),
    "size null": ([{**FIRST, "size": None}], "no number"),
    "offset misaligned": ([{**FIRST, "offset": 1}], "multiple"),
    "offset negative": ([{**FIRST, "offset": -4096}], "no number"),
    "pages of 1 byte": ([{**FIRST, "page_size": 1, "page_size_kib": 1}], "pages of 1"),
    "pages of 3 pages": ([{**FIRST, "page_size": 12288, "page_size_kib": 12288}], "pages of"),
    "page sizes differ": ([{**FIRST, "page_size_kib": 4}], "differ"),
    "page larger than region": (
        [{**FIRST, "page_size": 1 << 30, "page_size_kib": 1 << 30}],
        "multiple",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_region_that_cannot_be_is_refused_by_name(name: str) -> None:
    regions, words = HOSTILE[name]
    with pytest.raises(HandshakeError, match=words) as caught:
        parse_regions(json.dumps(regions).encode())
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        b"[",
        b"[{]",
        b"{}",
        b'[{"size": NaN}]',
        b'[{"size": 1, "size": 2}]',
        b"\xff\xfe",
        b"[1e999]",
        b"[" + b"9" * 5000 + b"]",
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(HandshakeError):
        parse_regions(text)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(b"", 0, 0)], "hung up"),
        ([(b"[", 1, 0), (b"", 0, 0)], "ends after 1 bytes"),
        ([(b"[", 1, socket.MSG_CTRUNC)], "descriptors"),
        ([(b"[", 1, socket.MSG_TRUNC)], "cut off"),
        ([(b"[", 2, 0)], "2 descriptors"),
        ([(b"[", 1, 0), (b"]", 1, 0)], "2 descriptors"),
        ([(b'{"a": 1}', 1, 0)], "no JSON array"),
        ([(b"hello", 1, 0)], "no JSON array"),
        ([(b"[] []", 1, 0)], "follows"),
        ([(b"[]", 1, 0), (b"x", 0, 0)], "follows"),
        ([(b"[" * 20, 1, 0)], "deep"),
        ([(b'["' + b"x" * (MESSAGE_BYTES_MAX + 1), 1, 0)], "longer"),
        ([(message(FIRST), 0, 0)], "no descriptor"),
    ],
)
def test_what_never_becomes_a_message_is_refused(
    parts: list[tuple[bytes, int, int]], words: str
) -> None:
    reader = HandshakeReader()
    with pytest.raises(HandshakeError, match=words):
        for part in parts:
            reader.feed(*part)
        reader.regions()


def test_a_region_beyond_the_image_is_refused() -> None:
    check_within([Region(4096, MIB, 3 * MIB, 4096)], [4 * MIB])
    check_within([Region(4096, MIB, 3 * MIB, 4096)], [3 * MIB, MIB])
    for pieces in ([3 * MIB], [4 * MIB - 4096], [3 * MIB + 4096, MIB - 4096], []):
        with pytest.raises(HandshakeError, match="pieces"):
            check_within([Region(4096, MIB, 3 * MIB, 4096)], pieces)
