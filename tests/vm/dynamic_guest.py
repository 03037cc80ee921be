"""A guest whose memory comes and goes: balloon and free page reporting.

What the guest keeps it verifies itself, all the time (guest/memcheck.c).  What it gave back is
looked at from the host, through QEMU, as the guest would see it.
"""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Mapping
from pathlib import Path

from vm.guests import MIB, TICK_MS, Guest, Lab, Snapshot, cli, send, wait_until
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
PAGE_BYTES = 4096
WORD_STEP = 0x9E3779B97F4A7C15
#: A page that is taken for the balloon is not zeroed, so that the host may never have had it.
KERNEL_WORDS = "init_on_alloc=0"


def boot(
    lab: Lab,
    guest_image: GuestImage,
    qemu: Path,
    kind: MemoryKind,
    *extra: str,
    words: str = "",
    ready: bool = True,
) -> Guest:
    """The memory checker; ``ready``: it has filled its own."""
    spec = VmSpec(
        str(qemu),
        memory=(lab.memory(kind, BASE_MIB * MIB),),
        kernel=str(guest_image.kernel),
        initrd=str(guest_image.initramfs),
        append=guest_image.kernel_command_line(
            "check",
            fill_mib=FILL_MIB,
            tick_ms=TICK_MS,
            modules=("virtio_pci", "virtio_balloon"),
            extra=f"{KERNEL_WORDS} {words}",
        ),
        extra_arguments=("-no-reboot", *extra),
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


def kill_and_recover(guest: Guest) -> None:
    """Its sidecar, without warning; another one serves on."""
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    take_over(guest)


def complete(guest: Guest) -> None:
    """Fills the rest, until the guest has its memory for itself."""
    if guest.status()["state"] != "detached":
        cli("fill", guest.name)
    guest.wait_sidecar_gone()
    assert guest.status()["state"] == "detached"
    assert guest.registered_ranges() == 0


def patterned(snapshot: Snapshot) -> dict[int, bytes]:
    """The first words of the pages that the image has a pattern for (guest/pattern.h).

    No guest writes the same pattern twice, whereas a page of its kernel's may come to be the same
    again.
    """
    found = {}
    descriptor, offset = Image.open(snapshot.image).open_block("m0")
    with os.fdopen(descriptor, "rb") as image:
        for page in range(BASE_MIB * MIB // PAGE_BYTES):
            words = os.pread(image.fileno(), PAGE_BYTES, offset + page * PAGE_BYTES)
            first, *_, last = struct.unpack("<512Q", words)
            if last == (first + 511 * WORD_STEP) % 2**64:
                found[page] = words[:8]
    return found


def given_back(guest: Guest) -> set[int]:
    """The pages of its first memory that the ledger has as removed now."""
    with Ledger.open(guest.directory / "ledger") as ledger:
        return set(ledger.pages_in("m0", REMOVED))


def check_given_back(guest: Guest, pages: Mapping[int, bytes], directory: Path) -> None:
    """None of these pages begins as the image has it, whoever looks."""
    guest.ask("stop")
    dumped = directory / "physical-memory"
    guest.ask("pmemsave", val=0, size=BASE_MIB * MIB, filename=str(dumped))
    guest.ask("cont")
    with dumped.open("rb") as now:
        for page, words in pages.items():
            now.seek(page * PAGE_BYTES)
            assert now.read(len(words)) != words, f"page {page} is the image's again"
    dumped.unlink()
