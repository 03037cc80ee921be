"""Promise: page data may fail as it likes; a real guest waits, goes on, and has no bad word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from vm.guests import Guest, Lab, SharedSnapshots, cli, goes_on_from, refused, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [
    pytest.mark.needs("uffd", "ptrace", "guest", "qemu"),
    pytest.mark.timeout(600),
]

SCHEDULE = """
seed = {seed}
burst = [1, 3]
[fail]
probability = {probability}
errors = ["EIO", "ETIMEDOUT", "ENOMEM"]
[truncate]
probability = {probability}
[delay]
probability = 0.05
us = [10, 2000]
[stall]
probability = 0.005
ms = [1, 50]
"""


def schedule(run_dir: Path, seed: int = 1, probability: float = 0.1) -> Path:
    path = run_dir / f"chaos{seed}.toml"
    path.write_text(SCHEDULE.format(seed=seed, probability=probability))
    return path


def injected(guest: Guest) -> int:
    """Reads that were failed or cut short so far."""
    chaos: dict[str, Any] = guest.status()["chaos"]
    failed: int = chaos["failed"] + chaos["truncated"]
    return failed


def test_a_guest_under_chaos_goes_on_with_its_memory_intact(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    options = ("--no-background", "--chunk", "16K", "--chaos", schedule(run_dir, probability=0.04))
    guest = lab.restore(snapshot, *options)
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(1)
    assert injected(guest) > 0
    assert "chaos" in cli("status", guest.name).stdout
    cli("chaos", guest.name, "--off")
    before = injected(guest)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    wait_until(lambda: guest.status()["state"] == "detached", "the end is on record")
    guest.console.wait_passes(1)
    print(f"{before} failed reads")


def test_a_bad_schedule_is_refused_before_anything_is_started(run_dir: Path) -> None:
    path = run_dir / "chaos.json"
    path.write_text(json.dumps({"fail": {"probability": 2}}))
    refused("restore", "--chaos", path, run_dir, status=2, words=["fail.probability", "chaos.json"])


def test_without_chaos_there_is_nothing_to_command(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    refused("chaos", guest.name, "--off", status=11, words=["--chaos"])
    assert guest.status()["chaos"] is None


@pytest.mark.soak
def test_ten_thousand_failures_make_no_bad_word(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    """A guest that verifies all of its memory, restored again and again until they are together."""
    snapshot = snapshots.checker(lab, guest_image, qemu, fill_mib=16)
    total = restores = 0
    while total < 10_000:
        background = "--background" if restores % 2 else "--no-background"
        path = schedule(run_dir, seed=restores + 1, probability=0.2)
        guest = lab.restore(snapshot, background, "--chunk", "4K", "--chaos", path, name="chaos")
        # Detached, a guest has no chaos to tell of any more; so it is asked while it is served.
        told = 0
        guest.console.wait_more_ticks(1)
        wanted = guest.console.ticks[-1].passes + 2
        while guest.console.ticks[-1].passes < wanted:
            chaos = guest.status()["chaos"]
            if chaos:
                told = chaos["failed"] + chaos["truncated"]
            guest.console.wait_more_ticks(1)
        total += told
        restores += 1
        pages = guest.console.ticks[-1].pages
        print(f"restore {restores}: {told} failures, {pages} pages verified")
        guest.kill()
    print(f"{total} failures in {restores} restores: 0 bad words")
