"""Promise: a ledger comes back as it was written; a damaged one is refused, never believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from qemu_postcopy.errors import HostError, ImageError
from qemu_postcopy.paging.ledger import (
    ALIGNMENT,
    ENTRY,
    HEADER,
    JOURNAL_BYTES,
    UNMAPPED,
    Ledger,
    LedgerBlock,
)

BLOCKS = [LedgerBlock("pc.ram", 4096, 4096 * 5000), LedgerBlock("m0", 2 << 20, (2 << 20) * 3)]


@pytest.fixture
def path(run_dir: Path) -> Path:
    return run_dir / "ledger"


def write_entry(path: Path, index: int, *values: object) -> None:
    content = bytearray(path.read_bytes())
    ENTRY.pack_into(content, HEADER.size + index * ENTRY.size, *values)
    path.write_bytes(content)


def test_fresh_it_is_private_and_every_page_is_missing(path: Path) -> None:
    with Ledger.create(path, BLOCKS) as ledger:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert ledger.states("pc.ram") == bytes(5000)
        assert ledger.states("m0") == bytes(3)
        assert path.stat().st_blocks * 512 >= path.stat().st_size, "space is not reserved"


def test_blocks_and_journal_do_not_overlap(path: Path) -> None:
    with Ledger.create(path, BLOCKS) as ledger:
        first, second = ledger.blocks
        assert ledger.journal_offset >= HEADER.size + 2 * ENTRY.size
        assert ledger.journal_offset + JOURNAL_BYTES <= first.offset
        assert first.offset + first.page_count <= second.offset
        assert not any(offset % ALIGNMENT for offset in (first.offset, second.offset))


def test_opened_again_it_says_the_same(path: Path) -> None:
    with Ledger.create(path, BLOCKS) as ledger:
        offset = ledger.block("pc.ram").offset
        ledger.mapping[offset + 4321] = 3
    with Ledger.open(path) as again:
        assert again.blocks == ledger.blocks
        assert again.states("pc.ram")[4321] == 3
        assert sum(again.states("pc.ram")) == 3


def test_an_existing_ledger_is_not_overwritten(path: Path) -> None:
    Ledger.create(path, BLOCKS).close()
    with pytest.raises(FileExistsError):
        Ledger.create(path, BLOCKS)


def test_an_unknown_block_is_a_key_error(path: Path) -> None:
    with Ledger.create(path, BLOCKS) as ledger, pytest.raises(KeyError):
        ledger.block("nobody")


def test_no_space_is_told_and_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(HostError, match="no space for the ledger"):
        Ledger.create(path, BLOCKS)
    assert not path.exists()


@pytest.mark.parametrize("size", [0, 1, HEADER.size - 1, HEADER.size, 4096, 12288])
def test_cut_short_it_is_refused(path: Path, size: int) -> None:
    Ledger.create(path, BLOCKS).close()
    os.truncate(path, size)
    with pytest.raises(ImageError, match="not a usable ledger"):
        Ledger.open(path)


def test_something_else_is_refused(path: Path) -> None:
    path.write_bytes(b"QEVM" + bytes(100000))
    with pytest.raises(ImageError, match="bad header"):
        Ledger.open(path)


@pytest.mark.parametrize(
    ("page_size", "length", "offset"),
    [
        (0, 4096, 8192),
        (4095, 4096, 8192),
        (12288, 12288, 8192),
        (4096, 4097, 8192),
        (4096, 4096 * 5000, 8193),
        (4096, 4096 << 40, 8192),
        (4096, 4096, 1 << 62),
    ],
)
def test_an_entry_that_lies_is_refused(
    path: Path, page_size: int, length: int, offset: int
) -> None:
    Ledger.create(path, BLOCKS).close()
    write_entry(path, 0, b"pc.ram", page_size, length, offset)
    with pytest.raises(ImageError, match="not a usable ledger"):
        Ledger.open(path)


def test_more_blocks_than_there_can_be_are_refused(path: Path) -> None:
    Ledger.create(path, BLOCKS).close()
    content = bytearray(path.read_bytes())
    HEADER.pack_into(content, 0, content[:8], 0xFFFFFFFF)
    path.write_bytes(content)
    with pytest.raises(ImageError, match="bad header"):
        Ledger.open(path)


def test_unmapped_parts_are_left_out_of_what_is_mapped(path: Path) -> None:
    with Ledger.create(path, BLOCKS) as ledger:
        assert ledger.mapped_runs("m0") == [(0, 3)]
        begin = ledger.block("pc.ram").offset
        ledger.mapping[begin + 10 : begin + 4000] = bytes([UNMAPPED]) * 3990
        assert ledger.mapped_runs("pc.ram") == [(0, 10), (4000, 1000)]
        ledger.mapping[begin : begin + 5000] = bytes([UNMAPPED]) * 5000
        assert ledger.mapped_runs("pc.ram") == []
