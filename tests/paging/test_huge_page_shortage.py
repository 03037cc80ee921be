"""Promise: who wants a huge page that the guest gave back, and that cannot be had again, waits."""

from __future__ import annotations

import errno
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paging.served_guest import MIB, ServedGuest

pytestmark = pytest.mark.needs("uffd", "cc", "hugetlb", "root")

PAGES = 9
HUGE_PAGE_BYTES = 2 * MIB
#: Of the three pages that the guest gives back one can be had.
ROOM_PAGES = PAGES + 1
#: As often as it is tried while one waits, and far less than without a pause.
WAKES_MAX = 200


@pytest.fixture
def pool(run_dir: Path, reserve_huge_pages: Callable[[int], None]) -> Iterator[Path]:
    """A few huge pages that nobody else can take."""
    reserve_huge_pages(ROOM_PAGES * HUGE_PAGE_BYTES)
    folder = run_dir / "huge"
    folder.mkdir()
    room = ROOM_PAGES * HUGE_PAGE_BYTES
    options = f"pagesize=2M,size={room},min_size={room}"
    subprocess.run(["mount", "-t", "hugetlbfs", "-o", options, "none", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def no_hole(page: int) -> bool:
    return False


def test_a_thread_that_touches_removed_memory_waits_for_a_huge_page(
    serve: Callable[..., ServedGuest], pool: Path
) -> None:
    guest = serve(memory=str(pool / "ram"), pages=PAGES, holes=no_hole)
    guest.check_content()
    guest.mapper.do("remove", 2, 3)
    other = pool / "other"
    subprocess.run(["fallocate", "-l", str(4 * HUGE_PAGE_BYTES), other], check=True)
    readers = [guest.mapper.send("read", page) for page in (2, 2, 3)]
    guest.wait(lambda s: s.failing > 0 and s.last_error == errno.ENOMEM, "it is told")
    before = guest.statistics.wakes
    time.sleep(0.3)  # a loop without a pause would have gone round thousands of times
    statistics = guest.statistics
    assert statistics.failing > 0
    assert statistics.wakes - before < WAKES_MAX
    assert all(guest.mapper.is_waiting(reader) for reader in readers)
    assert guest.mapper.first_word(5) == guest.image.expected[5][:8], "others are served"

    other.unlink()
    assert [guest.mapper.result(reader) for reader in readers] == [0, 0, 0]
    guest.wait(lambda s: s.failing == 0 and s.faults_waiting == 0, "all is well again")
    guest.check_content(zero_pages=range(2, 5))


def test_threads_that_want_one_removed_page_at_once_get_it(
    serve: Callable[..., ServedGuest], pool: Path
) -> None:
    """The second message for a page that is there is no want of memory."""
    guest = serve(memory=str(pool / "ram"), pages=PAGES, holes=no_hole, start=False)
    guest.pager.start()
    guest.check_content()
    for _ in range(20):
        guest.mapper.do("remove", 2, 1)
        guest.pager.stop()
        readers = [guest.mapper.send("read", 2) for _ in range(8)]
        guest.mapper.wait_blocked(8)
        guest.pager.start()
        assert [guest.mapper.result(reader) for reader in readers] == [0] * 8
        # A message that is still to be answered would fill the page when it was removed again.
        guest.wait_asleep()
        guest.wait(lambda s: s.faults_waiting == 0, "nobody waits")
    assert guest.statistics.fill_errors == 0
