"""A sidecar that is stopped: its guest waits, and its operator is told what to do."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, Snapshot, cli, goes_on_from, refused, send, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


@pytest.fixture
def snapshot(qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage) -> Snapshot:
    return snapshots.checker(lab, guest_image, qemu)


def test_stopped_sidecar_is_named_and_the_guest_goes_on_with_it(
    lab: Lab, snapshot: Snapshot
) -> None:
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    goes_on_from(guest, snapshot)
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGSTOP)
    wait_until(guest.console.stands_still, "the guest meets a page that is missing")
    told = [f"(PID {guest.sidecar.pid})", "stopped", f"kill -CONT {guest.sidecar.pid}"]
    said = guest.status()
    assert said["state"] == "waiting"
    assert all(word in said["trouble"] for word in told)
    refused("recover", guest.name, status=10, words=told)
    send(guest.sidecar, signal.SIGCONT)
    guest.console.wait_passes(1)
    assert guest.status()["trouble"] == ""


def test_stopped_sidecar_that_is_killed_is_replaced_with_what_was_asked_of_it(
    lab: Lab, snapshot: Snapshot
) -> None:
    """The filling that `fill` had changed is taken over as well, and the damage of another guest's
    record keeps nobody from it."""
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    cli("fill", guest.name, "--rate", "1M")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGSTOP)
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    damaged = guest.directory.with_name("a")
    damaged.mkdir()
    (damaged / "session.json").write_text("{")
    done = cli("recover", "--all", "--json", status=11)
    assert "a: " in done.stderr and "damaged" in done.stderr
    (said,) = json.loads(done.stdout)
    guest.sidecar = ProcessIdentity.open(said["sidecar_pid"])
    wait_until(
        lambda: guest.status()["statistics"]["pages_background"], "it is filled in the background"
    )
    goes_on_from(guest, snapshot)
