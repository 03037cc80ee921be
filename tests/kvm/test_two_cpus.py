"""Two virtual CPUs that want the same missing page at the same time."""

from __future__ import annotations

import struct
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
    passes,
    save,
    wait_whole_passes,
)
from vm.guests import Lab, Snapshot, wait_until

from qemu_postcopy.images.micro_guest import (
    AREA_START,
    PLACES,
    MicroGuest,
    build_micro_guest,
)

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "cc", "root")


def far_from_both(micro: MicroGuest, snapshot: Snapshot) -> int:
    """The number of a page that both CPUs had not begun with when they were saved, or had done."""
    with (snapshot.image / "ram" / "m0").open("rb") as memory:
        memory.seek(PLACES)
        first, second = (int(place) for place in struct.unpack("<2Q", memory.read(16)))
    assert abs(first - second) <= 1
    pages = micro.area_bytes // 4096
    return (first % (pages + 2) + pages // 2) % pages


@pytest.mark.parametrize(
    ("accelerator", "interrupts"),
    [
        pytest.param(KVM, False, marks=pytest.mark.needs("kvm"), id="kvm"),
        pytest.param(KVM, True, marks=pytest.mark.needs("kvm"), id="kvm-halt"),
        pytest.param(TCG, False, id="tcg"),
    ],
)
def test_two_cpus_that_wait_for_one_page_both_go_on_with_its_content(
    accelerator: Accelerator,
    interrupts: bool,
    qemu_binary: Path,
    lab: Lab,
    run_dir: Path,
    micro_cache: Path | None,
) -> None:
    """Each has a message of its own; the second finds the page there and is woken.

    With interrupts on, KVM halts both, and two kworkers wait in their stead.
    """
    micro = build_micro_guest(
        micro_cache, area_bytes=1 << 20, ring0_bytes=4096, cpus=2, interrupts=interrupts
    )
    snapshot = save(boot(lab, micro, qemu_binary, accelerator), run_dir / "image", qemu_binary)
    held = AREA_START + far_from_both(micro, snapshot) * 4096
    options = hold_back(run_dir, range(held, held + 4096))
    guest = lab.restore(snapshot, *options, "--paused")
    guest.ask("cont")

    wanted = {"async page fault": 2} if interrupts else {"vCPU 0": 1, "vCPU 1": 1}
    wait_until(lambda: outstanding(guest) == wanted, f"{wanted}, and {outstanding(guest)}", 30)
    status = guest.status()
    before, stopped = status["statistics"], status["vcpus"]
    assert before["faults_waiting"] == 2
    # One that KVM has halted runs as far as the kernel's thread that faults in its stead tells.
    assert (stopped["count"], stopped["stopped"]) == (2, 0 if interrupts else 2)
    assert (stopped["async_share"] > 0) == interrupts
    let_go(guest)
    wait_whole_passes(guest, 2)
    assert passes(guest)
    assert not outstanding(guest)
    after = guest.status()["statistics"]
    assert after["already_present"] > before["already_present"]
    assert after["wakes"] > before["wakes"]
    if not interrupts:
        vcpus = guest.status()["vcpus"]
        assert vcpus["stopped"] == 0
        assert 0 < stopped["all_stopped_us"] <= vcpus["all_stopped_us"]
        assert vcpus["all_stopped_us"] <= min(vcpus["stopped_us"].values())
