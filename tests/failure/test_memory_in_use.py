"""Memory that somebody else has, or that cannot be paged: named, and nobody comes to harm."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from kvm.conftest import memory_file, micro_cache, micro_guest, start
from kvm.memory import FILE, MEMFD, ONE, Start, backend
from kvm.micro import RESTORE, save, wait_whole_passes
from vm.guests import Lab, cli, refused, take_snapshot

__all__ = ["memory_file", "micro_cache", "micro_guest", "start"]

pytestmark = pytest.mark.needs("uffd", "ptrace", "cc", "root")

NOT_ATTACHED = 6


def test_no_second_guest_is_started_on_the_memory_file_of_a_lazy_one(
    qemu_binary: Path, lab: Lab, run_dir: Path, start: Start, memory_file: Path
) -> None:
    """Its QEMU would lock, and so fill, what is missing there."""
    case = (*ONE, *backend(FILE, "share=on", "mem-path=@", "prealloc=on"))
    case += ("-overcommit", "mem-lock=on")
    snapshot = save(start(qemu_binary, case), run_dir / "image", qemu_binary)
    guest = lab.restore(snapshot, *RESTORE, "--paused")
    before = memory_file.stat().st_blocks
    refused(
        *("restore", "--name", "b", snapshot.image),
        status=NOT_ATTACHED,
        words=[str(memory_file), f"PID {guest.pid}", "another file", "--"],
    )
    assert memory_file.stat().st_blocks == before
    guest.ask("cont")
    wait_whole_passes(guest, 1)
    # With memory of its own there may be a second one.
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    assert guest.run_state() == "running"


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    """A directory on a disk, where /tmp may be a tmpfs (/var/tmp outlives a reboot: hier(7))."""
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="qpc-") as name:
        yield Path(name)


def test_guest_in_a_file_on_a_disk_is_saved_and_goes_on_in_other_memory(
    qemu: Path, lab: Lab, run_dir: Path, disk_dir: Path, start: Start
) -> None:
    """Its own command line is refused, whether it still runs or not; its memory file is not
    written to."""
    ram = disk_dir / "ram"
    case = (*ONE, *backend(FILE, "share=on", f"mem-path={ram}"))
    guest = start(qemu, case)
    snapshot = take_snapshot(guest, run_dir / "image", qemu, "file", "--then", "run")
    restore = ("restore", "--name", "r", snapshot.image)
    refused(*restore, status=NOT_ATTACHED, words=[str(ram), f"PID {guest.pid}"])
    wait_whole_passes(guest, 1)
    guest.kill()

    before = ram.read_bytes()
    refused(*restore, status=NOT_ATTACHED, words=[str(ram), "only memory on tmpfs", "eagerly"])
    assert ram.read_bytes() == before

    memory = (*ONE, *backend(MEMFD, "share=on"))
    waiting = start(qemu, memory, waiting=True)
    attached = lab.attach(waiting, snapshot.image)
    attached.wait_sidecar_gone()
    wait_whole_passes(attached, 1)
