"""Promise: what a pager cannot serve is refused before anything is touched, and says why."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.paging.ledger import Ledger, LedgerBlock
from qemu_postcopy.paging.pager import Pager, PagerBlock
from qemu_postcopy.paging.source import FileSource

PAGES = 64
BLOCK = PagerBlock(
    name="m0",
    address=1 << 30,
    length=PAGES * 4096,
    page_size=4096,
    source=FileSource(os.open("/dev/null", os.O_RDONLY)),
    source_offset=0,
    data_bitmap=bytes(PAGES // 8),
)


@pytest.fixture
def ledger(run_dir: Path) -> Iterator[Ledger]:
    with Ledger.create(run_dir / "ledger", [LedgerBlock("m0", 4096, PAGES * 4096)]) as ledger:
        yield ledger


@pytest.mark.parametrize("chunk_size", [0, 2048, 4097, 12288, 4 << 20])
def test_a_bad_chunk_size(ledger: Ledger, chunk_size: int) -> None:
    with pytest.raises(UsageError, match="chunk size"):
        Pager(0, [BLOCK], ledger, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (replace(BLOCK, page_size=8192), "other sizes"),
        (replace(BLOCK, length=4096), "other sizes"),
        (replace(BLOCK, length=PAGES * 4096 * 2), "other sizes"),
        (replace(BLOCK, address=(1 << 30) + 1), "page-aligned"),
        (replace(BLOCK, address=(1 << 64) - 4096), "page-aligned"),
        (replace(BLOCK, data_bitmap=bytes(PAGES // 8 - 1)), "bitmap"),
    ],
)
def test_a_bad_block(ledger: Ledger, block: PagerBlock, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Pager(0, [block], ledger)


def test_a_source_that_is_none(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="not a descriptor"):
        FileSource(-1)
    closed = FileSource(os.open("/dev/null", os.O_RDONLY))
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        Pager(0, [replace(BLOCK, source=closed)], ledger)


def test_no_block_at_all(ledger: Ledger) -> None:
    with pytest.raises(UsageError, match="no block"):
        Pager(0, [], ledger)


def test_a_refused_pager_leaves_the_ledger_free(run_dir: Path) -> None:
    with Ledger.create(run_dir / "ledger", [LedgerBlock("m0", 4096, PAGES * 4096)]) as ledger:
        with pytest.raises(UsageError, match="chunk size") as refused:
            Pager(0, [BLOCK], ledger, chunk_size=1)
        ledger.close()  # while the exception still refers to the constructor
    assert refused.value.hint is not None
