"""Promise: a page is taken for arrived only where the kernel says so of QEMU's own memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qemu_postcopy.paging.ledger import FILLING, PRESENT, Ledger, LedgerBlock
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.presence import found_anew, note_arrived
from qemu_postcopy.vm.process import ProcessIdentity

PAGES = 16
PAGE = 5
SIZE = PAGES * 4096


class Taken:
    """This process in the place of QEMU, with memory of which no page is there."""

    def __init__(self, directory: Path) -> None:
        self.memfd = os.memfd_create("ram", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, SIZE)
        self.memory = mmap.mmap(self.memfd, SIZE)
        status = os.fstat(self.memfd)
        self.block = RamBlock(
            name="m0",
            backend_id="m0",
            address=ctypes.addressof(ctypes.c_char.from_buffer(self.memory)),
            size_bytes=SIZE,
            page_size_bytes=4096,
            backing="memfd",
            shared=True,
            file_key=(os.major(status.st_dev), os.minor(status.st_dev), status.st_ino),
            file_path=f"/proc/self/fd/{self.memfd}",
            file_offset_bytes=0,
        )
        self.identity = ProcessIdentity.open(os.getpid())
        self.ledger = Ledger.create(directory / "ledger", [LedgerBlock("m0", 4096, SIZE)])
        self.ledger.mapping[self.ledger.block("m0").offset + PAGE] = FILLING

    def state(self) -> int:
        return self.ledger.states("m0")[PAGE]


@pytest.fixture
def taken(run_dir: Path) -> Iterator[Taken]:
    made = Taken(run_dir)
    yield made
    made.ledger.close()
    made.identity.close()
    os.close(made.memfd)


def test_page_in_the_file_has_arrived_though_no_page_table_has_it(taken: Taken) -> None:
    os.pwrite(taken.memfd, b"data", PAGE * 4096)
    assert note_arrived(taken.ledger, [taken.block], taken.identity) == 1
    assert taken.state() == PRESENT


def test_number_that_is_not_open_here_says_nothing(taken: Taken) -> None:
    os.pwrite(taken.memfd, b"data", PAGE * 4096)
    elsewhere = replace(taken.block, file_path="/proc/self/fd/999999")
    assert note_arrived(taken.ledger, [elsewhere], taken.identity) == 0
    assert taken.state() == FILLING


@pytest.mark.parametrize("kind", ["file with data", "pipe"])
def test_other_file_behind_the_path_says_nothing(taken: Taken, run_dir: Path, kind: str) -> None:
    """A page that has not arrived would be answered with zeros."""
    if kind == "pipe":
        other, writer = os.pipe()
        os.close(writer)
    else:
        (run_dir / "pages").write_bytes(b"x" * SIZE)
        other = os.open(run_dir / "pages", os.O_RDONLY)
    try:
        block = replace(taken.block, file_path=f"/proc/self/fd/{other}")
        assert note_arrived(taken.ledger, [block], taken.identity) == 0
        assert taken.state() == FILLING
    finally:
        os.close(other)


def test_path_of_a_dead_sidecars_descriptor_is_found_anew(taken: Taken) -> None:
    os.pwrite(taken.memfd, b"data", PAGE * 4096)
    found = found_anew(replace(taken.block, file_path="/proc/self/fd/999999"), taken.identity)
    assert found.file_path is not None
    assert found.file_path.startswith(f"/proc/{os.getpid()}/fd/")
    assert note_arrived(taken.ledger, [found], taken.identity) == 1


def test_process_that_has_ended_is_no_reason_to_fail_here(taken: Taken) -> None:
    """Whoever serves finds that out."""
    taken.identity.pid = 2**22 + 1
    assert note_arrived(taken.ledger, [taken.block], taken.identity) == 0
