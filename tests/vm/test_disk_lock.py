"""A restore while the snapshotted guest still runs and holds its disk."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from vm.disk_guest import Disk, boot
from vm.guests import Lab, Snapshot, cli, refused

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("uffd", "ptrace", "guest")


def test_a_restore_whose_disk_another_guest_holds_is_refused_and_works_when_that_has_ended(
    qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    disk = Disk(run_dir / "disk.raw")
    original = boot(lab, guest_image, qemu_binary, "memfd", disk)
    image = run_dir / "image"
    result = json.loads(cli("snapshot", "--json", original.qmp_path, image).stdout)
    snapshot = Snapshot(image, qemu_binary, "memfd", result["ram_bytes"], 0)

    refused(
        *("restore", "--name", "early", "--qemu", qemu_binary, image),
        status=5,
        words=("lock", str(disk.path), "copy of the disk"),
    )
    users = subprocess.run(["pgrep", "-f", str(disk.path)], capture_output=True, text=True)
    assert users.stdout.split() == [str(original.pid)], "only the first QEMU is left"
    original.console.wait_more_ticks(3)

    original.kill()
    lab.restore(snapshot, name="late").console.wait_more_ticks(3)
