"""Promise S12 (shared memory answered by mapping it), and write protection."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from userfaultfd.faulting import PAGE, WAIT_SECONDS, next_fault, page_of, word_of

from qemu_postcopy.errors import Outcome, UserfaultfdError
from qemu_postcopy.region import HUGE_BYTES, Region
from qemu_postcopy.userfaultfd import FaultFlag, Feature, Mode, Userfaultfd

pytestmark = pytest.mark.needs("uffd", "root")

Background = Callable[..., Future[Any]]


def test_a_missing_page_of_shared_memory_is_there_for_every_mapping(
    background: Background,
) -> None:
    with (
        Region.memfd(PAGE) as memory,
        memory.alias() as other,
        Userfaultfd.open(Feature.MISSING_SHMEM) as ours,
    ):
        ours.register(memory.address, PAGE)
        touched = background(memory.load, 0)
        next_fault(ours)
        ours.copy(memory.address, page_of(8))
        assert touched.result(WAIT_SECONDS) == word_of(8)
        assert other.load(0) == word_of(8)


@pytest.mark.parametrize("kind", ["memfd", "hugetlb"])
def test_a_page_that_is_in_the_page_cache_is_mapped_when_it_is_whole(
    kind: str, background: Background, reserve_huge_pages: Callable[[int], None]
) -> None:
    if kind == "hugetlb":
        reserve_huge_pages(HUGE_BYTES)
        made, feature = Region.hugetlb(HUGE_BYTES), Feature.MINOR_HUGETLBFS
    else:
        made, feature = Region.memfd(PAGE), Feature.MINOR_SHMEM
    with made as memory, memory.alias() as other, Userfaultfd.open(feature) as ours:
        other.fill(5)
        ours.register(memory.address, memory.length, Mode.MINOR)
        touched = background(memory.load, 0)
        assert FaultFlag.MINOR in next_fault(ours).flags
        other.fill(6)  # nobody sees the page half done
        assert ours.continue_(memory.address, memory.length) == memory.length
        assert touched.result(WAIT_SECONDS) == word_of(6)


def test_a_page_that_the_page_cache_lacks_cannot_be_continued() -> None:
    with Region.memfd(PAGE) as memory, Userfaultfd.open(Feature.MINOR_SHMEM) as ours:
        ours.register(memory.address, PAGE, Mode.MINOR)
        with pytest.raises(UserfaultfdError) as caught:
            ours.continue_(memory.address, PAGE)
        assert caught.value.outcome is Outcome.FAULT


@pytest.mark.parametrize("shared", [False, True])
def test_a_write_to_protected_memory_waits_and_a_read_does_not(
    shared: bool, background: Background
) -> None:
    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
    made = Region.memfd(PAGE) if shared else Region.anonymous(PAGE)
    with made as memory, Userfaultfd.open(features) as ours:
        memory.fill(1)
        ours.register(memory.address, PAGE, Mode.WP)
        ours.write_protect(memory.address, PAGE)
        assert memory.load(0) == word_of(1)
        writing = background(memory.store, 0, 2)
        fault = next_fault(ours)
        assert fault.flags == FaultFlag.WRITE | FaultFlag.WP
        assert memory.load(0) == word_of(1)
        ours.write_unprotect(memory.address, PAGE)
        writing.result(WAIT_SECONDS)
        assert memory.load(0) == 2


def test_a_page_can_be_filled_protected(background: Background) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(Feature.PAGEFAULT_FLAG_WP) as ours:
        ours.register(memory.address, PAGE, Mode.MISSING | Mode.WP)
        writing = background(memory.store, 0, 2)
        assert next_fault(ours).flags == FaultFlag.WRITE
        ours.copy(memory.address, page_of(1), write_protect=True)
        assert FaultFlag.WP in next_fault(ours).flags
        assert memory.load(0) == word_of(1)
        ours.write_unprotect(memory.address, PAGE)
        writing.result(WAIT_SECONDS)


@pytest.mark.parametrize("unpopulated", [False, True])
def test_an_empty_page_is_protected_only_with_the_feature(
    unpopulated: bool, background: Background
) -> None:
    wanted = Feature.WP_UNPOPULATED if unpopulated else Feature.NONE
    with (
        Region.anonymous(PAGE) as memory,
        Userfaultfd.open(Feature.PAGEFAULT_FLAG_WP | wanted) as ours,
    ):
        ours.register(memory.address, PAGE, Mode.WP)
        ours.write_protect(memory.address, PAGE)
        writing = background(memory.store, 0, 2)
        if unpopulated:
            assert FaultFlag.WP in next_fault(ours).flags
            ours.write_unprotect(memory.address, PAGE)
        writing.result(WAIT_SECONDS)
        assert ours.read() == []
        assert memory.load(0) == 2


def test_asynchronous_protection_stops_nobody() -> None:
    features = Feature.PAGEFAULT_FLAG_WP | Feature.WP_ASYNC | Feature.WP_UNPOPULATED
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(features) as ours:
        memory.fill(1)
        ours.register(memory.address, PAGE, Mode.WP)
        ours.write_protect(memory.address, PAGE)
        assert memory.is_write_protected(0)
        memory.store(0, 2)
        assert not memory.is_write_protected(0)
        assert ours.read() == []
