"""The sidecar's life: no CPU when idle, small, gone when done, and no guest ever abandoned."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, cli, goes_on_from, send, status_of, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]

IDLE_SECONDS = 2.0
RESIDENT_LIMIT_MIB = 24


def cpu_ticks(pid: int) -> int:
    """User and system time so far: fields 14 and 15 of /proc/PID/stat, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s*(\d+) kB$", status, re.MULTILINE)[0])


def test_sidecar_of_a_paused_guest_uses_no_cpu(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    """While pages are missing and nobody asks for them."""
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    guest.console.wait_more_ticks(1)
    guest.ask("stop")
    assert guest.status()["statistics"]["pages_data_missing"] > 0
    assert guest.sidecar is not None
    before = cpu_ticks(guest.sidecar.pid)
    time.sleep(IDLE_SECONDS)
    used = cpu_ticks(guest.sidecar.pid) - before
    print(f"{used} clock ticks in {IDLE_SECONDS} s")
    assert used <= 1


def test_sidecar_is_small_while_it_serves(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    guest.console.wait_passes(1)
    assert guest.sidecar is not None
    bare = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert bare.stdout is not None
        bare.stdout.readline()
        bare_kib = resident_kib(bare.pid)
    finally:
        bare.kill()
        bare.communicate()
    ours_kib = resident_kib(guest.sidecar.pid)
    print(f"sidecar {ours_kib} KiB, bare interpreter {bare_kib} KiB: +{ours_kib - bare_kib} KiB")
    assert ours_kib - bare_kib <= RESIDENT_LIMIT_MIB << 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_sidecar_that_is_asked_to_end_fills_the_rest_first(
    number: signal.Signals,
    qemu: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    assert guest.sidecar is not None
    assert guest.registered_ranges() > 0
    send(guest.sidecar, number)
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)
    assert status_of(guest.name)["state"] == "detached"


def test_guest_whose_sidecar_was_killed_waits_and_is_not_given_zeros(
    qemu_binary: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu_binary)
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    wait_until(guest.console.stands_still, "the guest meets a page that is missing")
    assert guest.alive()
    assert guest.registered_ranges() > 0
    said = guest.status()
    assert said["state"] == "waiting"
    assert "its sidecar has died" in said["trouble"]
    assert "waiting" in cli("status").stdout
    assert guest.console.stands_still()


def test_sidecar_ends_with_its_guest(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    os.kill(guest.pid, signal.SIGKILL)
    guest.wait_sidecar_gone()
    assert guest.status()["state"] == "ended"


def test_rate_limit_can_be_set_and_lifted(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--paused", "--rate", "64K")
    first = guest.status()["statistics"]
    assert first["pages_data_missing"] > 0
    wait_until(
        lambda: guest.status()["statistics"]["pages_background"] > first["pages_background"],
        "the background fills, slowly",
    )
    cli("fill", guest.name, "--off")
    assert guest.status()["statistics"]["pages_data_missing"] > 0
    cli("fill", guest.name, "--rate", "1G")
    guest.wait_sidecar_gone()
    assert guest.run_state() == "paused"
    guest.ask("cont")
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(2)
