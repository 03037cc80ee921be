"""Promise: a new pager goes on from the ledger of one that was killed, and nobody notices."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paging.mapper_process import Mapper, wait_until
from paging.served_guest import SOURCE_OFFSET, Image, ServedGuest, is_hole

from qemu_postcopy.paging import registration
from qemu_postcopy.paging.ledger import Ledger
from qemu_postcopy.paging.pager import Pager, PagerBlock, PagerState
from qemu_postcopy.paging.source import FileSource

pytestmark = pytest.mark.needs("uffd", "cc")

PAGES = 1100
PAGE_BYTES = 4096
#: struct uffd_msg of linux/userfaultfd.h: event, start, end
UFFD_MSG = struct.Struct("=B7xQQ8x")
UFFD_EVENT_REMOVE = 0x15


class KilledServer:
    """A mapper served by another process, which the test kills and takes over from."""

    def __init__(self, binary: Path, run_dir: Path, *how: str) -> None:
        self.run_dir = run_dir
        self.mapper = Mapper(binary, "memfd", PAGES)
        self.image = Image(run_dir / "ram", PAGES, PAGE_BYTES, is_hole)
        self.source_fd = os.open(self.image.path, os.O_RDONLY)
        self.source = FileSource(self.source_fd)
        self.ledger_path = run_dir / "ledger"
        (run_dir / "bitmap").write_bytes(self.image.bitmap)
        self.ledger: Ledger | None = None
        self.pager: Pager | None = None
        arguments = [
            self.mapper.userfaultfd,
            self.mapper.address,
            self.mapper.length,
            PAGE_BYTES,
            self.ledger_path,
            self.source_fd,
            SOURCE_OFFSET,
            run_dir / "bitmap",
            *how,
        ]
        script = Path(__file__).with_name("serve_until_killed.py")
        self.server = subprocess.Popen(
            [sys.executable, script, *map(str, arguments)],
            pass_fds=[self.mapper.userfaultfd, self.source_fd],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.server.stdout
        assert self.server.stdout.readline() == "serving\n"

    def kill(self) -> None:
        self.server.kill()
        self.server.wait()

    def take_over(self, background: bool) -> Pager:
        self.ledger = Ledger.open(self.ledger_path)
        block = PagerBlock(
            name="m0",
            address=self.mapper.address,
            length=self.mapper.length,
            page_size=PAGE_BYTES,
            source=self.source,
            source_offset=SOURCE_OFFSET,
            data_bitmap=self.image.bitmap,
        )
        self.pager = Pager(self.mapper.userfaultfd, [block], self.ledger, background=background)
        self.pager.start()
        # Faults that the dead one had read are not delivered again: threads must fault anew.
        registration.wake(self.mapper.userfaultfd, self.mapper.address, self.mapper.length)
        return self.pager

    def close(self) -> None:
        self.kill()
        self.mapper.close()
        if self.pager:
            self.pager.close()
        if self.ledger:
            self.ledger.close()
        self.source.close()
        os.close(self.mapper.userfaultfd)


@pytest.fixture
def killed_server(mapper_binary: Path, run_dir: Path) -> Iterator[KilledServer]:
    server = KilledServer(mapper_binary, run_dir)
    yield server
    server.close()


@pytest.mark.parametrize("background", [False, True], ids=["demand", "background"])
def test_after_the_serving_process_was_killed_the_content_is_right(
    killed_server: KilledServer, background: bool
) -> None:
    mapper, image = killed_server.mapper, killed_server.image
    path = killed_server.run_dir / "dump"
    mapper.do("dump", 0, 400, path)
    mapper.do("remove", 10, 20)  # filled before
    mapper.do("remove", 500, 20)  # never filled
    mapper.do("write", 200, 0xABCDEF)
    reader = mapper.send("dump", 520, 580, path)
    killed_server.kill()  # in the middle of serving

    pager = killed_server.take_over(background)
    mapper.result(reader)
    mapper.do("dump", 0, PAGES, path)
    content = path.read_bytes()
    expected = list(image.expected)
    for page in (*range(10, 30), *range(500, 520)):
        expected[page] = bytes(PAGE_BYTES)
    expected[200] = (0xABCDEF).to_bytes(8, "little") + expected[200][8:]
    for page in range(PAGES):
        found = content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
        assert found == expected[page], f"page {page} is wrong"
    wait_until(lambda: pager.statistics().state == PagerState.COMPLETE, "it is complete")


def test_a_fault_that_the_killed_process_had_read_is_answered(killed_server: KilledServer) -> None:
    mapper, image = killed_server.mapper, killed_server.image
    image.cut(1000)
    reader = mapper.send("read", 1000)
    mapper.wait_blocked(1)
    # Read, so the descriptor has nothing more to say.
    wait_until(lambda: not registered_faults_pending(mapper.userfaultfd), "the fault was read")
    killed_server.kill()
    image.grow_back()
    killed_server.take_over(background=False)
    assert mapper.result(reader).to_bytes(8, "little") == image.expected[1000][:8]


def test_a_removal_that_was_read_and_not_recorded_is_made_up_for(
    mapper_binary: Path, run_dir: Path
) -> None:
    # The mapper runs on from the moment of the read, so its reader may die before the next step.
    with ServedGuest(mapper_binary, run_dir, start=False, holes=lambda page: False) as guest:
        guest.pager.close()
        UFFD_MSG.pack_into(
            guest.ledger.mapping,
            guest.ledger.journal_offset + UFFD_MSG.size,
            UFFD_EVENT_REMOVE,
            guest.mapper.address + 5 * PAGE_BYTES,
            guest.mapper.address + 8 * PAGE_BYTES,
        )
        guest.pager = Pager(guest.mapper.userfaultfd, [guest.pager_block()], guest.ledger)
        assert guest.statistics.pages_removed == 3
        guest.pager.start()
        guest.check_content(zero_pages=range(5, 8))


def registered_faults_pending(userfaultfd: int) -> int:
    """Faults that nobody has read so far (/proc/self/fdinfo, fs/userfaultfd.c)."""
    text = Path(f"/proc/self/fdinfo/{userfaultfd}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("pending"))
