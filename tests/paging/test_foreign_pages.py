"""Promise: a page that another process made before it was filled is told of, and no other is."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from paging.served_guest import KIB, ServedGuest

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc", "root")

#: Data pages around a hole (page 10), within one chunk of 64 KiB.
TOUCHED = range(8, 12)


def touch(guest: ServedGuest, pages: range) -> None:
    """As a vhost-user back-end does: reads the memory file through a mapping of its own."""
    begin, end = guest.mapper.address, guest.mapper.address + guest.mapper.length
    path = Path(f"/proc/{guest.mapper.process.pid}/map_files/{begin:x}-{end:x}")
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        with mmap.mmap(descriptor, guest.mapper.length) as memory:
            for page in pages:
                _ = memory[page * guest.page_size]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("background", [False, True], ids=["around a fault", "in the background"])
def test_pages_that_another_process_made_are_counted_and_the_first_is_named(
    serve: Serve, background: bool
) -> None:
    guest = serve(start=False, holes=lambda page: page == 10, background=background)
    touch(guest, TOUCHED)  # they are zeros for everybody from now on
    guest.pager.start()
    if not background:
        guest.dump(0, 16)
    told = guest.wait(lambda s: s.pages_foreign == len(TOUCHED) - 1, "they are noticed")
    assert (told.foreign_block, told.foreign_page) == (0, TOUCHED[0])
    assert guest.notified()


@pytest.mark.parametrize("chunk_size", [4 * KIB, 64 * KIB])
def test_pages_that_were_filled_or_given_back_here_are_nobody_elses(
    serve: Serve, chunk_size: int
) -> None:
    guest = serve(chunk_size=chunk_size, holes=lambda page: page == 10)
    guest.dump(0, 32)
    touch(guest, range(32))
    guest.mapper.do("remove", 4, 3)
    touch(guest, range(4, 7))
    guest.check_content(zero_pages=range(4, 7))
    guest.pager.set_background(True)
    assert guest.wait_complete().pages_foreign == 0


def test_a_page_that_a_dead_sidecar_was_filling_is_nobody_elses(serve: Serve) -> None:
    guest = serve(holes=lambda page: False)
    guest.dump(0, 16)
    guest.pager.close()
    entry = guest.ledger.block("m0")
    guest.ledger.mapping[entry.offset + 8] = 1  # FILLING
    guest.take_over()
    guest.pager.set_background(True)
    guest.check_content()
    assert guest.wait_complete().pages_foreign == 0
