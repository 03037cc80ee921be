"""The guest that does disk I/O from and into missing memory (guest/memio.c), and its disk.

The pattern is the guest's (guest/pattern.h), computed a second time: what is on the disk afterwards
is compared by the host, without any word of the guest's.
"""

from __future__ import annotations

from array import array
from pathlib import Path

from vm.guests import MIB, TICK_MS, Guest, Lab, edit_manifest, wait_until

from qemu_postcopy.image.image import Image
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.spec import MemoryKind, VmSpec

FILL_MIB = 4
PAGES = FILL_MIB * 256
PAGE_BYTES, PAGE_WORDS = 4096, 512
IN_OFFSET, OUT_OFFSET = 1 * MIB, 64 * MIB
DISK_BYTES = 128 * MIB
DISK_GENERATION = 7
WORD = (1 << 64) - 1

#: How the disk of a booted guest is given; a restore replaces words of it.
BOOTED = "cache=none,aio=threads"
DEVICE = "virtio-blk-pci,drive=d0,id=disk0"


def _mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & WORD
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def pattern(page_index: int, generation: int) -> bytes:
    """What that page holds."""
    seed = _mix((_mix(page_index + 1) + generation * 0xD6E8FEB86659FD93) & WORD)
    return array("Q", [(seed + i * 0x9E3779B97F4A7C15) & WORD for i in range(PAGE_WORDS)]).tobytes()


class Disk:
    """A raw file, with what the guest is to read; it waits there until it is told to go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("wb") as file:
            file.truncate(DISK_BYTES)
            file.seek(IN_OFFSET + PAGES // 2 * PAGE_BYTES)
            for page in range(PAGES // 2, PAGES):
                file.write(pattern(page, DISK_GENERATION))

    def say_go(self) -> None:
        """To be done while no QEMU has it open: a disk is not part of an image."""
        with self.path.open("r+b") as file:
            file.write(b"go")

    def wrong_pages(self) -> list[int]:
        """The pages that the guest has written otherwise than its memory was at the snapshot."""
        with self.path.open("rb") as file:
            file.seek(OUT_OFFSET)
            return [page for page in range(PAGES // 2) if file.read(PAGE_BYTES) != pattern(page, 0)]


def spec(
    lab: Lab, guest_image: GuestImage, qemu: Path, kind: MemoryKind, disk: Disk, *extra: str
) -> VmSpec:
    """How it is started."""
    return VmSpec(
        str(qemu),
        memory=(lab.memory(kind, guest_image.ram_mib(FILL_MIB) * MIB),),
        kernel=str(guest_image.kernel),
        initrd=str(guest_image.initramfs),
        append=guest_image.kernel_command_line(
            "io", fill_mib=FILL_MIB, tick_ms=TICK_MS, modules=("virtio_pci", "virtio_blk")
        ),
        extra_arguments=(
            "-no-reboot",
            *("-drive", f"file={disk.path},if=none,id=d0,format=raw,{BOOTED}"),
            *("-device", DEVICE, *extra),
        ),
    )


def boot(
    lab: Lab, guest_image: GuestImage, qemu: Path, kind: MemoryKind, disk: Disk, *extra: str
) -> Guest:
    """Filled, and polling its disk for the word."""
    guest = lab.launch(spec(lab, guest_image, qemu, kind, disk, *extra))
    wait_until(lambda: guest.console.ready, "the guest has filled its memory", 240)
    guest.console.wait_more_ticks(3)
    return guest


def use_disk(image: Path, drive: str, device: str = DEVICE, *more: str) -> None:
    """Changes how the image's guest gets at its disk; the guest does not see a difference."""
    launch = dict(Image.open(image).manifest.launch)
    argv = [word.replace(BOOTED, drive).replace(DEVICE, device) for word in launch["argv"]]
    # An object must be there before the device that names it; QEMU sorts that itself.
    edit_manifest(image, launch={**launch, "argv": [*argv, *more]})
