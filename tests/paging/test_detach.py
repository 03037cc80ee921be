"""Promise: who gives memory back while it is let go goes on: its event is read, however late."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
from paging.mapper_process import wait_until
from paging.served_guest import ServedGuest

from qemu_postcopy.paging import registration
from qemu_postcopy.session import Session, SessionOptions, State
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.layout import RamBlock

if TYPE_CHECKING:
    from qemu_postcopy.image.image import Image

Serve = Callable[..., ServedGuest]

pytestmark = pytest.mark.needs("uffd", "cc")

#: A thread of QEMU's that is not given its processor for so long, or a pager's.
LATE_SECONDS = 0.2


class Detaching(Session):
    """A complete session over a guest of this test's; what it would record is not looked at."""

    def __init__(self, guest: ServedGuest, run: RunDirectory) -> None:
        super().__init__(cast("Image", None), run, SessionOptions())
        mapper = guest.mapper
        self.pager, self._ledger, self.state = guest.pager, guest.ledger, State.COMPLETE
        self._userfaultfd = mapper.userfaultfd
        self._layout = [
            RamBlock(
                name="m0",
                backend_id="m0",
                address=mapper.address,
                size_bytes=mapper.length,
                page_size_bytes=guest.page_size,
                backing="memfd",
                shared=True,
                file_key=None,
                file_path=None,
                file_offset_bytes=0,
            )
        ]

    def _try_record(self) -> None:
        """Nothing."""


def remove_and_wait(guest: ServedGuest, first: int, count: int) -> int:
    """A thread of the mapper's that removes memory and waits until somebody reads that."""
    removal = guest.mapper.send("remove", first, count)
    descriptor = guest.mapper.userfaultfd
    wait_until(lambda: registration.events_pending(descriptor), "the removal has begun")
    return removal


@pytest.fixture
def complete(serve: Serve) -> ServedGuest:
    guest = serve(background=True)
    guest.wait_complete()
    return guest


def test_detach_waits_for_an_event_that_is_read_late(complete: ServedGuest, run_dir: Path) -> None:
    session = Detaching(complete, RunDirectory(run_dir))
    complete.pager.stop()  # as if its thread had no processor
    removal = remove_and_wait(complete, 10, 5)
    over = threading.Event()

    def run_again() -> None:
        if not over.wait(LATE_SECONDS):
            complete.pager.start()

    late = threading.Thread(target=run_again)
    late.start()
    session.detach()
    over.set()
    late.join()
    assert session.state is State.DETACHED
    complete.mapper.result(removal, seconds=5)
    complete.check_content(zero_pages=range(10, 15))


def test_detach_that_nobody_is_in_the_way_of_waits_for_nothing(
    complete: ServedGuest, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Detaching(complete, RunDirectory(run_dir))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it has waited"))
    session.detach()


def test_where_nobody_else_reads_the_event_is_read_by_whoever_lets_go(
    complete: ServedGuest,
) -> None:
    complete.pager.stop()
    removal = remove_and_wait(complete, 10, 5)
    mapper = complete.mapper
    registration.unregister(mapper.userfaultfd, mapper.address, mapper.length)
    assert mapper.is_waiting(removal)
    assert not registration.wait_events_read(mapper.userfaultfd, by_us=False, seconds=0.05)
    assert not os.get_blocking(mapper.userfaultfd)
    assert registration.wait_events_read(mapper.userfaultfd, by_us=True)
    mapper.result(removal)
