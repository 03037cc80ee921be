"""Many native threads fault in one range at once: nothing is lost, nothing is made up."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from userfaultfd.faulting import PAGE, WAIT_SECONDS

from qemu_postcopy.errors import Outcome, UserfaultfdError
from qemu_postcopy.region import Region, Touch, Touchers
from qemu_postcopy.userfaultfd import PageFault, Userfaultfd

pytestmark = pytest.mark.needs("uffd", "root")

BASE = 0x5EED_0000_0000


def stress(make: Callable[[int], Region], pages: int, threads: int, seed: int) -> None:
    with make(pages * PAGE) as memory, Userfaultfd.open() as ours:
        ours.register(memory.address, memory.length)
        touchers = Touchers(memory, threads, Touch.COUNT, base=BASE, seed=seed)
        deadline = time.monotonic() + WAIT_SECONDS + pages / 100
        while not touchers.join(0):
            assert time.monotonic() < deadline, f"{touchers.touched} of {pages * threads} only"
            ours.wait(0.01)
            for event in ours.read():
                assert isinstance(event, PageFault)
                page = (event.address - memory.address) // PAGE
                data = (BASE + page).to_bytes(8, "little") + bytes(PAGE - 8)
                try:
                    ours.copy(event.address, data)
                except UserfaultfdError as error:
                    assert error.outcome is Outcome.PRESENT
                    ours.wake(event.address, PAGE)
        assert (touchers.touched, touchers.wrong) == (pages * threads, 0)
        assert all(memory.load(page * PAGE + 8) == threads for page in range(pages))


@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd])
def test_threads_that_fault_at_once_lose_no_write(make: Callable[[int], Region]) -> None:
    stress(make, pages=256, threads=4, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd])
def test_threads_that_fault_at_once_lose_no_write_for_long(
    make: Callable[[int], Region],
) -> None:
    for seed in range(20):
        stress(make, pages=4096, threads=16, seed=seed)
