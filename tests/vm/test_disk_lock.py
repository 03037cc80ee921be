"""A restore while the snapshotted guest still runs and holds its disk."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
from vm.disk_guest import Disk, boot, spec
from vm.guests import (
    INCOMING,
    PATIENCE,
    Guest,
    Lab,
    Snapshot,
    cli,
    ends_within,
    refused,
    send,
    status_of,
)

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.monitor import CommandError
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = pytest.mark.needs("uffd", "ptrace", "guest")


@pytest.fixture
def disk(run_dir: Path) -> Disk:
    return Disk(run_dir / "disk.raw")


@pytest.fixture
def original(lab: Lab, guest_image: GuestImage, qemu_binary: Path, disk: Disk) -> Guest:
    """It runs on after its snapshot, with its disk."""
    return boot(lab, guest_image, qemu_binary, "memfd", disk)


@pytest.fixture
def snapshot(original: Guest, qemu_binary: Path, run_dir: Path) -> Snapshot:
    image = run_dir / "image"
    result = json.loads(cli("snapshot", "--json", original.qmp_path, image).stdout)
    return Snapshot(image, qemu_binary, "memfd", result["ram_bytes"], 0)


def test_a_restore_whose_disk_another_guest_holds_is_refused_and_works_when_that_has_ended(
    qemu_binary: Path, lab: Lab, original: Guest, snapshot: Snapshot, disk: Disk
) -> None:
    refused(
        *("restore", "--name", "early", "--qemu", qemu_binary, snapshot.image),
        status=5,
        words=("lock", str(disk.path), "copy of the disk"),
    )
    users = subprocess.run(["pgrep", "-f", str(disk.path)], capture_output=True, text=True)
    assert users.stdout.split() == [str(original.pid)], "only the first QEMU is left"
    original.console.wait_more_ticks(3)

    original.kill()
    lab.restore(snapshot, name="late").console.wait_more_ticks(3)


def test_a_paused_guest_and_a_qemu_of_somebody_elses_are_served_until_the_disk_is_free(
    qemu_binary: Path,
    lab: Lab,
    guest_image: GuestImage,
    original: Guest,
    snapshot: Snapshot,
    disk: Disk,
) -> None:
    """The state is loaded, so neither is ended; whoever takes over says the same again."""
    paused = lab.restore(snapshot, "--paused", "--no-background")
    with pytest.raises(CommandError, match="lock"):
        paused.ask("cont")
    assert paused.run_state() == "paused"

    waiting = lab.launch(spec(lab, guest_image, qemu_binary, "memfd", disk, *INCOMING))
    refused(
        *("attach", "--name", "a", "--no-background", waiting.qmp_path, snapshot.image),
        status=5,
        words=("lock", "served", str(waiting.qmp_path)),
    )
    said = status_of("a")
    assert said["state"] == "loaded"
    assert "cont" in said["trouble"]
    run = RunDirectory.find("a")
    record = run.read_record()
    assert record is not None
    with ProcessIdentity.open(record.sidecar_pid) as killed:
        send(killed, signal.SIGKILL)
        assert ends_within(killed, PATIENCE)
    refused("recover", "a", status=5, words=("lock", "served"))
    assert "cont" in status_of("a")["trouble"]
    record = run.read_record()
    assert record is not None
    sidecar = ProcessIdentity.open(record.sidecar_pid)

    original.kill()
    paused.ask("cont")
    paused.console.wait_more_ticks(3)
    with pytest.raises(CommandError, match="lock"):
        waiting.ask("cont")
    paused.kill()
    waiting.ask("cont")
    waiting.console.wait_more_ticks(3)
    cli("fill", "a")
    assert ends_within(sidecar, PATIENCE), "it has all of its memory"
    sidecar.close()
    assert status_of("a")["state"] == "detached"
    waiting.console.wait_more_ticks(3)
