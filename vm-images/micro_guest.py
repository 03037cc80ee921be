"""The micro guest: a ROM for QEMU's -bios that fills memory and verifies it, and what it says.

For paths that want KVM where no operating system boots, and for starts of a tenth of a second.
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

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images.cache import Progress, build_lock, default_cache_dir, staged_directory
from qemu_postcopy.images.packages import run_tool

_SOURCES = Path(__file__).resolve().parent / "micro"
_FLAGS = [
    *("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fpie"),
    *("-fno-stack-protector", "-mno-red-zone", "-mgeneral-regs-only", "-fcf-protection=none"),
    *("-fno-asynchronous-unwind-tables", "-fno-jump-tables"),
    *("-fno-tree-loop-distribute-patterns", "-nostdlib", "-static", "-no-pie"),
    *("-Wl,--build-id=none", "-Wl,-T,rom.ld"),
]
_HINT = "install a C compiler: apt-get install gcc binutils"
ROM_BYTES = 64 << 10
ROM_NAME = "micro.rom"
#: Guest-physical addresses (verify.c): verified by ring 3, to area_bytes, ...
AREA_START = 4 << 20
#: ... and by ring 0, to ring0_bytes.
RING0_START = 2 << 20


@dataclass(frozen=True)
class MicroGuest:
    """A built ROM; the bytes that it verifies in ring 3 and in ring 0."""

    rom: Path
    area_bytes: int
    ring0_bytes: int

    def qemu_arguments(self) -> list[str]:
        """What QEMU needs besides memory, an accelerator and a serial line.

        An exception in the guest ends QEMU with exit status 3.
        """
        return [
            *("-bios", str(self.rom), "-no-reboot"),
            *("-device", "isa-debug-exit,iobase=0xf4"),
        ]

    def least_ram_bytes(self) -> int:
        """RAM that it needs at least, in bytes."""
        return AREA_START + self.area_bytes


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


_FILLED = re.compile(r"micro ready (\d+) (\d+)\Z", re.ASCII)
_PASS = re.compile(r"micro pass (\d+) bad (\d+) (\d+)\Z", re.ASCII)


class MicroError(ValueError):
    """A line that the guest does not write, or that reports an exception in it."""


def parse_lines(text: str, *, starts_midway: bool = False) -> list[Filled | Pass]:
    """The reports in a serial output; an unfinished last line is left out.

    Args:
        text: all output so far.
        starts_midway: of a restored guest, whose first line may lack its begin; it is skipped
            where it is the end of a line.

    Raises:
        MicroError: any other line, or pass numbers that do not follow each other.
    """
    records: list[Filled | Pass] = []
    for index, line in enumerate(text.split("\n")[:-1]):
        line = line.removesuffix("\r")
        if found := _FILLED.match(line):
            record: Filled | Pass = Filled(int(found[1]), int(found[2]))
            if records:
                raise MicroError("the guest has started anew")
        elif found := _PASS.match(line):
            record = Pass(int(found[1]), int(found[2]), int(found[3]))
            before = records[-1] if records else None
            if isinstance(before, Pass) and record.number != before.number + 1:
                raise MicroError(f"pass {record.number} follows pass {before.number}")
        elif starts_midway and index == 0 and not line.startswith("micro"):
            continue
        else:
            raise MicroError(f"the micro guest does not write {line!r}")
        records.append(record)
    return records


def build_micro_guest(
    cache_dir: Path | None = None,
    progress: Progress = lambda line: None,
    *,
    area_bytes: int = 8 << 20,
    ring0_bytes: int = 128 << 10,
    interrupts: bool = False,
) -> MicroGuest:
    """The ROM, from the cache if it was built before from the same sources.

    Args:
        cache_dir: default :func:`default_cache_dir`; made if missing.
        progress: called with one line for each step.
        area_bytes: verified by ring 3, a multiple of 4096, below 3 GiB.
        ring0_bytes: verified by ring 0, a multiple of 4096, at most 2 MiB; slow where ring 0 is
            emulated.
        interrupts: ring 3 runs with interrupts on, though none come: KVM then waits for missing
            pages in a kworker and halts the vCPU (halt variant of asynchronous page faults).

    Raises:
        UsageError: a size is out of range.  HostError: no compiler, or not an x86_64 host.
    """
    if not (0 < area_bytes < 3 << 30 and 0 < ring0_bytes <= AREA_START - RING0_START):
        raise UsageError("area_bytes or ring0_bytes is out of range")
    if area_bytes % 4096 or ring0_bytes % 4096:
        raise UsageError("area_bytes and ring0_bytes must be multiples of 4096")
    if platform.machine() != "x86_64":
        raise HostError(
            f"the micro guest is not made for {platform.machine()}", hint="use a host of x86_64"
        )
    flags = [*_FLAGS, f"-DAREA_BYTES={area_bytes}UL", f"-DRING0_BYTES={ring0_bytes}UL"]
    flags.append(f"-DRING3_FLAGS={0x202 if interrupts else 0x2:#x}")
    cache_dir = cache_dir or default_cache_dir()
    final = cache_dir / f"micro-{_recipe_digest(flags)[:16]}"
    if not final.exists():
        with build_lock(cache_dir, progress):
            if not final.exists():  # not built while we waited for the lock
                progress("building the micro guest")
                with staged_directory(final) as staged:
                    _compile(staged, flags)
    return MicroGuest(final / ROM_NAME, area_bytes, ring0_bytes)


def _recipe_digest(flags: Sequence[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _compile(target: Path, flags: Sequence[str]) -> None:
    program = target / "micro.elf"
    run_tool(["gcc", *flags, "-o", str(program), "start.S", "verify.c"], hint=_HINT, cwd=_SOURCES)
    rom = target / ROM_NAME
    run_tool(["objcopy", "-O", "binary", str(program), str(rom)], hint=_HINT)
    program.unlink()
    if rom.stat().st_size != ROM_BYTES:
        raise HostError(f"the ROM has {rom.stat().st_size} bytes, not {ROM_BYTES}", hint=_HINT)
