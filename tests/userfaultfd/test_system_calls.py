"""Promises S2 and S6: who faults inside a system call never learns of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from userfaultfd.faulting import PAGE, WAIT_SECONDS, next_fault, page_of

from qemu_postcopy.region import Region
from qemu_postcopy.userfaultfd import Feature, Userfaultfd

pytestmark = pytest.mark.needs("uffd", "root")

Background = Callable[..., Future[Any]]


def answer_pages(ours: Userfaultfd, memory: Region, pages: int) -> None:
    """Answers one fault for each page, page n by bytes of n + 1."""
    for _ in range(pages):
        address = next_fault(ours).address & -PAGE
        ours.copy(address, page_of((address - memory.address) // PAGE + 1))


def test_read_into_missing_memory_returns_as_ever(background: Background) -> None:
    reader, writer = os.pipe()
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open() as ours:
        ours.register(memory.address, memory.length)
        os.write(writer, b"x" * 4000)
        reading = background(os.readv, reader, [memory.buffer(PAGE - 2000, 4000)])
        answer_pages(ours, memory, 2)
        assert reading.result(WAIT_SECONDS) == 4000
        whole = page_of(1)[:-2000] + b"x" * 4000 + page_of(2)[2000:]
        assert memory.first_difference(0, whole) is None
    os.close(reader)
    os.close(writer)


def test_write_from_missing_memory_writes_what_the_answer_brought(
    background: Background, tmp_path: Path
) -> None:
    with (
        (tmp_path / "out").open("wb", buffering=0) as out,
        Region.anonymous(2 * PAGE) as memory,
        Userfaultfd.open() as ours,
    ):
        ours.register(memory.address, memory.length)
        writing = background(os.writev, out.fileno(), [memory.buffer(0, 2 * PAGE)])
        answer_pages(ours, memory, 2)
        assert writing.result(WAIT_SECONDS) == 2 * PAGE
    assert (tmp_path / "out").read_bytes() == page_of(1) + page_of(2)


def test_another_reader_of_missing_memory_gets_its_data(background: Background) -> None:
    with Region.anonymous(3 * PAGE) as memory, Userfaultfd.open() as ours:
        ours.register(memory.address, memory.length)
        reading = background(memory.read_by_kernel, 0, 3 * PAGE)
        answer_pages(ours, memory, 3)
        assert reading.result(WAIT_SECONDS) == page_of(1) + page_of(2) + page_of(3)


@pytest.mark.needs("disk")
@pytest.mark.parametrize("kind", ["anonymous", "memfd"])
def test_direct_io_reads_into_and_writes_from_missing_memory(
    kind: str, background: Background, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(page_of(0x51) * 2)
    disk = os.open(path, os.O_RDWR | os.O_DIRECT)
    made = Region.memfd(4 * PAGE) if kind == "memfd" else Region.anonymous(4 * PAGE)
    with made as memory, Userfaultfd.open(Feature.MISSING_SHMEM) as ours:
        ours.register(memory.address, memory.length)
        reading = background(os.preadv, disk, [memory.buffer(0, 2 * PAGE)], 0)
        answer_pages(ours, memory, 2)
        assert reading.result(WAIT_SECONDS) == 2 * PAGE
        assert memory.first_difference(0, page_of(0x51) * 2) is None
        writing = background(os.pwritev, disk, [memory.buffer(2 * PAGE, 2 * PAGE)], 0)
        answer_pages(ours, memory, 2)
        assert writing.result(WAIT_SECONDS) == 2 * PAGE
    os.close(disk)
    assert path.read_bytes() == page_of(3) + page_of(4)
