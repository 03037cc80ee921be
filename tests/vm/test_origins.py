"""Promise: `status` tells whose faults were served."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest
from vm.guests import Guest, Lab, SharedSnapshots, cli, goes_on_from, refused, send, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.paging.trace import Trace
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord
from qemu_postcopy.vm.process import ProcessIdentity

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
    vcpus = status["vcpus"]
    assert vcpus["count"] == 1
    assert vcpus["stopped_us"] == {"vCPU 0": origins["vCPU 0"]["blocked_us"]}
    assert vcpus["all_stopped_us"] == vcpus["stopped_us"]["vCPU 0"]  # the only one
    assert vcpus["async_share"] == 0
    (block,) = status["blocks"]
    assert block["faults"] == status["statistics"]["faults"]
    assert block["pages_data_missing"] == status["statistics"]["pages_data_missing"]
    assert "all at once for" in cli("status", guest.name).stdout
    shown = cli("top", "--once", guest.name).stdout
    assert "1 served" in shown and "vCPU 0" in shown and "main loop" in shown
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
    assert f"{sum(faults.values()):,} faults" in path.with_name(path.name + ".html").read_text()
    (vcpu,) = (thread.tid for thread in trace.threads if thread.origin == "vCPU 0")
    assert faults[vcpu] == guest.status()["origins"]["vCPU 0"]["faults"]
    assert set(faults) == {thread.tid for thread in trace.threads}
    replayed = json.loads(
        cli("bench", "replay", path, "--image", snapshot.image, "--runs", 1, "--json").stdout
    )
    results = {entry["name"]: entry["median"] for entry in replayed["results"]}
    total = sum(faults.values())
    assert 0.7 * total < results["as fast as it goes: faults"] < 1.1 * total
    refused(
        "restore", "--trace", path, "--name", "again", snapshot.image, status=2, words=["exists"]
    )


def record_of(guest: Guest) -> SessionRecord:
    record = RunDirectory(guest.directory).read_record()
    assert record is not None
    return record


def test_after_a_take_over_threads_have_their_names_and_the_trace_goes_on(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    path = lab.directory / "trace"
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K", "--trace", path)
    goes_on_from(guest, snapshot)
    before = guest.status()["origins"]["vCPU 0"]["faults"]
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    with Trace(path) as trace:
        first = list(trace)
    assert len(first) > before / 2
    cli("recover", guest.name)
    guest.console.wait_passes(1)
    status = guest.status()
    assert status["origins"]["vCPU 0"]["faults"] > 0
    assert status["vcpus"]["count"] == 1
    assert status["vcpus"]["all_stopped_us"] > 0
    wait_until(lambda: record_of(guest).trace == str(path), "whoever comes next goes on with it")
    guest.sidecar = ProcessIdentity.open(record_of(guest).sidecar_pid)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    with Trace(path) as trace:
        faults = list(trace)
        (vcpu,) = (thread.tid for thread in trace.threads if thread.origin == "vCPU 0")
        assert trace.lost == 0
    assert faults[: len(first)] == first
    assert any(fault.tid == vcpu for fault in faults[len(first) :])


def test_status_says_what_a_guest_waits_for_when_its_source_stalls(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    schedule = run_dir / "stall.toml"
    schedule.write_text(
        '[stall]\nprobability = 1\nms = "until told"\n'
        '[[ranges]]\nblock = "m0"\nbegin = "40M"\nend = "1G"\n'
    )
    # Paused: a guest that waits under QEMU's lock would keep the restore from its last questions.
    guest = lab.restore(
        *(snapshot, "--paused", "--no-background", "--chunk", "4K", "--chaos", schedule)
    )
    guest.ask("cont")
    said = wait_until(lambda: guest.status()["trouble"], "it says what it waits for")
    assert "of block m0 has not come for" in said and "does not answer" in said
    assert "vCPU 0 for" in said
    status = guest.status()
    assert status["origins"]["vCPU 0"]["waiting"] == 1
    assert status["origins"]["vCPU 0"]["waiting_us"] >= 1_000_000
    assert status["vcpus"]["stopped"] == 1
    # In a table as wide as a terminal the words may stand on several lines.
    assert "does not answer" in " ".join(cli("status", guest.name).stdout.split())
    cli("chaos", guest.name, "--off")
    wait_until(lambda: not guest.status()["trouble"], "the trouble is over")
    guest.console.wait_passes(1)
