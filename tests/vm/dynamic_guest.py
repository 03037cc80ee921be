"""A guest whose memory comes and goes: balloon, free page reporting, virtio-mem, DIMMs.

What the guest keeps it verifies itself, all the time (guest/memcheck.c).  What it gave back is
looked at from the host, through QEMU, as the guest would see it.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vm.guests import MIB, TICK_MS, Guest, Lab, Snapshot, cli_command, send, wait_until
from vm.kills import take_over

from qemu_postcopy.image.image import Image
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.paging.ledger import REMOVED, Ledger
from qemu_postcopy.vm.spec import MemoryKind, VmSpec

# Linux reports free pages where it has 64 MiB of them (mm/page_reporting.c).
BASE_MIB = 320
FILL_MIB = 48
LITTER_MIB = 64
#: It is full of data until so many passes are done.
LITTER_PASSES = 80
BALLOON_MIB = 56
SAVED_BALLOON_MIB = 16
DIMM_MIB = 128  # what Linux adds at once
PAGE_BYTES = 4096
WORD_STEP = 0x9E3779B97F4A7C15
#: Memory that comes later is for user space, so that it can go again; and a page that is taken for
#: the balloon is not zeroed, so that the host may never have had it.
KERNEL_WORDS = "memhp_default_state=online_movable init_on_alloc=0"


def boot(
    lab: Lab,
    guest_image: GuestImage,
    qemu: Path,
    kind: MemoryKind,
    *extra: str,
    words: str = "",
    ready: bool = True,
) -> Guest:
    """The memory checker with room for more memory; ``ready``: it has filled its own."""
    spec = VmSpec(
        str(qemu),
        memory=(lab.memory(kind, BASE_MIB * MIB),),
        kernel=str(guest_image.kernel),
        initrd=str(guest_image.initramfs),
        append=guest_image.kernel_command_line(
            "check",
            fill_mib=FILL_MIB,
            tick_ms=TICK_MS,
            modules=("virtio_pci", "virtio_balloon", "virtio_mem"),
            extra=f"{KERNEL_WORDS} {words}",
        ),
        extra_arguments=("-no-reboot", "-m", f"{BASE_MIB}M,slots=4,maxmem=2G", *extra),
    )
    guest = lab.launch(spec)
    if ready:
        wait_ready(guest)
    return guest


def wait_ready(guest: Guest) -> None:
    wait_until(lambda: guest.console.ready, "the guest has filled its memory", 240)
    guest.console.wait_more_ticks(2)


def set_balloon(guest: Guest, left_mib: int) -> None:
    """Until the guest has so much memory left, by its own word."""
    guest.ask("balloon", value=left_mib * MIB)
    wait_until(
        lambda: guest.ask("query-balloon")["actual"] == left_mib * MIB, f"{left_mib} MiB are left"
    )


def memory_devices(guest: Guest) -> dict[str, dict[str, Any]]:
    """By their ids."""
    return {entry["data"]["id"]: entry["data"] for entry in guest.ask("query-memory-devices")}


def resize(guest: Guest, device: str, size_mib: int) -> None:
    """Until the guest has plugged or unplugged what a virtio-mem device was asked for."""
    path = f"/machine/peripheral/{device}"
    guest.ask("qom-set", path=path, property="requested-size", value=size_mib * MIB)
    wait_until(
        lambda: memory_devices(guest)[device]["size"] == size_mib * MIB,
        f"{device} has {size_mib} MiB",
    )


def plug_dimm(guest: Guest, number: int, kind: MemoryKind, size_mib: int = DIMM_MIB) -> None:
    """DIMM `dimmN` of memory `dN`."""
    properties: dict[str, Any] = {"hugetlb": True} if kind == "hugetlb" else {}
    guest.ask(
        "object-add",
        **{"qom-type": "memory-backend-ram" if kind == "anonymous" else "memory-backend-memfd"},
        id=f"d{number}",
        size=size_mib * MIB,
        share=kind != "anonymous",
        **properties,
    )
    guest.ask("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"d{number}")


def unplug_dimm(guest: Guest, number: int) -> None:
    """Until the guest has let go of it, and its memory is gone."""
    guest.ask("device_del", id=f"dimm{number}")
    wait_until(lambda: f"dimm{number}" not in memory_devices(guest), f"dimm{number} is unplugged")
    guest.ask("object-del", id=f"d{number}")


def kill_and_recover(guest: Guest) -> None:
    """Its sidecar, without warning; another one serves on."""
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    take_over(guest)


def complete(guest: Guest) -> None:
    """Fills the rest, until the guest has its memory for itself."""
    # It fails where all is filled by now.
    subprocess.run(cli_command("fill", guest.name), capture_output=True)
    guest.wait_sidecar_gone()
    assert guest.status()["state"] == "detached"
    assert guest.registered_ranges() == 0


def patterned(snapshot: Snapshot, name: str) -> dict[int, bytes]:
    """The first words of a block's pages that the image has a pattern for (guest/pattern.h).

    No guest writes the same pattern twice, whereas a page of its kernel's may come to be the same
    again.
    """
    image = Image.open(snapshot.image)
    (block,) = (block for block in image.manifest.blocks if block.name.endswith(name))
    found = {}
    descriptor, offset = image.open_block(block.name)
    with os.fdopen(descriptor, "rb") as file:
        for page in range(block.size_bytes // PAGE_BYTES):
            words = os.pread(file.fileno(), PAGE_BYTES, offset + page * PAGE_BYTES)
            first, *_, last = struct.unpack("<512Q", words)
            if last == (first + 511 * WORD_STEP) % 2**64:
                found[page] = words[:8]
    return found


def given_back(guest: Guest, name: str) -> set[int]:
    """The pages of a block that the ledger has as removed now."""
    with Ledger.open(guest.directory / "ledger") as ledger:
        (block,) = (block.name for block in ledger.blocks if block.name.endswith(name))
        return set(ledger.pages_in(block, REMOVED))


def contents(guest: Guest, device: str, directory: Path) -> bytes:
    """What the guest sees where that DIMM is."""
    data = memory_devices(guest)[device]
    dumped = directory / "dimm"
    guest.ask("pmemsave", val=data["addr"], size=data["size"], filename=str(dumped))
    saved = dumped.read_bytes()
    dumped.unlink()
    return saved


def check_given_back(
    guest: Guest, pages: Mapping[int, bytes], directory: Path, guest_address: int = 0
) -> None:
    """None of these pages of the block at that address begins as the image has it."""
    guest.ask("stop")
    dumped = directory / "physical-memory"
    size = (max(pages) + 1) * PAGE_BYTES
    guest.ask("pmemsave", val=guest_address, size=size, filename=str(dumped))
    guest.ask("cont")
    with dumped.open("rb") as now:
        for page, words in pages.items():
            now.seek(page * PAGE_BYTES)
            assert now.read(len(words)) != words, f"page {page} is the image's again"
    dumped.unlink()
