"""Promises S3, S13, S14: who is woken, who is not, and what happens without an answer."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from userfaultfd.faulting import (
    PAGE,
    WAIT_SECONDS,
    next_fault,
    page_of,
    stands_in_fault,
    wait_in_fault,
    word_of,
)

from qemu_postcopy.errors import HostError, Outcome, UserfaultfdError
from qemu_postcopy.region import HUGE_BYTES, Region
from qemu_postcopy.userfaultfd import FaultFlag, Feature, Userfaultfd

pytestmark = pytest.mark.needs("uffd", "root")

Background = Callable[..., Future[Any]]

#: What a child process does before it touches the memory.
CHILD = """
from qemu_postcopy.region import Region
from qemu_postcopy.userfaultfd import Feature, Userfaultfd
memory = Region.anonymous(8192)
ours = Userfaultfd.open({features})
ours.register(memory.address, memory.length)
{answer}
print(memory.load(4096), flush=True)
memory.load(0)
print("not killed", flush=True)
"""


def run_child(features: str, answer: str) -> subprocess.CompletedProcess[str]:
    program = CHILD.format(features=features, answer=answer)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_without_a_handler_missing_memory_is_a_sigbus() -> None:
    ended = run_child("Feature.SIGBUS", "ours.zeropage(memory.at(4096), 4096)")
    assert (ended.stdout, ended.returncode) == ("0\n", -signal.SIGBUS), ended.stderr


def test_poisoned_memory_is_a_sigbus_and_its_neighbour_is_not() -> None:
    ended = run_child(
        "Feature.POISON",
        "ours.poison(memory.at(0), 4096); ours.zeropage(memory.at(4096), 4096)",
    )
    assert (ended.stdout, ended.returncode) == ("0\n", -signal.SIGBUS), ended.stderr


@pytest.mark.parametrize("make", [Region.anonymous, Region.memfd])
def test_poison_is_healed_by_data_and_by_zeros_in_shared_memory_only(
    make: Callable[[int], Region],
) -> None:
    with make(2 * PAGE) as memory, Userfaultfd.open(Feature.POISON) as ours:
        ours.register(memory.address, memory.length)
        ours.poison(memory.address, memory.length)
        ours.copy(memory.address, page_of(4))
        assert memory.load(0) == word_of(4)
        if make == Region.memfd:
            ours.zeropage(memory.at(PAGE), PAGE)
            assert memory.load(PAGE) == 0
        else:
            with pytest.raises(UserfaultfdError) as caught:
                ours.zeropage(memory.at(PAGE), PAGE)
            assert caught.value.outcome is Outcome.PRESENT


def test_without_a_handler_a_system_call_gets_an_error() -> None:
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open(Feature.SIGBUS) as ours:
        ours.register(memory.address, memory.length)
        ours.copy(memory.at(PAGE), page_of(4))
        assert memory.read_by_kernel(PAGE, PAGE) == page_of(4)
        with pytest.raises(HostError) as caught:
            memory.read_by_kernel(0, PAGE)
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == errno.EFAULT
        assert ours.read() == []


def test_a_system_call_that_meets_poison_gets_an_error(background: Background) -> None:
    with (
        Region.anonymous(PAGE) as memory,
        Userfaultfd.open(Feature.POISON) as ours,
    ):
        ours.register(memory.address, PAGE)
        reading = background(memory.read_by_kernel, 0, 8)
        next_fault(ours)
        assert ours.poison(memory.address, PAGE) == PAGE
        with pytest.raises(HostError, match="Bad address"):
            reading.result(WAIT_SECONDS)
        # Poison is a mark, not a page: data that is had after all takes its place.
        assert ours.copy(memory.address, page_of(1)) == PAGE
        assert memory.load(0) == word_of(1)


def test_a_user_mode_only_descriptor_fails_faults_of_system_calls(background: Background) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(user_mode_only=True) as ours:
        ours.register(memory.address, PAGE)
        with pytest.raises(HostError, match="Bad address"):
            memory.read_by_kernel(0, 8)
        touched = background(memory.load, 0)
        next_fault(ours)
        ours.copy(memory.address, page_of(1))
        assert touched.result(WAIT_SECONDS) == word_of(1)


def test_an_answer_without_wake_leaves_who_waits_waiting_until_the_wake(
    background: Background,
) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(Feature.THREAD_ID) as ours:
        ours.register(memory.address, PAGE)
        touched = background(memory.load, 0)
        thread_id = next_fault(ours).thread_id
        assert thread_id is not None
        wait_in_fault(thread_id)
        ours.copy(memory.address, page_of(1), wake=False)
        assert stands_in_fault(thread_id)
        assert not touched.done()
        assert memory.load(0) == word_of(1)  # who comes later finds it
        ours.wake(memory.address, PAGE)
        assert touched.result(WAIT_SECONDS) == word_of(1)


def test_a_wake_reaches_its_range_only(background: Background) -> None:
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open(Feature.THREAD_ID) as ours:
        ours.register(memory.address, memory.length)
        first = background(memory.load, 0)
        first_fault = next_fault(ours)
        second = background(memory.load, PAGE)
        second_fault = next_fault(ours)
        assert first_fault.thread_id is not None
        assert second_fault.thread_id is not None
        wait_in_fault(second_fault.thread_id)
        ours.copy(memory.address, page_of(1) + page_of(2), wake=False)
        ours.wake(memory.address, PAGE)
        assert first.result(WAIT_SECONDS) == word_of(1)
        assert stands_in_fault(second_fault.thread_id)
        assert not second.done()
        ours.wake(memory.at(PAGE), PAGE)
        assert second.result(WAIT_SECONDS) == word_of(2)


def test_a_wake_without_an_answer_makes_the_fault_come_again(background: Background) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open() as ours:
        ours.register(memory.address, PAGE)
        touched = background(memory.store, 0, 5)
        assert next_fault(ours).flags == FaultFlag.WRITE
        ours.wake(memory.address, PAGE)
        assert next_fault(ours).flags == FaultFlag.WRITE
        ours.zeropage(memory.address, PAGE)
        touched.result(WAIT_SECONDS)
        assert memory.load(0) == 5


def test_one_answer_wakes_every_thread_that_waits_for_the_page(background: Background) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(Feature.THREAD_ID) as ours:
        ours.register(memory.address, PAGE)
        waiting = [background(memory.load, 8 * number) for number in range(6)]
        threads = {next_fault(ours).thread_id for _ in waiting}
        assert len(threads) == 6
        ours.copy(memory.address, page_of(3))
        assert {call.result(WAIT_SECONDS) for call in waiting} == {word_of(3)}


def test_the_exact_address_is_told_where_it_is_asked_for(background: Background) -> None:
    for features, expected in ((Feature.NONE, 0), (Feature.EXACT_ADDRESS, 0x128)):
        with Region.anonymous(PAGE) as memory, Userfaultfd.open(features) as ours:
            ours.register(memory.address, PAGE)
            touched = background(memory.load, 0x128)
            fault = next_fault(ours)
            assert (fault.address - memory.address, fault.thread_id) == (expected, None)
            ours.zeropage(memory.address, PAGE)
            touched.result(WAIT_SECONDS)


def test_a_huge_page_is_filled_whole_or_not_at_all(
    background: Background, reserve_huge_pages: Callable[[int], None]
) -> None:
    reserve_huge_pages(HUGE_BYTES)
    with Region.hugetlb(HUGE_BYTES) as memory, Userfaultfd.open(Feature.EXACT_ADDRESS) as ours:
        ours.register(memory.address, memory.length)
        touched = background(memory.load, 3 * PAGE)
        assert next_fault(ours).address == memory.at(3 * PAGE)
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.at(3 * PAGE), page_of(1))
        assert caught.value.outcome is Outcome.INVALID
        ours.copy(memory.address, page_of(6) * (HUGE_BYTES // PAGE))
        assert touched.result(WAIT_SECONDS) == word_of(6)


def test_closing_the_last_copy_lets_waiters_go_on_with_zeros_and_a_kept_copy_prevents_it(
    background: Background,
) -> None:
    """The proposal wanted SIGBUS; the kernel gives zeros, which is why a copy stays in QEMU."""
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(Feature.THREAD_ID) as ours:
        ours.register(memory.address, PAGE)
        touched = background(memory.load, 0)
        thread_id = next_fault(ours).thread_id
        assert thread_id is not None
        wait_in_fault(thread_id)
        copy = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=[ours.fileno()],
        )
        assert copy.stdin is not None
        ours.close()
        assert stands_in_fault(thread_id)
        assert not touched.done()
        copy.stdin.close()
        copy.wait(WAIT_SECONDS)
        assert touched.result(WAIT_SECONDS) == 0
