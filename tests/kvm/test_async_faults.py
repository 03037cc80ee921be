"""Asynchronous page faults that the guest takes part in: a task waits, the others run on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from kvm.micro import (
    KVM,
    TCG,
    Accelerator,
    boot,
    hold_back,
    let_go,
    outstanding,
    save,
    stands_still,
    tasks,
    wait_more_passes,
)
from vm.guests import Guest, Lab, cli, send, wait_until

from qemu_postcopy.images.micro_guest import AREA_START, Machine, build_micro_guest
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "cc", "root")

ASYNC = "async page fault"
WORKERS = 4
#: The one whose page is held back.
HELD = 1
OTHERS = [number for number in range(WORKERS) if number != HELD]
PART_BYTES = 8 * 4096
#: At most so many asynchronous page faults of a vCPU are under way (ASYNC_PF_PER_VCPU,
#: arch/x86/include/asm/kvm_host.h); the next is waited for by the vCPU itself.
OUTSTANDING_MAX = 64


def restore_with_a_page_held_back(
    lab: Lab,
    run_dir: Path,
    qemu: Path,
    cache: Path | None,
    accelerator: Accelerator,
    machine: Machine = "pc",
) -> Guest:
    """One page in the middle of one worker's part; it is waited for when this returns."""
    micro = build_micro_guest(
        cache, area_bytes=WORKERS * PART_BYTES, workers=WORKERS, machine=machine
    )
    original = boot(lab, micro, qemu, accelerator)
    assert tasks(original)[-1].asynchronous == (accelerator.name == "kvm")
    snapshot = save(original, run_dir / "image", qemu)
    page = micro.part_of_worker(HELD).start + 3 * 4096
    held = hold_back(run_dir, range(page, page + 4096))
    guest = lab.restore(snapshot, *held, "--paused")
    guest.ask("cont")
    wait_until(lambda: guest.status()["statistics"]["faults_waiting"], "the page is waited for")
    return guest


def others_run_on(guest: Guest) -> int:
    """While one waits the others verify all of theirs; returns the passes of that one."""
    before = wait_more_passes(guest, OTHERS, 1)
    after = wait_more_passes(guest, OTHERS, 2)
    assert before.waiting == after.waiting == 1
    assert after.passes[HELD] == before.passes[HELD]
    return after.passes[HELD]


@pytest.mark.needs("kvm")
@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_other_tasks_run_while_one_waits_for_its_page(
    machine: Machine,
    qemu_binary: Path,
    lab: Lab,
    run_dir: Path,
    micro_cache: Path | None,
) -> None:
    guest = restore_with_a_page_held_back(lab, run_dir, qemu_binary, micro_cache, KVM, machine)
    passes_of_held = others_run_on(guest)
    # Only that page is missing; a kworker waits for it in the task's stead.
    assert outstanding(guest) == {ASYNC: 1}
    status = guest.status()
    assert status["statistics"]["faults_waiting"] == 1
    assert status["vcpus"]["stopped"] == 0 and status["vcpus"]["async_share"] > 0

    let_go(guest)
    last = wait_more_passes(guest, range(WORKERS), 2)
    assert last.passes[HELD] > passes_of_held
    assert last.waiting == 0 and last.waits > 0
    assert not outstanding(guest)


def test_without_asynchronous_page_faults_the_whole_guest_waits(
    qemu: Path, lab: Lab, run_dir: Path, micro_cache: Path | None
) -> None:
    """The same guest under TCG, which has none: what the others above gain."""
    guest = restore_with_a_page_held_back(lab, run_dir, qemu, micro_cache, TCG)
    wait_until(lambda: stands_still(guest), "the guest stands still")
    assert outstanding(guest) == {"vCPU 0": 1}
    let_go(guest)
    last = wait_more_passes(guest, range(WORKERS), 2)
    assert last.waits == last.most_waiting == 0


@pytest.mark.needs("kvm")
def test_other_tasks_run_on_though_the_sidecar_was_killed_while_one_waits(
    qemu_binary: Path, lab: Lab, run_dir: Path, micro_cache: Path | None
) -> None:
    guest = restore_with_a_page_held_back(lab, run_dir, qemu_binary, micro_cache, KVM)
    wait_more_passes(guest, OTHERS, 1)  # all of theirs is there
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    guest.sidecar.close()
    guest.sidecar = None
    others_run_on(guest)

    (said,) = json.loads(cli("recover", guest.name, "--json").stdout)
    guest.sidecar = ProcessIdentity.open(said["sidecar_pid"])
    wait_more_passes(guest, range(WORKERS), 2)


@pytest.mark.needs("kvm")
def test_sixty_four_wait_asynchronously_and_the_next_keeps_the_virtual_cpu(
    qemu_binary: Path, lab: Lab, run_dir: Path, micro_cache: Path | None
) -> None:
    workers = OUTSTANDING_MAX + 2
    micro = build_micro_guest(micro_cache, area_bytes=workers * 4096, workers=workers)
    snapshot = save(boot(lab, micro, qemu_binary, KVM), run_dir / "image", qemu_binary)
    held = hold_back(run_dir, range(AREA_START, AREA_START + micro.area_bytes))
    guest = lab.restore(snapshot, *held, "--paused")
    # KVM counts those that were answered too, until it can tell the guest (async_pf.queued): so
    # nothing else is to be missing.
    cli("fill", guest.name)
    missing = micro.area_bytes // 4096
    wait_until(
        lambda: guest.status()["statistics"]["pages_data_missing"] <= missing, "the rest is there"
    )
    guest.ask("cont")

    wanted = {ASYNC: OUTSTANDING_MAX, "vCPU 0": 1}

    def waiting() -> dict[str, int]:
        entries = guest.status()["origins"].items()
        return {origin: entry["waiting"] for origin, entry in entries if entry["waiting"]}

    wait_until(lambda: waiting() == wanted, f"{wanted}, and {waiting()}", 30)
    # Nobody runs now, not even the one task that has not touched anything missing yet.
    assert stands_still(guest)
    wait_until(lambda: waiting() == wanted, f"{wanted} still, and {waiting()}", 30)

    let_go(guest)
    last = wait_more_passes(guest, range(workers), 2)
    # As the guest itself has counted: never more at once, each of the 64 once for its page.
    assert last.most_waiting == OUTSTANDING_MAX
    assert last.waits >= OUTSTANDING_MAX and last.waiting == 0
