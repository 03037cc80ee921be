"""A guest that is still being filled is saved by QEMU itself (savevm, snapshot-save): whole."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from vm.guests import MIB, TICK_MS, Guest, Lab, take_snapshot, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.origin import MAIN
from qemu_postcopy.vm.spec import VmSpec

pytestmark = pytest.mark.needs("uffd", "ptrace", "guest")

FILL_MIB = 16
TAG = "still-lazy"


def make_qcow2(path: Path, size_bytes: int = 64 * MIB) -> None:
    """An empty one (docs/interop/qcow2.txt): a cluster each of header, refcounts and L1 table."""
    cluster_bits, cluster = 16, 1 << 16
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, cluster_bits, size_bytes, 0,
        -(-size_bytes // (512 * MIB)), 3 * cluster, cluster, 1, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    refcount_table = struct.pack(">Q", 2 * cluster)
    refcounts = struct.pack(">4H", 1, 1, 1, 1)
    clusters = (header, refcount_table, refcounts, b"")
    path.write_bytes(b"".join(part.ljust(cluster, b"\0") for part in clusters))


def run_job(guest: Guest, command: str, **arguments: Any) -> None:
    """Until it has done what it is for."""
    guest.ask(command, **{"job-id": "job", **arguments})

    def ended() -> Any:
        (job,) = guest.ask("query-jobs")
        return job if job["status"] == "concluded" else None

    assert "error" not in wait_until(ended, command)
    guest.ask("job-dismiss", id="job")


def test_internal_snapshot_of_a_guest_that_is_still_lazy_loads_whole(
    qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    disk = run_dir / "disk.qcow2"
    make_qcow2(disk)
    node = f"driver=qcow2,node-name=d0,file.driver=file,file.filename={disk}"
    booted = lab.boot(guest_image, qemu_binary, "memfd", FILL_MIB, "-blockdev", node)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, "memfd")
    booted.kill()
    lazy = lab.restore(snapshot, "--no-background")
    lazy.console.wait_more_ticks(2)
    before = lazy.status()["statistics"]
    assert before["pages_data_missing"] > 1000

    run_job(lazy, "snapshot-save", tag=TAG, vmstate="d0", devices=["d0"])
    said = lazy.status()
    assert said["trouble"] == ""
    assert said["statistics"]["pages_data_missing"] == 0, "it was all read"
    assert said["origins"][MAIN]["faults"] > before["pages_data_missing"] / 16
    lazy.console.wait_more_ticks(2)
    last = lazy.console.ticks[-1].number
    lazy.kill()

    loaded = lab.launch(
        VmSpec(
            str(qemu_binary),
            memory=(lab.memory("memfd", snapshot.ram_bytes),),
            kernel=str(guest_image.kernel),
            initrd=str(guest_image.initramfs),
            append=guest_image.kernel_command_line(
                "check", fill_mib=FILL_MIB, zero_percent=10, tick_ms=TICK_MS
            ),
            extra_arguments=("-no-reboot", "-blockdev", node, "-loadvm", TAG),
        )
    )
    loaded.console.wait_passes(2)
    assert snapshot.last_tick < loaded.console.ticks[0].number <= last
