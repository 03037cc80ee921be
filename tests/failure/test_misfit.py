"""An image and a QEMU that do not fit: told apart, told what to do, and QEMU left as it was."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vm.guests import MIB, Guest, Lab, SharedSnapshots, goes_on_from, refused

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace")

#: exit status of MismatchError and StateError
MISFIT, WRONG_STATE = 5, 10


@pytest.fixture
def qemu10() -> Path:
    return Path(os.environ["QPC_QEMU10"])


def refuse_attach(waiting: Guest, image: Path, *words: str) -> None:
    """Refused with these words, and QEMU answers and waits as before."""
    refused("attach", "--name", "a", waiting.qmp_path, image, status=MISFIT, words=words)
    assert waiting.run_state() == "inmigrate"
    assert waiting.registered_ranges() == 0


def test_other_machine_type(qemu: Path, lab: Lab, snapshots: SharedSnapshots) -> None:
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot, machine="q35")
    refuse_attach(waiting, snapshot.image, "pc-i440fx", "pc-q35", "-machine pc-i440fx")


def test_other_ram_size(qemu: Path, lab: Lab, snapshots: SharedSnapshots) -> None:
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot, size_bytes=128 * MIB)
    refuse_attach(waiting, snapshot.image, "m0 64 MiB", "m0 128 MiB", "-m and memory back-ends")


def test_other_ram_size_on_the_command_line_of_a_restore(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    memory = lab.memory("memfd", 128 * MIB)
    words = ["m0 64 MiB", "m0 128 MiB"]
    command = f"{qemu} -machine pc,memory-backend=m0 -accel tcg -nodefaults -display none -m 128M"
    refused(
        *("restore", "--name", "r", snapshot.image, "--"),
        *(*command.split(), "-object", memory.option()),
        status=MISFIT,
        words=words,
    )


@pytest.mark.needs("qemu10")
def test_image_of_a_newer_qemu(
    qemu: Path, qemu10: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu10)
    waiting = lab.waiting(snapshot, binary=qemu)
    refuse_attach(waiting, snapshot.image, "7.2", "older", "10.0", "--qemu")


@pytest.mark.needs("qemu10")
def test_older_qemu_that_does_not_know_the_machine_type(
    qemu: Path, qemu10: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu10)
    refused(
        *("restore", "--name", "r", "--qemu", qemu, snapshot.image),
        status=MISFIT,
        words=["pc-i440fx-10.0", "10.0", "older", "--qemu"],
    )


@pytest.mark.needs("qemu10", "guest")
def test_image_of_an_older_qemu_needs_consent_and_is_then_intact(
    qemu: Path,
    qemu10: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    refused(
        *("restore", "--name", "r", "--qemu", qemu10, snapshot.image),
        status=MISFIT,
        words=["10.0", "newer", "7.2", "--allow-newer-qemu"],
    )
    guest = lab.restore(snapshot, "--qemu", qemu10, "--allow-newer-qemu")
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)


@pytest.mark.needs("guest")
def test_running_guest_is_not_attached_to_and_runs_on(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    guest = lab.boot(guest_image, qemu)
    refused(
        *("attach", "--name", "a", guest.qmp_path, snapshot.image),
        status=WRONG_STATE,
        words=["running", "inmigrate", "-incoming defer"],
    )
    assert guest.run_state() == "running"
    assert guest.registered_ranges() == 0
    guest.console.wait_passes(2)


def test_devices_of_another_machine_end_our_qemu_with_its_words(
    qemu_binary: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    """The image has a device that the command line lacks."""
    snapshot = snapshots.bare(lab, qemu_binary, "-device", "virtio-rng-pci,id=extra")
    memory = lab.memory("memfd", snapshot.ram_bytes)
    command = f"{qemu_binary} -machine pc,memory-backend=m0 -accel tcg -nodefaults -display none"
    refused(
        *("restore", "--name", "r", snapshot.image, "--"),
        *(*command.split(), "-m", "64M", "-object", memory.option()),
        status=MISFIT,
        words=["device state", "Unknown savevm section", "devices on its command line"],
    )
    # The name is free again, and with the right devices the image is good.
    assert lab.restore(snapshot, "--wait", "complete", name="r").run_state() == "running"


def test_devices_of_another_machine_end_a_foreign_qemu_loudly(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu, "-device", "virtio-rng-pci,id=extra")
    waiting = lab.waiting(snapshot)
    refused(
        *("attach", "--name", "a", waiting.qmp_path, snapshot.image),
        status=MISFIT,
        words=["device state", "devices on its command line"],
    )
    assert waiting.process is not None
    assert "virtio-rng" in waiting.process.output()
    assert lab.attach(lab.waiting(snapshot, "-device", "virtio-rng-pci,id=extra"), snapshot.image)
