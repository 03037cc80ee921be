"""What the tests of the binding share: waiting for an event, and telling who still waits."""

from __future__ import annotations

import time
from pathlib import Path

from qemu_postcopy.userfaultfd import Event, PageFault, Userfaultfd

WAIT_SECONDS = 20.0
PAGE = 4096


def next_event(userfaultfd: Userfaultfd) -> Event:
    """The one event that is due; fails if none comes."""
    assert userfaultfd.wait(WAIT_SECONDS), "no event came"
    (event,) = userfaultfd.read(limit=1)
    return event


def next_fault(userfaultfd: Userfaultfd) -> PageFault:
    event = next_event(userfaultfd)
    assert isinstance(event, PageFault), event
    return event


def stands_in_fault(thread_id: int) -> bool:
    """Whether this thread of ours sleeps in handle_userfault()."""
    return Path(f"/proc/self/task/{thread_id}/wchan").read_text() == "handle_userfault"


def wait_in_fault(thread_id: int) -> None:
    """Waits until it does."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not stands_in_fault(thread_id):
        assert time.monotonic() < deadline, f"thread {thread_id} does not wait for a page"
        time.sleep(0.001)


def page_of(value: int) -> bytes:
    """4 KiB, every byte of it ``value``."""
    return bytes([value]) * PAGE


def word_of(value: int) -> int:
    """What a load of such a page gives."""
    return int.from_bytes(bytes([value]) * 8, "little")
