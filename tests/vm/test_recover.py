"""A sidecar may be killed at any moment: another takes over, and the guest finds no bad word."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from vm.guests import (
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    cli_command,
    goes_on_from,
    refused,
    send,
    status_of,
    wait_until,
)
from vm.kills import SEED, SOAK_KILLS, kill_one_that_takes_over, needs_none, report, take_over

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.recover import owner_of
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]

KILLS = 12
#: A take-over needs some 0.1 s from its command to serving.
LONGEST_LIFE_SECONDS = 0.15
#: At most; the guest meets fewer missing pages from life to life.
KILLS_OF_A_GUEST = 50


def kill_sidecar(guest: Guest) -> None:
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()


def wait_detached(name: str) -> None:
    wait_until(lambda: status_of(name)["state"] == "detached", "it has all of its memory")


def test_guest_whose_sidecar_was_killed_goes_on_intact(
    qemu_binary: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu_binary)
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    goes_on_from(guest, snapshot)
    kill_sidecar(guest)
    wait_until(guest.console.stands_still, "the guest meets a page that is missing")
    assert "recover" in guest.status()["trouble"]
    print(f"served again after {1000 * take_over(guest):.1f} ms")
    guest.console.wait_passes(2)
    assert guest.status()["state"] == "running"
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    guest.console.wait_passes(1)
    assert guest.status()["state"] == "detached"


def kill_again_and_again(
    lab: Lab, snapshot: Snapshot, kills: int, chance: random.Random
) -> list[float]:
    """Kills and recovers until so many sidecars were killed; guests are restored anew as needed.

    Half of them are killed while they take over.
    """
    took: list[float] = []
    done = number = 0
    while done < kills:
        guest = lab.restore(snapshot, "--rate", "4M", "--chunk", "4K", name=f"g{number}")
        number += 1
        here = 0
        while done < kills and here < KILLS_OF_A_GUEST:
            time.sleep(chance.uniform(0, LONGEST_LIFE_SECONDS))
            kill_sidecar(guest)
            if needs_none(guest):
                break
            done += 1
            here += 1
            if done < kills:
                kill_one_that_takes_over(guest, chance.uniform(0, LONGEST_LIFE_SECONDS))
                if needs_none(guest):
                    break
                done += 1
                here += 1
            took.append(take_over(guest))
        guest.console.wait_more_ticks(1)
        if not needs_none(guest):
            cli("fill", guest.name, "--rate", "0")
        guest.wait_sidecar_gone()
        guest.console.wait_passes(2)
        guest.kill()
    return took


def test_sidecars_killed_at_random_moments_cost_no_word(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    report(kill_again_and_again(lab, snapshot, KILLS, random.Random(SEED)), KILLS)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_thousand_killed_sidecars_cost_no_word(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    report(kill_again_and_again(lab, snapshot, SOAK_KILLS, random.Random(SEED)), SOAK_KILLS)


def test_restore_killed_at_any_moment_leaves_a_guest_or_none_never_half_of_one(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    """Inside launch, attach, registration and load: `recover` ends what is no guest yet."""
    snapshot = snapshots.checker(lab, guest_image, qemu)
    outcomes = set()
    for step in range(16):
        name = f"k{step}"
        run = run_dir / "run" / name
        command = subprocess.Popen(
            cli_command("restore", "--foreground", "--name", name, "--chunk", "4K", snapshot.image),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until((run / "qemu.log").exists, "QEMU is started")
        time.sleep(0.012 * step)
        command.kill()
        command.wait()
        record = RunDirectory(run).read_record()
        assert record is not None
        done = subprocess.run(cli_command("recover", name), capture_output=True, text=True)
        if done.returncode in (10, 13):
            if done.returncode == 13:  # its stream ended too early, and it has not waited for us
                assert "load of migration failed" in (run / "qemu.log").read_text()
            else:
                assert "not come so far as a guest" in done.stderr
            wait_until(lambda: owner_of(run / "qmp.sock") == 0, "a QEMU without a guest is ended")  # noqa: B023
            outcomes.add("no guest")
            cli("restore", "--name", name, "--wait", "complete", snapshot.image)
            record = RunDirectory(run).read_record()
            assert record is not None
        else:
            assert done.returncode == 0, done.stderr
            outcomes.add("guest")
        guest = Guest(record.pid, run, name)
        wait_detached(name)
        guest.console.wait_passes(1)
        guest.kill()
    print(outcomes)
    assert {"no guest", "guest"} <= outcomes


def test_supervised_guest_goes_on_by_itself(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K", "--supervise")
    for _ in range(3):
        assert guest.sidecar is not None
        before = guest.sidecar.pid
        kill_sidecar(guest)
        wait_until(lambda: guest.status()["state"] == "running", "another sidecar serves")
        record = RunDirectory(guest.directory).read_record()
        assert record is not None and record.sidecar_pid != before
        guest.sidecar = ProcessIdentity.open(record.sidecar_pid)
        guest.console.wait_more_ticks(2)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    guest.console.wait_passes(2)


def test_served_guest_cannot_be_recovered(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    refused("recover", guest.name, status=10, words=["being restored or served (PID"])
    goes_on_from(guest, snapshot)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    refused("recover", guest.name, status=10, words=["detached", "needs no sidecar"])


def test_without_its_ledger_or_image_a_guest_waits_and_is_not_guessed_at(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    kill_sidecar(guest)
    ledger = guest.directory / "ledger"
    good = ledger.read_bytes()
    ledger.write_bytes(good[:100])
    refused("recover", guest.name, status=4, words=["ledger"])
    ledger.unlink()
    refused("recover", guest.name, status=4, words=["ledger", "No such file"])
    ledger.write_bytes(good)
    record = RunDirectory(guest.directory).read_record()
    assert record is not None
    RunDirectory(guest.directory).update_record(image_key="0" * 64)
    refused("recover", guest.name, status=4, words=["not the image"])
    RunDirectory(guest.directory).update_record(image_key=record.image_key, userfaultfd=0)
    refused("recover", guest.name, status=6, words=["not a userfaultfd"])
    assert guest.alive() and guest.registered_ranges() > 0
    RunDirectory(guest.directory).update_record(userfaultfd=record.userfaultfd)
    take_over(guest)
    guest.console.wait_passes(2)


def test_ended_guest_is_recognised_also_after_a_reboot(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    kill_sidecar(guest)
    run = RunDirectory(guest.directory)
    record = run.read_record()
    assert record is not None
    run.update_record(boot_id="another-boot")
    assert guest.status()["state"] == "ended"
    run.update_record(boot_id=record.boot_id)
    assert guest.status()["state"] == "waiting"
    guest.kill()
    refused("recover", guest.name, status=13, words=["has ended"])
