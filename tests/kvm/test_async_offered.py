"""Whether a guest may use asynchronous page faults: told, arranged for, and never taken away."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from kvm.micro import KVM, RESTORE, TCG, Accelerator, boot, passes, save, wait_more_passes
from vm.guests import Guest, Lab, Snapshot, cli, launched_offering, refused, wait_until

from qemu_postcopy.images.micro_guest import MicroGuest, build_micro_guest

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "cc", "root")

WITHOUT = Accelerator("kvm", "qemu64,kvm-asyncpf-int=off")
MISFIT = 5


@pytest.fixture(scope="module")
def workers(micro_cache: Path | None) -> MicroGuest:
    """A guest that asks for them where it is offered them."""
    return build_micro_guest(micro_cache, area_bytes=2 * 8 * 4096, workers=2)


def saved(lab: Lab, micro: MicroGuest, qemu: Path, accelerator: Accelerator) -> Snapshot:
    return save(boot(lab, micro, qemu, accelerator), lab.directory / "image", qemu)


def restored_by(lab: Lab, snapshot: Snapshot, cpu: str) -> tuple[str, ...]:
    """Arguments of a restore with another -cpu than the guest was saved with."""
    manifest = json.loads((snapshot.image / "manifest.json").read_text())
    argv = list(manifest["launch"]["argv"])
    argv[argv.index("-cpu") + 1] = cpu
    argv[argv.index("-serial") + 1] = f"file:{lab.directory / 'other.log'}"
    return (*map(str, RESTORE), "--name", "r", str(snapshot.image), "--", *argv)


def finished(guest: Guest) -> str:
    """What status says when all is there."""
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    said: str = guest.status()["vcpus"]["async_page_faults"]
    return said


@pytest.mark.needs("kvm")
def test_a_guest_of_our_own_is_offered_them_and_status_says_that_it_takes_part(
    qemu_binary: Path, lab: Lab, workers: MicroGuest
) -> None:
    snapshot = saved(lab, workers, qemu_binary, KVM)
    guest = lab.restore(snapshot, *RESTORE, "--no-working-set")
    wait_more_passes(guest, range(2), 1)
    # QEMU is asked beside the serving.
    wait_until(lambda: guest.status()["vcpus"]["async_page_faults"] != "unknown", "it is known")
    vcpus = guest.status()["vcpus"]
    assert vcpus["async_page_faults"] == "on"
    assert vcpus["async_share"] > 0
    assert "the guest takes part" in cli("status", guest.name).stdout
    assert finished(guest) == "on"


@pytest.mark.needs("kvm")
def test_the_end_of_a_restore_says_whether_they_are_used(
    qemu_binary: Path, lab: Lab, workers: MicroGuest
) -> None:
    snapshot = saved(lab, workers, qemu_binary, KVM)
    guest = lab.follow(
        cli("restore", "--json", "--name", "r", "--wait", "complete", snapshot.image)
    )
    assert guest.result["vcpus"]["async_page_faults"] == "on"


@pytest.mark.parametrize(
    "accelerator",
    [pytest.param(WITHOUT, marks=pytest.mark.needs("kvm"), id="kvm"), pytest.param(TCG, id="tcg")],
)
def test_a_guest_that_is_not_offered_them_runs_without_and_status_says_so(
    accelerator: Accelerator, qemu_binary: Path, lab: Lab, workers: MicroGuest
) -> None:
    snapshot = saved(lab, workers, qemu_binary, accelerator)
    guest = lab.restore(snapshot, *RESTORE)
    assert not wait_more_passes(guest, range(2), 1).asynchronous
    assert finished(guest) == "off"
    assert "not offered" in cli("status", guest.name).stdout


@pytest.mark.needs("kvm")
def test_a_guest_that_takes_part_is_not_restored_where_it_could_not(
    qemu_binary: Path, lab: Lab, workers: MicroGuest
) -> None:
    """QEMU itself would let it: then pages are missed for ever that are there."""
    snapshot = saved(lab, workers, qemu_binary, KVM)
    arguments = restored_by(lab, snapshot, "qemu64")
    refused("restore", *arguments, status=MISFIT, words=["kvm-asyncpf-int", "-cpu"])


@pytest.mark.needs("kvm")
def test_a_guest_that_did_not_ask_is_restored_where_it_could(
    qemu_binary: Path, lab: Lab, micro_guest: MicroGuest
) -> None:
    snapshot = saved(lab, micro_guest, qemu_binary, WITHOUT)
    arguments = restored_by(lab, snapshot, "qemu64,kvm-asyncpf-int=on")
    guest = lab.follow(cli("restore", "--json", *arguments))
    guest.console.path = lab.directory / "other.log"
    assert finished(guest) == "offered"
    assert passes(guest)


@pytest.mark.needs("kvm")
def test_a_qemu_that_refuses_to_offer_them_is_launched_without(qemu: Path, lab: Lab) -> None:
    """As one that does not know the property: here, one that ends where it sees it."""
    directory = lab.directory / "old"
    directory.mkdir()
    old = directory / "qemu-system-x86_64"
    old.write_text(
        f'#!/bin/sh\ncase "$*" in *asyncpf*) echo "Property not found"; exit 1;; esac\n'
        f'exec {qemu} "$@"\n'
    )
    old.chmod(0o755)
    argv = [str(old), "-accel", "kvm", "-cpu", "qemu64", "-nodefaults", "-display", "none", "-S"]
    process = asyncio.run(launched_offering(argv, directory))
    process.kill()
    process.close()
    assert "Property not found" not in process.output()
