"""The micro guest: fills memory and verifies it without an operating system, and what it says.

For paths that want KVM where no operating system boots, and for starts of a tenth of a second.
A ROM for QEMU's -bios, or a PVH ELF file for -kernel on machine type `microvm`; one task on each
of one or two CPUs, or many tasks on one CPU, with KVM's asynchronous page faults where offered.
Built by the system's C compiler into the cache, the same bytes every time; x86_64 only.  Any
thread, any number of processes.  What it says is trusted only as far as it is well-formed.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images.cache import Progress, build_lock, default_cache_dir, staged_directory
from qemu_postcopy.images.packages import run_tool

_SOURCES = Path(__file__).resolve().parent / "micro"
_FLAGS = [
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fpie"),
    *("-fno-stack-protector", "-mno-red-zone", "-mgeneral-regs-only", "-fcf-protection=none"),
    *("-fno-asynchronous-unwind-tables", "-fno-jump-tables"),
    *("-fno-tree-loop-distribute-patterns", "-nostdlib", "-static", "-no-pie"),
    # Stripped: symbols have the names of temporary files.
    *("-Wl,--build-id=none", "-Wl,--strip-all"),
]
_HINT = "install a C compiler: apt-get install gcc binutils"
ROM_BYTES = 64 << 10
Machine = Literal["pc", "microvm"]
#: What each machine type is given: the option, the file, its linker script.
_PROGRAMS: dict[Machine, tuple[str, str, str]] = {
    "pc": ("-bios", "micro.rom", "rom.ld"),
    "microvm": ("-kernel", "micro.elf", "elf.ld"),
}
#: Guest-physical addresses (micro.h): verified by ring 3, to area_bytes, ...
AREA_START = 4 << 20
#: ... and by ring 0, to ring0_bytes.
RING0_START = 2 << 20
#: ... and where each of two CPUs notes how far it has come (8 bytes each), in steps: a pass has one
#: for each page of the area, and two more.
PLACES = 0x3800
#: Their stacks end below 1 MiB.
WORKERS_MAX = 80


@dataclass(frozen=True)
class MicroGuest:
    """A built guest; the bytes that it verifies in ring 3 and in ring 0, its CPUs and workers."""

    program: Path
    machine: Machine
    area_bytes: int
    ring0_bytes: int
    cpus: int = 1
    workers: int = 0

    def qemu_arguments(self) -> list[str]:
        """What QEMU needs besides machine, CPUs, memory, an accelerator and a serial line.

        An exception in the guest ends QEMU with exit status 3.
        """
        return [
            *(_PROGRAMS[self.machine][0], str(self.program), "-no-reboot"),
            *("-device", "isa-debug-exit,iobase=0xf4"),
        ]

    def least_ram_bytes(self) -> int:
        """RAM that it needs at least, in bytes."""
        return AREA_START + self.area_bytes

    def part_of_worker(self, number: int) -> range:
        """The guest-physical bytes that a worker (from 0) verifies."""
        size = self.area_bytes // self.workers
        return range(AREA_START + number * size, AREA_START + (number + 1) * size)


@dataclass(frozen=True)
class Filled:
    """All memory is filled; so many words (8 bytes) are verified from now on."""

    ring3_words: int
    ring0_words: int


@dataclass(frozen=True)
class Pass:
    """Pass `number` (from 1) has read every word once; those were bad that are not as filled."""

    number: int
    ring3_bad: int
    ring0_bad: int


@dataclass(frozen=True)
class Tasks:
    """Line `number` (from 1) of a guest with workers.

    ``asynchronous``: KVM tells it of asynchronous page faults; ``waiting`` tasks wait for a page
    now, at most ``most_waiting`` did at once, ``waits`` is the count of all such pages so far;
    ``bad`` words were found in all passes; ``passes`` of each worker over its part of the memory.
    """

    number: int
    asynchronous: bool
    waiting: int
    most_waiting: int
    waits: int
    bad: int
    passes: tuple[int, ...]


Report = Filled | Pass | Tasks
_FILLED = re.compile(r"micro ready (\d+) (\d+)\Z", re.ASCII)
_PASS = re.compile(r"micro pass (\d+) bad (\d+) (\d+)\Z", re.ASCII)

_TASKS = re.compile(
    r"micro tasks (\d+) async ([01]) waiting (\d+) most (\d+) waits (\d+) bad (\d+) "
    r"passes((?: \d+)+)\Z",
    re.ASCII,
)


class MicroError(ValueError):
    """A line that the guest does not write, or that reports an exception in it."""


def parse_lines(text: str, *, starts_midway: bool = False) -> list[Report]:
    """The reports in a serial output; an unfinished last line is left out.

    Args:
        text: all output so far.
        starts_midway: of a restored guest, whose first line may lack its begin; it is skipped
            where it is the end of a line.

    Raises:
        MicroError: any other line, or numbers that do not follow each other.
    """
    records: list[Report] = []
    for index, line in enumerate(text.split("\n")[:-1]):
        line = line.removesuffix("\r")
        record = _parse_line(line)
        if record is None:
            if starts_midway and index == 0 and not line.startswith("micro"):
                continue
            raise MicroError(f"the micro guest does not write {line!r}")
        before = records[-1] if records else None
        if isinstance(record, Filled):
            if before is not None:
                raise MicroError("the guest has started anew")
        elif isinstance(before, Pass | Tasks) and (
            type(record) is not type(before) or record.number != before.number + 1
        ):
            raise MicroError(f"{record} follows {before}")
        records.append(record)
    return records


def _parse_line(line: str) -> Report | None:
    if found := _FILLED.match(line):
        return Filled(int(found[1]), int(found[2]))
    if found := _PASS.match(line):
        return Pass(int(found[1]), int(found[2]), int(found[3]))
    if found := _TASKS.match(line):
        number, asynchronous, waiting, most, waits, bad = (int(found[i]) for i in range(1, 7))
        passes = tuple(int(word) for word in found[7].split())
        return Tasks(number, bool(asynchronous), waiting, most, waits, bad, passes)
    return None


def build_micro_guest(
    cache_dir: Path | None = None,
    progress: Progress = lambda line: None,
    *,
    area_bytes: int = 8 << 20,
    ring0_bytes: int = 128 << 10,
    interrupts: bool = False,
    cpus: int = 1,
    workers: int = 0,
    machine: Machine = "pc",
) -> MicroGuest:
    """The guest, from the cache if it was built before from the same sources.

    Args:
        cache_dir: default :func:`default_cache_dir`; made if missing.
        progress: called with one line for each step.
        area_bytes: verified by ring 3, a multiple of 4096, below 3 GiB; with workers, of 4096 for
            each.
        ring0_bytes: verified by ring 0, a multiple of 4096, at most 2 MiB; slow where ring 0 is
            emulated.  Not with workers.
        interrupts: ring 3 runs with interrupts on, though none come: KVM then waits for missing
            pages in a kworker and halts the vCPU (halt variant of asynchronous page faults).
        cpus: 1 or 2; two go through the area side by side, page by page.
        workers: 0, or tasks that each verify a part of the area on the one CPU, by turns: one that
            waits for a page by an asynchronous page fault does not keep the others from it.
        machine: QEMU's machine type that it is for.

    Raises:
        UsageError: a number is out of range.  HostError: no compiler, or not an x86_64 host.
    """
    if not (0 < area_bytes < 3 << 30 and 0 < ring0_bytes <= AREA_START - RING0_START):
        raise UsageError("area_bytes or ring0_bytes is out of range")
    if area_bytes % (4096 * (workers or 1)) or ring0_bytes % 4096:
        raise UsageError("area_bytes (of each worker) and ring0_bytes must be multiples of 4096")
    if not 0 <= workers <= WORKERS_MAX or not 1 <= cpus <= (1 if workers else 2):
        raise UsageError(f"at most {WORKERS_MAX} workers on one CPU, or at most 2 CPUs")
    if platform.machine() != "x86_64":
        raise HostError(
            f"the micro guest is not made for {platform.machine()}", hint="use a host of x86_64"
        )
    _, name, linker_script = _PROGRAMS[machine]
    flags = [*_FLAGS, f"-DAREA_BYTES={area_bytes}UL", f"-DRING0_BYTES={ring0_bytes}UL"]
    flags += [f"-DRING3_FLAGS={0x202 if interrupts or workers else 0x2:#x}"]
    flags += [f"-DCPUS={cpus}", f"-DWORKERS={workers}", f"-Wl,-T,{linker_script}"]
    if machine == "microvm":
        flags.append("-DPVH")
    cache_dir = cache_dir or default_cache_dir()
    final = cache_dir / f"micro-{_recipe_digest(flags)[:16]}"
    if not final.exists():
        with build_lock(cache_dir, progress):
            if not final.exists():  # not built while we waited for the lock
                progress("building the micro guest")
                with staged_directory(final) as staged:
                    _compile(staged / name, flags)
    return MicroGuest(
        final / name, machine, area_bytes, 0 if workers else ring0_bytes, cpus, workers
    )


def _recipe_digest(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _compile(program: Path, flags: Sequence[str]) -> None:
    """A ROM where the program's name ends so, else an ELF file."""
    linked = program.with_suffix(".elf")
    sources = sorted(path.name for path in _SOURCES.glob("*.[cS]"))
    run_tool(["gcc", *flags, "-o", str(linked), *sources], hint=_HINT, cwd=_SOURCES)
    if linked == program:
        return
    run_tool(["objcopy", "-O", "binary", str(linked), str(program)], hint=_HINT)
    linked.unlink()
    if program.stat().st_size != ROM_BYTES:
        raise HostError(f"the ROM has {program.stat().st_size} bytes, not {ROM_BYTES}", hint=_HINT)
