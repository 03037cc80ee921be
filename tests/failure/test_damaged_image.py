"""An image that is damaged: found before a guest depends on it, and QEMU goes on waiting."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from vm.guests import (
    Guest,
    Lab,
    SharedSnapshots,
    cli,
    edit_manifest,
    goes_on_from,
    refused,
    send,
    status_of,
    wait_until,
)
from vm.kills import take_over

from qemu_postcopy._native import check, lib, new_error
from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace")

#: exit status of ImageError and MismatchError
DAMAGED, MISFIT = 4, 5


def page_file(image: Path) -> Path:
    (block,) = json.loads((image / "manifest.json").read_text())["blocks"]
    return image / str(block["file"])


def flip(path: Path, offset: int) -> None:
    """Changes one byte and nothing else."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def truncate(path: Path, by_bytes: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - by_bytes)


def other_manifest(image: Path, text: str) -> None:
    (image / "manifest.json").write_text(text)


Damage = Callable[[Path], None]
DAMAGES: dict[str, tuple[Damage, int, list[str]]] = {
    "page file truncated": (
        lambda image: truncate(page_file(image), 4096),
        DAMAGED,
        ["truncated", "copy it again"],
    ),
    "page file too long": (
        lambda image: os.truncate(page_file(image), page_file(image).stat().st_size + 1),
        DAMAGED,
        ["too long", "copy it again"],
    ),
    "page file missing": (
        lambda image: page_file(image).unlink(),
        DAMAGED,
        ["No such file", "copy it again"],
    ),
    "state altered": (
        lambda image: flip(image / "state.bin", 1000),
        DAMAGED,
        ["state.bin", "altered", "snapshot"],
    ),
    "state truncated": (
        lambda image: truncate(image / "state.bin", 1),
        DAMAGED,
        ["state.bin", "truncated", "snapshot"],
    ),
    "manifest truncated": (
        lambda image: truncate(image / "manifest.json", 100),
        DAMAGED,
        ["manifest"],
    ),
    "manifest missing": (
        lambda image: (image / "manifest.json").unlink(),
        DAMAGED,
        ["manifest.json"],
    ),
    "no JSON": (lambda image: other_manifest(image, "#!/bin/sh\n"), DAMAGED, ["manifest"]),
    "path out of the image": (
        lambda image: other_manifest(
            image, (image / "manifest.json").read_text().replace("ram/", "../")
        ),
        DAMAGED,
        ["manifest"],
    ),
    "other architecture": (
        lambda image: edit_manifest(image, architecture="aarch64"),
        MISFIT,
        ["aarch64", "x86_64", "qemu-system-aarch64"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_waiting_qemu_can_be_used_all_the_same(
    name: str, qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    damage, status, words = DAMAGES[name]
    good = snapshots.bare(lab, qemu)
    bad = good.copy(run_dir / "bad")
    damage(bad.image)
    waiting = lab.waiting(good)
    refused("attach", "--name", "a", waiting.qmp_path, bad.image, status=status, words=words)
    check_untouched(waiting)
    attached = lab.attach(waiting, good.image, "--wait", "complete")
    assert attached.run_state() == "running"


@pytest.mark.parametrize("name", ["page file truncated", "state altered", "other architecture"])
def test_damage_is_named_before_or_with_the_end_of_our_own_qemu(
    name: str, qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    """A QEMU that was launched for the restore is gone, and its name can be used again."""
    damage, status, words = DAMAGES[name]
    good = snapshots.bare(lab, qemu)
    bad = good.copy(run_dir / "bad")
    damage(bad.image)
    refused("restore", "--name", "r", bad.image, status=status, words=words)
    restored = lab.restore(good, "--wait", "complete", name="r")
    assert restored.run_state() == "running"


@pytest.mark.needs("guest")
def test_data_that_was_lost_is_missed_though_the_file_is_as_long_as_ever(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    """As after a copy that was interrupted, or when a hole was punched; at a take-over as well."""
    good = snapshots.checker(lab, guest_image, qemu)
    bad = good.copy(run_dir / "bad")
    guest = lab.restore(bad, "--no-background", "--chunk", "4K")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    with page_file(bad.image).open("r+b") as file:
        error = new_error()
        begin = os.lseek(file.fileno(), 4 << 20, os.SEEK_DATA)
        lost = os.pread(file.fileno(), 8 << 20, begin)
        check(lib.qpc_page_file_punch(file.fileno(), begin, len(lost), error), error)
        words = ["lost data", "m0", "copy it again"]
        refused("restore", "--name", "other", bad.image, status=DAMAGED, words=words)
        refused("recover", guest.name, status=DAMAGED, words=words)
        assert guest.registered_ranges() > 0, "it waits"
        os.pwrite(file.fileno(), lost, begin)
    take_over(guest)
    goes_on_from(guest, bad)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()


def test_altered_page_is_found_by_verify(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    good = snapshots.bare(lab, qemu)
    bad = good.copy(run_dir / "bad")
    flip(page_file(bad.image), 8 << 20)
    words = ["altered", "m0", "copy it again"]
    refused("image", "verify", bad.image, status=DAMAGED, words=words)
    waiting = lab.waiting(good)
    refused("attach", "--verify", waiting.qmp_path, bad.image, status=DAMAGED, words=words)
    check_untouched(waiting)
    cli("image", "verify", good.image)
    attached = lab.attach(waiting, good.image, "--verify", "--wait", "complete")
    assert status_of(attached.name)["state"] == "detached"


def test_directory_that_is_no_image_is_said_to_be_none(run_dir: Path) -> None:
    refused("restore", run_dir, status=DAMAGED, words=["manifest.json"])
    refused("restore", run_dir / "nothing", status=DAMAGED, words=["no image"])


def test_lazy_state_given_to_a_stock_qemu_by_hand_fails_loudly(
    qemu_binary: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    """Restored without a sidecar the guest would run on memory of zeros."""
    snapshot = snapshots.bare(lab, qemu_binary)
    waiting = lab.waiting(snapshot)
    waiting.ask("migrate-incoming", uri=f"exec:cat {snapshot.image / 'state.bin'}")
    assert waiting.process is not None
    process = waiting.process
    wait_until(lambda: "not a migration stream" in process.output().lower(), "QEMU refuses it")
    wait_until(lambda: process.poll() is not None, "QEMU has ended")
    assert process.poll() != 0


def check_untouched(waiting: Guest) -> None:
    """It answers, waits as before, and none of its memory is ours."""
    assert waiting.run_state() == "inmigrate"
    assert waiting.registered_ranges() == 0
