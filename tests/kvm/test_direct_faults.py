"""Faults of a vCPU in ring 3 and ring 0 on memory that is missing: served, or waited for.

The guest is a ROM on machine type `pc`, or a PVH ELF file on `microvm`.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from kvm.micro import (
    KVM,
    RAM_BYTES,
    RESTORE,
    Accelerator,
    boot,
    passes,
    save,
    stands_still,
    wait_whole_passes,
)
from vm.guests import INCOMING, Lab, cli, send, wait_until
from vm.kills import take_over

from qemu_postcopy.images.micro_guest import (
    AREA_START,
    RING0_START,
    Machine,
    MicroGuest,
    Pass,
    build_micro_guest,
    parse_lines,
)
from qemu_postcopy.vm.spec import VmSpec

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "cc", "root")


@pytest.mark.parametrize("machine_type", ["pc", "microvm"])
def test_every_word_is_intact_that_ring_3_and_ring_0_fault_in(
    machine_type: Machine,
    qemu_binary: Path,
    lab: Lab,
    run_dir: Path,
    micro_cache: Path | None,
    accelerator: Accelerator,
) -> None:
    """One page a fault, nothing filled by itself: each page that holds data is asked for."""
    micro_guest = build_micro_guest(micro_cache, machine=machine_type)
    machine = boot(lab, micro_guest, qemu_binary, accelerator)
    last = passes(machine, starts_midway=False)[-1].number
    snapshot = save(machine, run_dir / "image", qemu_binary)

    guest = lab.restore(snapshot, *RESTORE, "--paused")
    before = guest.status()["statistics"]
    pages = (micro_guest.area_bytes + micro_guest.ring0_bytes) >> 12
    assert before["pages_data_missing"] >= pages
    guest.ask("cont")
    wait_whole_passes(guest, 2)
    assert passes(guest)[0].number > last
    # The last figures are recorded in the moment in which its sidecar leaves it.
    faults = wait_until(lambda: guest.status()["statistics"].get("faults"), "its faults are told")
    print(f"{faults} faults, {pages} pages of pattern")
    assert faults >= pages
    assert guest.ask("query-kvm")["enabled"] == (accelerator.name == "kvm")


def test_guest_waits_and_reads_no_zeros_when_the_sidecar_is_killed(
    qemu_binary: Path, lab: Lab, run_dir: Path, micro_guest: MicroGuest, accelerator: Accelerator
) -> None:
    snapshot = save(
        boot(lab, micro_guest, qemu_binary, accelerator), run_dir / "image", qemu_binary
    )
    guest = lab.restore(snapshot, *RESTORE, "--paused")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    guest.ask("cont")
    wait_until(lambda: stands_still(guest), "the guest meets a page that is missing")
    assert guest.alive()
    assert guest.registered_ranges() > 0
    assert guest.status()["state"] == "waiting"
    assert not passes(guest)


@pytest.mark.needs("kvm")
def test_a_pvh_guest_on_microvm_is_attached_to_and_taken_over(
    qemu_binary: Path, lab: Lab, run_dir: Path, micro_cache: Path | None
) -> None:
    """Somebody else's QEMU; its sidecar is killed in the middle, the next one serves to the end."""
    micro = build_micro_guest(micro_cache, machine="microvm")
    snapshot = save(boot(lab, micro, qemu_binary, KVM), run_dir / "image", qemu_binary)
    waiting = lab.launch(
        VmSpec(
            str(qemu_binary),
            machine=micro.machine,
            accel=KVM.name,
            cpu="qemu64,kvm-asyncpf-int=on",
            memory=(lab.memory("memfd", RAM_BYTES),),
            extra_arguments=(*micro.qemu_arguments(), *INCOMING),
        )
    )
    guest = lab.attach(waiting, snapshot.image, *RESTORE, "--paused")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    guest.ask("cont")
    wait_until(lambda: stands_still(guest), "the guest meets a page that is missing")
    assert not passes(guest)

    take_over(guest)
    wait_whole_passes(guest, 1)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    wait_whole_passes(guest, 1)


def test_micro_guest_finds_a_single_word_that_was_changed(
    qemu_binary: Path, lab: Lab, micro_guest: MicroGuest, accelerator: Accelerator
) -> None:
    """What all tests here rest on: one word changed in each of its areas is counted as bad."""
    memory = lab.memory("file", RAM_BYTES)
    guest = boot(lab, micro_guest, qemu_binary, accelerator, memory)
    assert memory.path is not None
    with Path(memory.path).open("r+b") as file:
        for address in (AREA_START + micro_guest.area_bytes - 8, RING0_START):
            file.seek(address)
            file.write(bytes(8))

    def words_found() -> bool:
        last = parse_lines(guest.console.path.read_text())[-1]
        return isinstance(last, Pass) and (last.ring3_bad, last.ring0_bad) == (1, 1)

    wait_until(words_found, "a pass with a bad word in each area")
