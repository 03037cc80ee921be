"""Sidecars are killed at random moments, those of their take-over included; KVM runs the guest.

Whatever the moment, the next one goes on from what was left, and the guest, which verifies its
memory all the while, finds no bad word and never hangs.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from kvm.micro import KVM, boot, passes, save, wait_whole_passes
from vm.guests import Guest, Lab, Snapshot, cli, send, status_of, wait_until
from vm.kills import SEED, SOAK_KILLS, kill_one_that_takes_over, report, take_over

from qemu_postcopy.images.micro_guest import MicroGuest

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "kvm", "cc")

KILLS = 20
#: A take-over needs some 0.1 s from its command to serving, so half of the kills meet it.
LONGEST_LIFE_SECONDS = 0.2
#: The guest meets fewer missing pages from life to life.
KILLS_OF_A_GUEST = 10
SLOWLY = ("--rate", "64K", "--chunk", "4K")


def end_sidecar(guest: Guest) -> None:
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    guest.sidecar.close()
    guest.sidecar = None


def kill_again_and_again(
    lab: Lab, snapshot: Snapshot, kills: int, chance: random.Random
) -> list[float]:
    """Returns how long the take-overs took that were let live until the guest had run on."""
    took: list[float] = []
    done = number = 0
    while done < kills:
        guest = lab.restore(snapshot, *SLOWLY, name=f"g{number}")
        number += 1
        here = 0
        while done < kills and here < KILLS_OF_A_GUEST:
            if guest.sidecar is not None:
                time.sleep(chance.uniform(0, LONGEST_LIFE_SECONDS))
                end_sidecar(guest)
            else:
                kill_one_that_takes_over(guest, chance.uniform(0, LONGEST_LIFE_SECONDS))
            done += 1
            here += 1
            if here % 3 == 0:
                before = len(guest.console.path.read_bytes())
                took.append(take_over(guest))
                wait_until(
                    lambda: len(guest.console.path.read_bytes()) > before,  # noqa: B023
                    "the guest runs on",
                )
                passes(guest)
        if guest.sidecar is None:
            took.append(take_over(guest))
        assert status_of(guest.name)["state"] == "running"
        cli("fill", guest.name)
        guest.wait_sidecar_gone()
        wait_whole_passes(guest, 2)
        guest.kill()
    return took


@pytest.fixture
def snapshot(lab: Lab, micro_guest: MicroGuest, qemu_binary: Path, run_dir: Path) -> Snapshot:
    return save(boot(lab, micro_guest, qemu_binary, KVM), run_dir / "image", qemu_binary)


def test_kills_at_random_moments_cost_no_word_under_kvm(lab: Lab, snapshot: Snapshot) -> None:
    report(kill_again_and_again(lab, snapshot, KILLS, random.Random(SEED)), KILLS)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_kills_cost_no_word_under_kvm(lab: Lab, snapshot: Snapshot) -> None:
    report(kill_again_and_again(lab, snapshot, SOAK_KILLS, random.Random(SEED)), SOAK_KILLS)
