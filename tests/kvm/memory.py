"""What guest memory is made of, as QEMU's arguments; and a guest with just that memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vm.guests import Guest

from qemu_postcopy.vm.spec import VmSpec

SIZE = "size=16M"
ONE = ("-machine", "memory-backend=m0", "-m", "16M")
#: Memory of two and three NUMA nodes; what the guest verifies lies in all of them.
TWO = ("-m", "16M", "-numa", "node,memdev=m0", "-numa", "node,memdev=m1")
THREE = (*TWO, "-numa", "node,memdev=m2")
RAM, MEMFD, FILE = "memory-backend-ram", "memory-backend-memfd", "memory-backend-file"
HUGE = f"{MEMFD},hugetlb=on,hugetlbsize=2M"

Case = tuple[str, ...]
#: Starts a guest on such memory: see the fixture `start`.
Start = Callable[..., Guest]
#: Mounts a file system for the test: see the fixture `mount`.
Mount = Callable[[str, str], Path]


def backend(kind: str, *properties: str, name: str = "m0", size: str = SIZE) -> Case:
    """One back-end; @ in a property stands for a file on tmpfs that is the test's own."""
    return "-object", ",".join([kind, f"id={name}", size, *properties])


@dataclass(frozen=True)
class MemorySpec(VmSpec):
    """A guest whose memory is what these arguments make it."""

    memory_arguments: Case = ()

    def argv(self, run_dir: Path) -> list[str]:
        return [
            *(self.binary, "-machine", self.machine, "-accel", self.accel, "-nodefaults"),
            *("-display", "none", "-cpu", self.cpu or "qemu64", *self.memory_arguments),
            *("-serial", f"file:{run_dir / 'console.log'}", *self.extra_arguments),
        ]
