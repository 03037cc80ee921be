"""Whoever reads a guest's memory on the host while it is missing gets the image's data, not zeros.

QEMU's own readers (pmemsave, dump-guest-memory, migration) and process_vm_readv(2) wait for the
data; they fault in a thread of QEMU that is no vCPU, or in the kernel (get_user_pages).  What a
debugger uses, /proc/PID/mem and ptrace(2), cannot wait: the kernel lets it fail with EIO, because
__access_remote_vm() in mm/memory.c asks for pages without leave to drop the lock.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vm.guests import (
    MIB,
    TICK_MS,
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    ends_within,
    wait_until,
)

from qemu_postcopy.image.image import Image
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.origin import MAIN, MIGRATION
from qemu_postcopy.vm.spec import MemoryKind, VmSpec

pytestmark = pytest.mark.needs("uffd", "ptrace", "guest")

#: Below, loading the device state and the view through firmware ROMs differ from plain RAM.
BEGIN = MIB
FILL_MIB = 64

Pieces = Iterator[tuple[int, bytes]]
libc = ctypes.CDLL(None, use_errno=True)


class IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def ram_address(guest: Guest, size_bytes: int) -> int:
    """Of the one mapping of that size that a userfaultfd answers for."""
    text = Path(f"/proc/{guest.pid}/smaps").read_text()
    parts = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) (?:.*\n)(?:\w+:.*\n)*?VmFlags:(.*)$", text, re.M)
    ranges = [(int(b, 16), int(e, 16)) for b, e, flags in parts if "um" in flags.split()]
    (begin,) = (b for b, e in ranges if e - b == size_bytes)
    return begin


def by_pmemsave(guest: Guest, size_bytes: int) -> Pieces:
    """QEMU's main thread reads and writes it to a file."""
    path = guest.directory / "pmem"
    guest.ask("pmemsave", val=BEGIN, size=size_bytes - BEGIN, filename=str(path))
    yield BEGIN, path.read_bytes()
    path.unlink()


def by_dump(guest: Guest, size_bytes: int) -> Pieces:
    """An ELF file, each part of RAM a segment."""
    path = guest.directory / "dump"
    guest.ask("dump-guest-memory", paging=False, protocol=f"file:{path}")
    data = path.read_bytes()
    path.unlink()
    offset, size, count = (
        struct.unpack_from("<Q", data, 32)[0],
        *struct.unpack_from("<HH", data, 54),
    )
    for index in range(count):
        kind, _, start, _, physical, length = struct.unpack_from(
            "<IIQQQQ", data, offset + index * size
        )
        if kind == 1 and BEGIN <= physical < size_bytes:  # PT_LOAD
            yield physical, data[start : start + length]
        elif kind == 1 and physical < BEGIN < physical + length:
            yield BEGIN, data[start + BEGIN - physical : start + min(length, size_bytes)]


def by_process_vm_readv(guest: Guest, size_bytes: int) -> Pieces:
    """In pieces of a MiB."""
    address = ram_address(guest, size_bytes)
    buffer = ctypes.create_string_buffer(MIB)
    for at in range(BEGIN, size_bytes, MIB):
        ctypes.memset(buffer, 0x55, MIB)
        ours = IoVector(ctypes.addressof(buffer), MIB)
        theirs = IoVector(address + at, MIB)
        got = libc.process_vm_readv(
            guest.pid, ctypes.byref(ours), ctypes.c_ulong(1), ctypes.byref(theirs),
            ctypes.c_ulong(1), ctypes.c_ulong(0),
        )  # fmt: skip
        assert got == MIB, os.strerror(ctypes.get_errno())
        yield at, buffer.raw


def word_by_proc_mem(pid: int, address: int) -> bytes:
    """OSError if it is refused."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(8)


def word_by_ptrace(pid: int, address: int) -> bytes:
    """QEMU's main thread standing still, as a debugger does it."""
    attach, peek_data, detach = 16, 2, 17  # linux/ptrace.h
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    assert libc.ptrace(attach, pid, None, None) == 0, os.strerror(ctypes.get_errno())
    os.waitpid(pid, 0x40000000)  # __WALL
    try:
        ctypes.set_errno(0)
        word = libc.ptrace(peek_data, pid, address, None)
        if number := ctypes.get_errno():
            raise OSError(number, os.strerror(number))
        return struct.pack("<q", word)
    finally:
        assert libc.ptrace(detach, pid, None, None) == 0


DEBUGGERS: dict[str, Callable[[int, int], bytes]] = {
    "proc mem": word_by_proc_mem,
    "ptrace": word_by_ptrace,
}
#: How it reads, and whose faults that makes.
READERS: dict[str, tuple[Callable[[Guest, int], Pieces], str]] = {
    "pmemsave": (by_pmemsave, MAIN),
    "dump-guest-memory": (by_dump, MAIN),
    "process_vm_readv": (by_process_vm_readv, "other"),
}
#: Faults of loading the device state, and of looking at the rest of the machine.
FEW = 32
CHUNK_PAGES = 16


def test_reader_of_missing_memory_gets_what_the_image_holds(
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    subtests: pytest.Subtests,
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu_binary, fill_mib=FILL_MIB)
    (block,) = Image.open(snapshot.image).manifest.blocks
    for number, (name, (read, origin)) in enumerate(READERS.items()):
        with subtests.test(name), (snapshot.image / block.file).open("rb") as page_file:
            guest = lab.restore(snapshot, "--no-background", "--paused", name=f"reader{number}")
            before = guest.status()["statistics"]
            assert before["pages_data_missing"] > 0.9 * before["pages_data"]
            checked = 0
            for at, data in read(guest, snapshot.ram_bytes):
                page_file.seek(block.offset_bytes + at)
                assert data == page_file.read(len(data)), f"{len(data)} bytes at {at:#x} differ"
                checked += len(data)
            assert checked >= 0.99 * (snapshot.ram_bytes - BEGIN)
            after = guest.status()
            assert after["trouble"] == ""
            faults = {who: entry["faults"] for who, entry in after["origins"].items()}
            # Each page that it read was missing; loading the device state has touched a few before.
            assert faults[origin] > 0.9 * before["pages_data_missing"] / CHUNK_PAGES
            assert sum(faults.values()) - faults[origin] <= FEW, faults
            assert after["statistics"]["pages_demand"] > before["pages_demand"]
            guest.kill()


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_debugger_at_missing_memory_gets_an_error_and_the_data_once_it_is_there(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu_binary, kind, FILL_MIB)
    (block,) = Image.open(snapshot.image).manifest.blocks
    page_data = snapshot.image / block.file
    guest = lab.restore(snapshot, "--no-background", "--paused", name="debugged")
    address = ram_address(guest, snapshot.ram_bytes)
    offsets = range(16 * MIB, snapshot.ram_bytes, 8 * MIB)

    def wanted(at: int) -> bytes:
        with page_data.open("rb") as file:
            return os.pread(file.fileno(), 8, block.offset_bytes + at)

    assert sum(any(wanted(at)) for at in offsets) > len(offsets) // 3
    missing = guest.status()["statistics"]["pages_data_missing"]
    for at in offsets:
        for read in DEBUGGERS.values():
            with pytest.raises(OSError, match="Input/output error"):
                read(guest.pid, address + at)
    assert guest.status()["statistics"]["pages_data_missing"] == missing
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    for at in offsets:
        for read in DEBUGGERS.values():
            assert read(guest.pid, address + at) == wanted(at)
    guest.ask("cont")
    guest.console.wait_passes(1)


def lazy_one_and_its_target(
    lab: Lab, snapshot: Snapshot, guest_image: GuestImage, run_dir: Path
) -> tuple[Guest, Guest]:
    """A guest that misses nearly all of its memory, and a stock QEMU that it may migrate to."""
    lazy = lab.restore(snapshot, "--no-background", "--paused", "--chunk", "4K", name="lazy")
    lazy.ask("cont")
    lazy.console.wait_more_ticks(1)
    assert lazy.status()["statistics"]["pages_data_missing"] > 0
    spec = VmSpec(
        str(snapshot.qemu),
        memory=(lab.memory(snapshot.kind, snapshot.ram_bytes),),
        kernel=str(guest_image.kernel),
        initrd=str(guest_image.initramfs),
        append=guest_image.kernel_command_line(
            "check", fill_mib=FILL_MIB, zero_percent=10, tick_ms=TICK_MS
        ),
        extra_arguments=("-no-reboot", "-incoming", "defer"),
    )
    target = lab.launch(spec)
    return lazy, target


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_guest_that_is_still_being_filled_migrates_to_another_qemu_whole(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    snapshot: Snapshot = snapshots.checker(lab, guest_image, qemu_binary, kind, FILL_MIB)
    lazy, target = lazy_one_and_its_target(lab, snapshot, guest_image, run_dir)
    target.ask("migrate-incoming", uri=f"unix:{run_dir / 'm'}")
    # Most of it before the guest is stopped; it dirties pages faster than that ends by itself.
    lazy.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 34, "downtime-limit": 20000})
    lazy.ask("migrate", uri=f"unix:{run_dir / 'm'}")
    wait_until(lambda: lazy.ask("query-migrate")["status"] in ("completed", "failed"), "the end")
    assert lazy.ask("query-migrate")["status"] == "completed"
    assert lazy.status()["trouble"] == ""
    origins = lazy.status()["origins"]
    assert origins[MIGRATION]["faults"] > 0.5 * FILL_MIB * 256
    assert set(origins) == {MIGRATION, MAIN, "vCPU 0"}, "named while they were there"
    lazy.ask("quit")
    assert ends_within(lazy.identity, 20)
    wait_until(lambda: target.run_state() == "running", "the guest runs at its destination")
    target.console.wait_passes(2)


def test_guest_that_is_still_being_filled_moves_on_by_the_post_copy_of_qemu(
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    """It runs at its destination at once, and what it misses there comes from the image by way of
    the source: two userfaultfds one after the other."""
    snapshot = snapshots.checker(lab, guest_image, qemu_binary, "memfd", FILL_MIB)
    lazy, target = lazy_one_and_its_target(lab, snapshot, guest_image, run_dir)
    capability = {"capability": "postcopy-ram", "state": True}
    for guest in (target, lazy):
        guest.ask("migrate-set-capabilities", capabilities=[capability])
    target.ask("migrate-incoming", uri=f"unix:{run_dir / 'm'}")
    # Too slow to be done before the switch.
    lazy.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
    lazy.ask("migrate", uri=f"unix:{run_dir / 'm'}")
    wait_until(lambda: lazy.ask("query-migrate")["status"] == "active", "it is under way")
    missing = lazy.status()["statistics"]["pages_data_missing"]
    assert missing > 0.5 * FILL_MIB * 256
    lazy.ask("migrate-start-postcopy")
    target.console.wait_more_ticks(2)  # while the most of it is still at the source, or nowhere
    wait_until(lambda: lazy.ask("query-migrate")["status"] in ("completed", "failed"), "the end")
    assert lazy.ask("query-migrate")["status"] == "completed"
    said = lazy.status()
    assert said["trouble"] == ""
    assert said["origins"][MIGRATION]["faults"] > 0.5 * FILL_MIB * 256
    lazy.ask("quit")
    assert ends_within(lazy.identity, 20)
    target.console.wait_passes(2)
