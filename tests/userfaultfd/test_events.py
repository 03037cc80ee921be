"""Every event of a watched process, and what waits for it to be read."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from userfaultfd.faulting import PAGE, WAIT_SECONDS, next_event, next_fault, page_of, word_of

from qemu_postcopy.errors import Outcome, UserfaultfdError
from qemu_postcopy.region import Region
from qemu_postcopy.userfaultfd import (
    Feature,
    Fork,
    PageFault,
    Remap,
    Remove,
    UnknownEvent,
    Unmap,
    Userfaultfd,
)

pytestmark = pytest.mark.needs("uffd", "root")

Background = Callable[..., Future[Any]]


def test_removed_memory_is_told_and_faults_to_the_owner_again(background: Background) -> None:
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open(Feature.EVENT_REMOVE) as ours:
        ours.register(memory.address, memory.length)
        ours.copy(memory.address, page_of(1) * 2)
        removing = background(memory.advise, mmap.MADV_DONTNEED, 0, PAGE)
        assert next_event(ours) == Remove(memory.address, memory.at(PAGE))
        removing.result(WAIT_SECONDS)
        touched = background(memory.load, 0)
        assert next_fault(ours).address == memory.address
        ours.copy(memory.address, page_of(2))
        assert touched.result(WAIT_SECONDS) == word_of(2)
        assert memory.load(PAGE) == word_of(1)


def test_removed_shared_memory_faults_to_the_owner_again(background: Background) -> None:
    with Region.memfd(PAGE) as memory, Userfaultfd.open(Feature.EVENT_REMOVE) as ours:
        ours.register(memory.address, PAGE)
        ours.copy(memory.address, page_of(1))
        removing = background(memory.advise, mmap.MADV_REMOVE)
        assert next_event(ours) == Remove(memory.address, memory.address + PAGE)
        removing.result(WAIT_SECONDS)
        touched = background(memory.load, 0)
        next_fault(ours)
        ours.copy(memory.address, page_of(2))
        assert touched.result(WAIT_SECONDS) == word_of(2)


def test_an_answer_waits_until_the_event_before_it_is_read(background: Background) -> None:
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open(Feature.EVENT_REMOVE) as ours:
        ours.register(memory.address, memory.length)
        removing = background(memory.advise, mmap.MADV_DONTNEED, 0, PAGE)
        assert ours.wait(WAIT_SECONDS)
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.at(PAGE), page_of(1))
        assert (caught.value.outcome, caught.value.retryable) == (Outcome.EVENT_WAITS, True)
        assert not removing.done()
        next_event(ours)
        removing.result(WAIT_SECONDS)
        assert ours.copy(memory.at(PAGE), page_of(1)) == PAGE


def test_unmapped_memory_is_told(background: Background) -> None:
    with Region.anonymous(2 * PAGE) as memory, Userfaultfd.open(Feature.EVENT_UNMAP) as ours:
        ours.register(memory.address, memory.length)
        unmapping = background(memory.unmap, PAGE, PAGE)
        assert next_event(ours) == Unmap(memory.at(PAGE), memory.address + 2 * PAGE)
        unmapping.result(WAIT_SECONDS)
        with pytest.raises(UserfaultfdError) as caught:
            ours.copy(memory.at(PAGE), page_of(1))
        assert caught.value.outcome is Outcome.NOT_REGISTERED


def test_moved_memory_is_told_and_still_watched(background: Background) -> None:
    with (
        Region.anonymous(PAGE) as place,
        Region.anonymous(PAGE) as memory,
        Userfaultfd.open(Feature.EVENT_REMAP) as ours,
    ):
        ours.register(memory.address, PAGE)
        moving = background(memory.remap_onto, place)
        assert next_event(ours) == Remap(memory.address, place.address, PAGE)
        moving.result(WAIT_SECONDS)
        touched = background(place.load, 0)
        assert next_fault(ours).address == place.address
        ours.copy(place.address, page_of(4))
        assert touched.result(WAIT_SECONDS) == word_of(4)


def test_memory_of_a_child_is_paged_by_the_descriptor_that_fork_brings(
    background: Background,
) -> None:
    with Region.anonymous(PAGE) as memory, Userfaultfd.open(Feature.EVENT_FORK) as ours:
        ours.register(memory.address, PAGE)
        forking = background(memory.load_in_child, 0)
        event = next_event(ours)
        assert isinstance(event, Fork)
        with event.child as childs:
            child = forking.result(WAIT_SECONDS)
            assert next_fault(childs).address == memory.address
            childs.copy(memory.address, page_of(42))
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 42
        # Ours is still missing: the child's page was the child's.
        touched = background(memory.load, 0)
        next_fault(ours)
        ours.copy(memory.address, page_of(1))
        assert touched.result(WAIT_SECONDS) == word_of(1)


def test_an_event_to_come_is_kept_as_it_is() -> None:
    with Userfaultfd.open() as ours:
        message = bytes([0x7F]) + bytes(7) + bytes(range(24))
        assert ours._event(message) == UnknownEvent(0x7F, bytes(range(24)))


def test_a_task_answers_faults_while_the_loop_goes_on(background: Background) -> None:
    pages = 8

    async def answer(ours: Userfaultfd, memory: Region) -> list[int]:
        loads: list[asyncio.Future[int]] = [
            asyncio.wrap_future(background(memory.load, i * PAGE)) for i in range(pages)
        ]
        left = pages
        async for event in ours.events():
            assert isinstance(event, PageFault)
            page = (event.address - memory.address) // PAGE
            ours.copy(event.address, page_of(page + 1))
            left -= 1
            if not left:
                break
        async with asyncio.timeout(WAIT_SECONDS):
            return await asyncio.gather(*loads)

    async def limited(ours: Userfaultfd, memory: Region) -> list[int]:
        async with asyncio.timeout(WAIT_SECONDS):
            return await answer(ours, memory)

    with Region.anonymous(pages * PAGE) as memory, Userfaultfd.open() as ours:
        ours.register(memory.address, memory.length)
        words = asyncio.run(limited(ours, memory))
    assert words == [word_of(page + 1) for page in range(pages)]
