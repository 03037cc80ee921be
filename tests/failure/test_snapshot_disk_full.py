"""A snapshot onto a disk that becomes full: said so, nothing left, the guest runs on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm.guests import Lab, cli, refused

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("qemu", "guest", "root", "mount"), pytest.mark.timeout(300)]

DISK_MIB = 24


@pytest.fixture
def small_disk(run_dir: Path) -> Iterator[Path]:
    """A file system of its own that is too small for the guest."""
    path = run_dir / "disk"
    path.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", str(path)]
    subprocess.run(mounting, check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("live", [False, True], ids=["stopped", "live"])
def test_full_disk_leaves_no_image_and_the_guest_running(
    live: bool,
    qemu_binary: Path,
    lab: Lab,
    guest_image: GuestImage,
    small_disk: Path,
    run_dir: Path,
) -> None:
    guest = lab.boot(guest_image, qemu_binary)
    options = ("--max-downtime", "10", "--accept-lost-writes") if live else ()
    refused("snapshot", *options, guest.qmp_path, small_disk / "vm.qpc", status=3, words=["space"])
    assert list(small_disk.iterdir()) == []
    assert guest.run_state() == "running"
    guest.console.wait_passes(1)
    cli("snapshot", guest.qmp_path, run_dir / "vm.qpc")
    guest.console.wait_passes(1)
