"""The same flow where KVM runs the guest: its firmware, since no more is needed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from vm.guests import MIB, Lab, take_snapshot, wait_until

from qemu_postcopy.vm.spec import VmSpec

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "kvm")

LOADED_AT = 16 * MIB


def test_machine_under_kvm_is_saved_and_resumes_lazily(
    qemu_binary: Path, lab: Lab, run_dir: Path
) -> None:
    """Saved before its first instruction, with 4 MiB of data that QEMU has put into its memory.

    The firmware's own accesses are faults of KVM; the data is read back through the monitor.
    """
    data = random.Random(2).randbytes(4 * MIB)
    (run_dir / "data").write_bytes(data)
    loader = f"loader,file={run_dir / 'data'},addr={LOADED_AT},force-raw=on"
    spec = VmSpec(
        str(qemu_binary),
        accel="kvm",
        cpu="qemu64",  # `host` and `max` end QEMU where /dev/kvm is a software one
        memory=(lab.memory("memfd", 64 * MIB),),
        extra_arguments=("-S", "-device", loader),
    )
    machine = lab.launch(spec)
    snapshot = take_snapshot(machine, run_dir / "image", qemu_binary, "memfd")
    machine.kill()

    guest = lab.restore(snapshot, "--no-background", "--paused", "--chunk", "4K")
    before = guest.status()["statistics"]
    assert before["pages_data_missing"] >= len(data) >> 12
    guest.ask("cont")
    wait_until(
        lambda: guest.status()["statistics"]["faults"] > before["faults"], "KVM faults on memory"
    )
    assert guest.ask("query-kvm")["enabled"]
    assert guest.run_state() == "running"
    saved = run_dir / "read-back"
    guest.ask("pmemsave", val=LOADED_AT, size=len(data), filename=str(saved))
    assert saved.read_bytes() == data
    # That was the last of the data, so the sidecar has no more to do.
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    assert guest.run_state() == "running"
