"""Micro guests in tests: booted, saved in the middle of their work, restored, listened to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vm.guests import MIB, STANDSTILL_SECONDS, Guest, Lab, Snapshot, cli, take_snapshot, wait_until

from qemu_postcopy.images.micro_guest import Filled, MicroGuest, Pass, Tasks, parse_lines
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec

RAM_BYTES = 16 * MIB
RESTORE = ("--no-background", "--chunk", "4K")


@dataclass(frozen=True)
class Accelerator:
    """QEMU's -accel, and a CPU that works with it (`host` ends QEMU under a software KVM)."""

    name: str
    cpu: str


KVM = Accelerator("kvm", "qemu64")
TCG = Accelerator("tcg", "qemu64")


def passes(guest: Guest, *, starts_midway: bool = True) -> list[Pass]:
    """All passes that the guest has reported, none of which may have found a bad word."""
    path = guest.console.path
    text = path.read_text() if path.exists() else ""
    records = parse_lines(text, starts_midway=starts_midway)
    found = [record for record in records if isinstance(record, Pass)]
    wrong = [record for record in found if record.ring3_bad or record.ring0_bad]
    assert not wrong, f"the guest found its memory damaged: {wrong[:5]}"
    return found


def tasks(guest: Guest, *, starts_midway: bool = True) -> list[Tasks]:
    """All that a guest with workers has reported; none may have found a bad word."""
    path = guest.console.path
    text = path.read_text() if path.exists() else ""
    records = parse_lines(text, starts_midway=starts_midway)
    found = [record for record in records if isinstance(record, Tasks)]
    wrong = [record for record in found if record.bad]
    assert not wrong, f"the guest found its memory damaged: {wrong[:5]}"
    return found


def wait_more_passes(guest: Guest, workers: Iterable[int], count: int) -> Tasks:
    """Until each of these workers (from 0) has verified its part so often more, from begin to end;
    the pass that is under way counts not."""
    wait_until(lambda: tasks(guest), "a report")
    wanted = {number: tasks(guest)[-1].passes[number] + 1 + count for number in workers}

    def all_have() -> bool:
        passes = tasks(guest)[-1].passes
        return all(passes[number] >= least for number, least in wanted.items())

    wait_until(all_have, f"{count} passes of workers in {guest.console.path}")
    return tasks(guest)[-1]


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
            machine=micro.machine,
            smp=micro.cpus,
            accel=accelerator.name,
            cpu=accelerator.cpu,
            memory=(memory or lab.memory("memfd", RAM_BYTES),),
            extra_arguments=tuple(micro.qemu_arguments()),
        ),
        offering=True,
    )
    if micro.workers:
        wait_more_passes(guest, range(micro.workers), 1)
    else:
        wait_until(lambda: len(passes(guest, starts_midway=False)) >= 2, "two passes")
    first = parse_lines(guest.console.path.read_text())[0]
    assert first == Filled(micro.area_bytes // 8, micro.ring0_bytes // 8)
    return guest


def save(guest: Guest, image: Path, qemu: Path) -> Snapshot:
    """Saved in the middle of a pass, and ended."""
    snapshot = take_snapshot(guest, image, qemu, "memfd")
    guest.kill()
    return snapshot


def hold_back(run_dir: Path, held: range) -> tuple[object, ...]:
    """Options of a restore in which these guest-physical bytes cannot be had; all else can.

    Whoever touches one of them waits until :func:`let_go`.
    """
    path = run_dir / "held.toml"
    path.write_text(
        f'[fail]\nprobability = 1\n[[ranges]]\nblock = "m0"\n'
        f"begin = {held.start}\nend = {held.stop}\n"
    )
    return (*RESTORE, "--no-working-set", "--chaos", path)


def let_go(guest: Guest) -> None:
    """What was held back can be had."""
    cli("chaos", guest.name, "--off")


def outstanding(guest: Guest) -> dict[str, int]:
    """Faults read and not yet answered, by who waits, as the sidecar tells them."""
    waiting = {
        origin: entry["faults"] - sum(entry["latency_us"])
        for origin, entry in guest.status()["origins"].items()
    }
    return {origin: count for origin, count in waiting.items() if count}
