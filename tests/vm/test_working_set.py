"""A second restore of an image asks for next to nothing: what the first one wanted is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, goes_on_from, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


def test_what_the_first_guest_wanted_is_there_before_the_second_asks(
    qemu_binary: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu_binary)
    sets = run_dir / "cache" / "working-sets"
    early = {}
    for name in ("first", "second", "without"):
        options = ["--no-working-set"] if name == "without" else []
        guest = lab.restore(snapshot, *options, name=name)
        goes_on_from(guest, snapshot)
        guest.wait_sidecar_gone()
        early[name] = guest.status()["statistics"]
        guest.console.wait_passes(2)
        guest.kill()
        wait_until(lambda: len(list(sets.iterdir())) == 1, "the working set is kept")
    assert early["first"]["pages_prefetched"] == 0
    assert early["second"]["pages_prefetched"] > 20
    assert early["without"]["pages_prefetched"] == 0


def test_a_restore_that_leaves_the_guest_paused_notes_nothing(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    """Loading the device state alone is not what a guest wants first."""
    guest = lab.restore(snapshots.checker(lab, guest_image, qemu), "--paused")
    guest.wait_sidecar_gone()
    assert guest.status()["state"] == "detached"
    assert not (run_dir / "cache").exists()


def test_a_guest_that_is_filled_on_demand_only_gets_nothing_ahead(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    first = lab.restore(snapshot, name="first")
    first.wait_sidecar_gone()
    first.kill()
    guest = lab.restore(snapshot, "--no-background", name="second")
    guest.console.wait_passes(1)
    assert guest.status()["statistics"]["pages_prefetched"] == 0
