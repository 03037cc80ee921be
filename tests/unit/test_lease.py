"""A leased file is not written to before its holder lets go, and the holder is told."""

from __future__ import annotations

import errno
import fcntl
import math
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_postcopy.errors import LeaseRefusedError
from qemu_postcopy.paging import lease as lease_module
from qemu_postcopy.paging.lease import Lease, break_seconds

CONTENT = b"page data"


@pytest.fixture
def leased(tmp_path: Path) -> Iterator[tuple[Path, Lease]]:
    path = tmp_path / "saved"
    path.write_bytes(CONTENT)
    descriptor = os.open(path, os.O_RDONLY)
    lease = Lease(descriptor, str(path))
    os.close(descriptor)
    yield path, lease
    lease.release()


def told(lease: Lease, seconds: float) -> bool:
    return bool(select.select([lease], [], [], seconds)[0])


@pytest.mark.parametrize("how", ["truncating open", "open for writing", "truncate"])
def test_a_writer_waits_until_the_lease_is_given_up(leased: tuple[Path, Lease], how: str) -> None:
    path, lease = leased

    def write() -> None:
        if how == "truncating open":
            path.write_bytes(b"")
        elif how == "open for writing":
            with path.open("r+b") as file:
                file.truncate(0)
        else:
            os.truncate(path, 0)

    assert not told(lease, 0) and not lease.is_broken
    assert path.read_bytes() == CONTENT
    assert not lease.is_broken
    writer = threading.Thread(target=write)
    writer.start()
    assert told(lease, 10) and lease.is_broken
    assert path.stat().st_size == len(CONTENT) and writer.is_alive()
    lease.release()
    writer.join(10)
    assert path.stat().st_size == 0
    lease.release()


def test_a_lease_that_the_kernel_has_taken_by_force_is_released_as_well(
    leased: tuple[Path, Lease],
) -> None:
    path, lease = leased
    with pytest.raises(BlockingIOError):  # it would have to wait; that breaks the lease
        os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    assert told(lease, 10)
    fcntl.fcntl(lease._descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)  # as after its time
    with path.open("r+b"):
        assert lease.is_broken
        lease.release()


def test_the_file_may_be_removed_and_another_take_its_name(leased: tuple[Path, Lease]) -> None:
    path, lease = leased
    path.unlink()
    path.write_bytes(b"another")
    assert not lease.is_broken


def test_several_are_held_at_once_and_each_is_told_of_its_own(
    leased: tuple[Path, Lease], tmp_path: Path
) -> None:
    _, lease = leased
    other = tmp_path / "other"
    other.write_bytes(CONTENT)
    with other.open("rb") as file, Lease(file.fileno()) as second:
        with pytest.raises(BlockingIOError):
            os.open(other, os.O_WRONLY | os.O_NONBLOCK)
        assert told(second, 10)
        assert not lease.is_broken


def test_a_file_that_is_being_written_is_not_leased(tmp_path: Path) -> None:
    path = tmp_path / "saved"
    path.write_bytes(CONTENT)
    with path.open("r+b"), path.open("rb") as file, pytest.raises(LeaseRefusedError) as refused:
        Lease(file.fileno(), str(path))
    assert refused.value.errno == errno.EAGAIN and "writing" in refused.value.message
    with path.open("rb") as file:
        Lease(file.fileno()).release()


def test_the_kernel_says_how_long_it_keeps_writers_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert break_seconds() > 0
    told = tmp_path / "lease-break-time"
    monkeypatch.setattr(lease_module, "_BREAK_TIME", told)
    assert break_seconds() == 0
    for text, seconds in (("45\n", 45), ("0\n", math.inf)):
        told.write_text(text)
        assert break_seconds() == seconds
