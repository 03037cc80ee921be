"""Disk I/O from and into missing memory: the kernel's or QEMU's access is the first one (GUP)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from vm.disk_guest import BOOTED, DEVICE, PAGES, Disk, boot, use_disk
from vm.guests import Guest, Lab, take_snapshot, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.origin import MAIN, WORKER
from qemu_postcopy.vm.spec import MemoryKind

pytestmark = pytest.mark.needs("uffd", "ptrace", "guest")

IO_THREAD = ("virtio-blk-pci,drive=d0,id=disk0,iothread=io0", "-object", "iothread,id=io0")
IO_THREAD_NAME = "I/O thread io0"
#: How QEMU gets at the disk: in the kernel (O_DIRECT into guest pages), in a worker, by a copy; and
#: whose faults that makes. With io_uring the kernel does what would block in threads of its own,
#: which are QEMU's too (io-wq).
ENGINES: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "threads": ((BOOTED,), {WORKER}),
    "native": (("cache=none,aio=native",), {MAIN}),
    "io_uring": (("cache=none,aio=io_uring",), {MAIN, WORKER}),
    "page cache": (("cache=writeback,aio=threads",), {WORKER}),
    "native in an I/O thread": (("cache=none,aio=native", *IO_THREAD), {IO_THREAD_NAME}),
    "io_uring in an I/O thread": (
        ("cache=none,aio=io_uring", *IO_THREAD),
        {IO_THREAD_NAME, WORKER},
    ),
}
#: Of the device's registers and rings, which the main loop reads whoever does the I/O.
FEW = 16


def require_engine(qemu: Path, disk: Path, drive: str) -> None:
    """Skips, with QEMU's words, where it was built without that way or the kernel refuses it."""
    tried = subprocess.run(
        [qemu, "-machine", "none", "-nodefaults", "-display", "none", "-monitor", "stdio",
         "-drive", f"file={disk},if=none,format=raw,{drive}"],
        input="quit\n", capture_output=True, text=True,
    )  # fmt: skip
    if tried.returncode:
        pytest.skip(f"{drive}: {tried.stderr.strip()}")


def check_io(guest: Guest, disk: Disk, fewest_filled: int, origins: set[str]) -> None:
    """The guest found all of its memory right, and the host finds the disk right; whose faults they
    were is told.

    One page at a time and nothing in the background: what was filled was faulted on.
    """
    wait_until(lambda: guest.console.ticks and guest.console.ticks[-1].passes == 1, "the I/O")
    assert guest.console.ticks[-1].pages == PAGES
    said = guest.status()
    assert said["trouble"] == ""
    assert said["statistics"]["pages_demand"] >= fewest_filled
    assert said["statistics"]["pages_background"] == 0
    faults = {name: entry["faults"] for name, entry in said["origins"].items()}
    assert sum(faults.get(name, 0) for name in origins) >= fewest_filled, faults
    assert all(
        count <= FEW
        for name, count in faults.items()
        if name not in origins and not name.startswith("vCPU")
    ), faults
    guest.kill()
    assert disk.wrong_pages() == []


@pytest.mark.parametrize(
    "kind", ["memfd", "anonymous", pytest.param("hugetlb", marks=pytest.mark.needs("hugetlb"))]
)
def test_disk_reads_and_writes_are_the_first_to_touch_missing_memory(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    guest_image: GuestImage,
    run_dir: Path,
    subtests: pytest.Subtests,
) -> None:
    disk = Disk(run_dir / "disk.raw")
    booted = boot(lab, guest_image, qemu_binary, kind, disk)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, kind)
    booted.kill()
    before = disk.path.with_name("before.raw")
    shutil.copyfile(disk.path, before)
    for number, (engine, ((drive, *device), origins)) in enumerate(ENGINES.items()):
        if kind != "memfd" and engine not in ("threads", "native in an I/O thread"):
            continue
        with subtests.test(engine):
            shutil.copyfile(before, disk.path)
            require_engine(qemu_binary, disk.path, drive)
            disk.say_go()
            copy = snapshot.copy(run_dir / f"image{number}")
            use_disk(copy.image, drive, *(device or (DEVICE,)))
            guest = lab.restore(copy, "--no-background", "--chunk", "4K", name=f"engine{number}")
            check_io(guest, disk, PAGES if kind != "hugetlb" else 1, origins)
