"""Faults that a kworker waits for in KVM's stead, and a QEMU that is killed meanwhile."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from kvm.micro import RESTORE, Accelerator, boot, passes, save, stands_still, wait_whole_passes
from vm.guests import PATIENCE, Guest, Lab, ends_within, send, wait_until

from qemu_postcopy.images.micro_guest import MicroGuest, build_micro_guest

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "kvm", "cc", "root")

#: How long the sidecar serves before it is looked again where the next fault waits.
SERVED_SECONDS = 0.005

#: No guest here takes part in asynchronous page faults; this one could not.
KVM = Accelerator("kvm", "qemu64,kvm-asyncpf-int=off")


def waiting_in_userfault(pattern: str) -> set[str]:
    """Tasks (paths in /proc) that wait for a userfaultfd to be answered."""
    found = set()
    for task in Path("/proc").glob(pattern):
        with suppress(OSError):
            if (task / "wchan").read_text() == "handle_userfault":
                found.add(str(task))
    return found


def waiting_kworkers() -> set[str]:
    """Those among the kernel's own threads; other guests on this host may have some too."""
    found = set()
    for task in waiting_in_userfault("[0-9]*"):
        with suppress(OSError):
            if Path(task, "comm").read_text().startswith("kworker/"):
                found.add(task)
    return found


def restore_with_fault_pending(
    lab: Lab, micro: MicroGuest, qemu: Path, run_dir: Path, *, in_kworker: bool
) -> tuple[Guest, set[str]]:
    """A guest that stands in front of a missing page, with its sidecar stopped.

    And the kworkers that wait: at least one if wanted, else none but a vCPU thread. The first
    faults are those of ring 0, which KVM always waits for in the vCPU's thread.
    """
    snapshot = save(boot(lab, micro, qemu, KVM), run_dir / "image", qemu)
    guest = lab.restore(snapshot, *RESTORE, "--paused")
    assert guest.sidecar is not None
    sidecar = guest.sidecar
    others = waiting_kworkers()
    threads = f"{guest.pid}/task/*"
    send(sidecar, signal.SIGSTOP)
    guest.ask("cont")

    def pending() -> bool:
        if waiting_kworkers() - others:
            return True
        if not waiting_in_userfault(threads):
            return False
        if not in_kworker:
            return True
        send(sidecar, signal.SIGCONT)
        time.sleep(SERVED_SECONDS)
        send(sidecar, signal.SIGSTOP)
        return False

    wait_until(pending, "a fault that waits where it is wanted", 20)
    assert stands_still(guest)
    kworkers = waiting_kworkers() - others
    assert bool(kworkers) == in_kworker
    return guest, kworkers


@pytest.mark.parametrize("interrupts", [False, True], ids=["direct", "halt"])
def test_qemu_killed_with_a_fault_pending_leaves_nobody_waiting(
    interrupts: bool, qemu_binary: Path, lab: Lab, run_dir: Path, micro_cache: Path | None
) -> None:
    micro = build_micro_guest(micro_cache, ring0_bytes=4096, interrupts=interrupts)
    guest, kworkers = restore_with_fault_pending(
        lab, micro, qemu_binary, run_dir, in_kworker=interrupts
    )
    send(guest.identity, signal.SIGKILL)
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGCONT)
    assert ends_within(guest.identity, PATIENCE)
    guest.wait_sidecar_gone()
    wait_until(lambda: not (waiting_kworkers() & kworkers), "the kworkers wait no more")


def test_vcpu_that_kvm_halts_for_a_kworkers_fault_goes_on_with_every_word_intact(
    qemu_binary: Path, lab: Lab, run_dir: Path, micro_cache: Path | None
) -> None:
    """Without the guest's consent to asynchronous page faults."""
    micro = build_micro_guest(micro_cache, ring0_bytes=4096, interrupts=True)
    guest, _ = restore_with_fault_pending(lab, micro, qemu_binary, run_dir, in_kworker=True)
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGCONT)
    wait_whole_passes(guest, 2)
    assert passes(guest)
    # Its faults are told apart from those that the vCPU itself waited for.
    assert guest.status()["origins"]["async page fault"]["faults"] > 0
