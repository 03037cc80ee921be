"""Micro guests in tests: booted, saved in the middle of their work, restored, listened to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from vm.guests import MIB, STANDSTILL_SECONDS, Guest, Lab, Snapshot, take_snapshot, wait_until

from qemu_postcopy.images.micro_guest import Filled, MicroGuest, Pass, parse_lines
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec

RAM_BYTES = 16 * MIB
RESTORE = ("--no-background", "--chunk", "4K")


@dataclass(frozen=True)
class Accelerator:
    """QEMU's -accel, and a CPU that works with it (`host` ends QEMU under a software KVM)."""

    name: str
    cpu: str


def passes(guest: Guest, *, starts_midway: bool = True) -> list[Pass]:
    """All passes that the guest has reported, none of which may have found a bad word."""
    path = guest.console.path
    text = path.read_text() if path.exists() else ""
    records = parse_lines(text, starts_midway=starts_midway)
    found = [record for record in records if isinstance(record, Pass)]
    wrong = [record for record in found if record.ring3_bad or record.ring0_bad]
    assert not wrong, f"the guest found its memory damaged: {wrong[:5]}"
    return found


def wait_whole_passes(guest: Guest, count: int) -> None:
    """Until so many passes have begun and ended from now on: the one under way counts not."""
    wanted = len(passes(guest)) + 1 + count
    wait_until(lambda: len(passes(guest)) >= wanted, f"{count} passes in {guest.console.path}")


def stands_still(guest: Guest) -> bool:
    """Whether nothing is said while it is watched."""
    before = guest.console.path.read_bytes()
    time.sleep(STANDSTILL_SECONDS)
    return guest.console.path.read_bytes() == before


def boot(
    lab: Lab,
    micro: MicroGuest,
    qemu: Path,
    accelerator: Accelerator,
    memory: MemoryBackend | None = None,
) -> Guest:
    """A guest that has filled its memory and verified it twice."""
    guest = lab.launch(
        VmSpec(
            str(qemu),
            accel=accelerator.name,
            cpu=accelerator.cpu,
            memory=(memory or lab.memory("memfd", RAM_BYTES),),
            extra_arguments=tuple(micro.qemu_arguments()),
        )
    )
    wait_until(lambda: len(passes(guest, starts_midway=False)) >= 2, "two passes")
    first = parse_lines(guest.console.path.read_text())[0]
    assert first == Filled(micro.area_bytes // 8, micro.ring0_bytes // 8)
    return guest


def save(guest: Guest, image: Path, qemu: Path) -> Snapshot:
    """Saved in the middle of a pass, and ended."""
    snapshot = take_snapshot(guest, image, qemu, "memfd")
    guest.kill()
    return snapshot
