"""Promise S1: a protocol on a descriptor, ranges at any time, any number of descriptors."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from userfaultfd.faulting import PAGE, WAIT_SECONDS, next_fault, page_of, word_of

from qemu_postcopy._native import ffi
from qemu_postcopy.errors import Outcome, UsageError, UserfaultfdError
from qemu_postcopy.region import Region
from qemu_postcopy.userfaultfd import (
    Feature,
    Mode,
    Operation,
    Userfaultfd,
    Way,
    known_features,
)

pytestmark = pytest.mark.needs("uffd", "root")

Background = Callable[..., Future[Any]]


def test_names_of_features_and_operations_are_those_of_the_core() -> None:
    features = ffi.typeof("enum qpc_feature").relements
    assert {f"QPC_FEATURE_{one.name}": one.value for one in Feature} == features
    operations = ffi.typeof("enum qpc_operation").relements
    assert {f"QPC_OPERATION_{one.name}": one.bit_length() - 1 for one in Operation} == operations


@pytest.mark.parametrize("way", Way)
def test_both_ways_of_opening_give_a_descriptor_that_pages(
    way: Way, background: Background
) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(way=way) as ours:
        ours.register(memory.address, memory.length)
        touched = background(memory.load, 0)
        assert next_fault(ours).address == memory.address
        assert ours.copy(memory.address, page_of(7)) == PAGE
        assert touched.result(WAIT_SECONDS) == word_of(7)


def test_features_are_what_the_kernel_says_and_bits_to_come_are_kept() -> None:
    known = known_features()
    with Userfaultfd.open(Feature.THREAD_ID, optional=Feature(1 << 62)) as ours:
        assert ours.features == Feature.THREAD_ID
        assert Operation.REGISTER in ours.operations
        assert Operation.API in ours.operations
    assert int(Feature(1 << 62 | 1)) == 1 << 62 | 1
    with pytest.raises(UserfaultfdError) as caught:
        Userfaultfd.open(Feature(1 << 62))
    assert caught.value.outcome is Outcome.INVALID
    assert Feature.THREAD_ID in known


def test_two_descriptors_page_two_ranges_without_knowing_of_each_other(
    background: Background,
) -> None:
    with (
        Region.anonymous(PAGE) as first,
        Region.anonymous(PAGE) as second,
        Userfaultfd.open() as one,
        Userfaultfd.open() as two,
    ):
        one.register(first.address, first.length)
        two.register(second.address, second.length)
        waiting = background(first.load, 0), background(second.load, 0)
        assert next_fault(one).address == first.address
        assert next_fault(two).address == second.address
        assert (one.read(), two.read()) == ([], [])
        two.copy(second.address, page_of(2))
        one.copy(first.address, page_of(1))
        assert [call.result(WAIT_SECONDS) for call in waiting] == [word_of(1), word_of(2)]


def test_a_range_that_another_descriptor_watches_is_busy() -> None:
    with (
        Region.anonymous(PAGE) as memory,
        Userfaultfd.open() as one,
        Userfaultfd.open() as two,
    ):
        one.register(memory.address, PAGE)
        with pytest.raises(UserfaultfdError) as caught:
            two.register(memory.address, PAGE)
        assert caught.value.outcome is Outcome.BUSY
        assert caught.value.address == memory.address
        one.unregister(memory.address, PAGE)
        two.register(memory.address, PAGE)


def test_ranges_come_and_go_while_others_are_watched(background: Background) -> None:
    with Region.anonymous(4 * PAGE) as memory, Userfaultfd.open() as ours:
        with ours.register(memory.at(PAGE), 2 * PAGE) as middle:
            assert memory.load(0) == 0  # not watched
            touched = background(memory.load, PAGE)
            assert next_fault(ours).address == memory.at(PAGE)
            ours.copy(memory.at(PAGE), page_of(5))
            assert touched.result(WAIT_SECONDS) == word_of(5)
            assert middle.operations & Operation.COPY
        assert memory.load(2 * PAGE) == 0  # no more
        assert ours.read() == []


def test_unregistering_lets_go_whoever_waits(background: Background) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open() as ours:
        registration = ours.register(memory.address, PAGE)
        touched = background(memory.load, 0)
        next_fault(ours)
        registration.unregister()
        assert touched.result(WAIT_SECONDS) == 0


def test_what_a_range_allows_depends_on_its_memory(
    reserve_huge_pages: Callable[[int], None],
) -> None:
    reserve_huge_pages(2 << 20)
    with (
        Userfaultfd.open() as ours,
        Region.anonymous(PAGE) as private,
        Region.memfd(PAGE) as shared,
        Region.hugetlb(2 << 20) as huge,
    ):
        assert Operation.MOVE in ours.register(private.address, PAGE).operations
        minor = ours.register(shared.address, PAGE, Mode.MISSING | Mode.MINOR)
        assert Operation.CONTINUE in minor.operations
        assert Operation.ZEROPAGE not in ours.register(huge.address, huge.length).operations


def test_errors_carry_errno_result_and_address() -> None:
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open() as ours:
        ours.register(memory.address, memory.length)
        ours.copy(memory.at(PAGE), page_of(1))
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.at(PAGE), page_of(2))
        error = caught.value
        assert (error.errno, error.done, error.address) == (
            errno.EEXIST,
            -errno.EEXIST,
            memory.at(PAGE),
        )
        assert (error.outcome, error.retryable) == (Outcome.PRESENT, False)
        # The first page is filled before the kernel comes upon the second.
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.address, page_of(3) * 2)
        assert (caught.value.outcome, caught.value.done) == (Outcome.PARTIAL, PAGE)
        assert (memory.load(0), memory.load(PAGE)) == (word_of(3), word_of(1))
    with Region.anonymous(PAGE) as memory, Userfaultfd.open() as ours:
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.address, page_of(1))
        assert caught.value.outcome is Outcome.NOT_REGISTERED
        with pytest.raises(UserfaultfdError) as caught:
            ours.register(memory.address + 1, PAGE)
        assert caught.value.outcome is Outcome.INVALID


def test_a_blocking_descriptor_waits_in_read(background: Background) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(blocking=True) as ours:
        ours.register(memory.address, PAGE)
        reading = background(ours.read)
        touched = background(memory.load, 0)
        (fault,) = reading.result(WAIT_SECONDS)
        assert fault.address == memory.address
        ours.zeropage(memory.address, PAGE)
        assert touched.result(WAIT_SECONDS) == 0


def test_a_descriptor_that_is_given_away_stays_open() -> None:
    ours = Userfaultfd.open()
    descriptor = ours.detach()
    assert ours.closed
    ours.close()
    with pytest.raises(ValueError, match="closed"):
        ours.read()
    with Userfaultfd(descriptor, Feature.NONE, Operation.NONE) as taken:
        assert taken.read() == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_region_that_is_closed_stays_until_the_last_thread_has_touched_it(
    background: Background,
) -> None:
    memory = Region.anonymous(PAGE)
    with Userfaultfd.open() as ours:
        ours.register(memory.address, PAGE)
        touched = background(memory.load, 0)
        next_fault(ours)
        memory.close()
        ours.copy(memory.address, page_of(1))
        assert touched.result(WAIT_SECONDS) == word_of(1)
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.address, page_of(1))
        assert caught.value.outcome is Outcome.NOT_REGISTERED
    with pytest.raises(UsageError, match="closed"):
        memory.load(0)
