"""A run directory that somebody removes while its guest is served costs the guest nothing.

No sidecar could take over any more, so the one that serves fills the rest and detaches.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, Snapshot, cli, goes_on_from, refused, status_of

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]

ON_DEMAND = ("--no-background", "--chunk", "4K")


@pytest.fixture
def snapshot(qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage) -> Snapshot:
    return snapshots.checker(lab, guest_image, qemu)


def test_ledger_that_is_removed_has_the_rest_filled_too(lab: Lab, snapshot: Snapshot) -> None:
    guest = lab.restore(snapshot, *ON_DEMAND)
    (guest.directory / "ledger").unlink()
    guest.wait_sidecar_gone()
    assert status_of(guest.name)["state"] == "detached"
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(1)


def test_guest_is_filled_and_left_when_its_directory_is_removed(
    lab: Lab, snapshot: Snapshot, run_dir: Path
) -> None:
    """And its sidecar leaves the directory of the next guest of that name alone."""
    first = lab.restore(snapshot, *ON_DEMAND)
    goes_on_from(first, snapshot)
    console = run_dir / "console"
    console.hardlink_to(first.console.path)  # a second name, which outlives the directory
    first.console.path = console
    shutil.rmtree(first.directory)
    refused("status", first.name, status=11, words=["no guest named"])

    second = lab.restore(snapshot, *ON_DEMAND)
    assert second.directory == first.directory
    first.wait_sidecar_gone()
    assert first.registered_ranges() == 0
    said = second.status()
    assert (said["state"], said["pid"]) == ("running", second.pid)
    cli("fill", second.name)
    second.wait_sidecar_gone()
    for guest in (first, second):
        guest.console.wait_passes(1)
