"""Promise: `status` tells whose faults were served."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, cli, goes_on_from, refused

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.paging.trace import Trace

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


def test_faults_are_those_of_the_virtual_cpu_and_of_loading(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    path = lab.directory / "trace"
    guest = lab.restore(snapshot, "--no-background", "--no-working-set", "--trace", path)
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(1)
    status = guest.status()
    origins = status["origins"]
    assert origins["vCPU 0"]["faults"] > 10
    assert origins["vCPU 0"]["blocked_us"] > 0
    assert "unknown" not in origins
    # Loading the device state touches memory too, and that is not the virtual CPU's doing.
    others = sum(entry["faults"] for name, entry in origins.items() if name != "vCPU 0")
    assert others > 0
    assert sum(entry["faults"] for entry in origins.values()) >= status["statistics"]["faults"]
    for entry in origins.values():
        assert sum(entry["latency_us"]) <= entry["faults"]
    assert "vCPU 0" in cli("status", guest.name).stdout
    assert cli("fill", guest.name).returncode == 0
    guest.wait_sidecar_gone()
    assert guest.status()["origins"]["vCPU 0"]["faults"] >= origins["vCPU 0"]["faults"]
    with Trace(path) as trace:
        faults = Counter(fault.tid for fault in trace)
        assert len(trace) > 0 and trace.lost == 0
    cli("report", path)
    assert f"{sum(faults.values())} faults" in path.with_name(path.name + ".html").read_text()
    (vcpu,) = (thread.tid for thread in trace.threads if thread.origin == "vCPU 0")
    assert faults[vcpu] == guest.status()["origins"]["vCPU 0"]["faults"]
    assert set(faults) == {thread.tid for thread in trace.threads}
    refused(
        "restore", "--trace", path, "--name", "again", snapshot.image, status=2, words=["exists"]
    )
