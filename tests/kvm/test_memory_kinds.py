"""Every kind of guest memory: saved, restored by a launch of ours, and attached to.

The table in the README names these cases.  The micro guest verifies each word; KVM where there is
one, since huge pages matter to it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from capabilities import missing
from kvm.micro import RAM_BYTES, RESTORE, Accelerator, passes, save, wait_whole_passes
from vm.guests import INCOMING, Guest, Lab, wait_until

from qemu_postcopy.images.micro_guest import MicroGuest
from qemu_postcopy.vm.spec import VmSpec

pytestmark = pytest.mark.needs("uffd", "ptrace", "cc", "root")

SYSTEM = "qemu-system-x86_64"
SIZE = "size=16M"
ONE = ("-machine", "memory-backend=m0", "-m", "16M")
#: Memory of two and three NUMA nodes; what the guest verifies lies in all of them.
TWO = ("-m", "16M", "-numa", "node,memdev=m0", "-numa", "node,memdev=m1")
THREE = (
    "-m",
    "16M",
    "-numa",
    "node,memdev=m0",
    "-numa",
    "node,memdev=m1",
    "-numa",
    "node,memdev=m2",
)
RAM, MEMFD, FILE = "memory-backend-ram", "memory-backend-memfd", "memory-backend-file"
HUGE = f"{MEMFD},hugetlb=on,hugetlbsize=2M"


def backend(kind: str, *properties: str, name: str = "m0", size: str = SIZE) -> tuple[str, str]:
    return "-object", ",".join([kind, f"id={name}", size, *properties])


#: What each case adds to QEMU's command line; @ stands for a file on tmpfs.
CASES: dict[str, tuple[str, ...]] = {
    "memfd shared": (*ONE, *backend(MEMFD, "share=on")),
    "memfd private": (*ONE, *backend(MEMFD, "share=off")),
    "file on tmpfs shared": (*ONE, *backend(FILE, "share=on", "mem-path=@")),
    "file on tmpfs private": (*ONE, *backend(FILE, "share=off", "mem-path=/dev/shm")),
    "hugetlb shared": (*ONE, *backend(HUGE, "share=on")),
    "hugetlb private": (*ONE, *backend(HUGE, "share=off")),
    "anonymous private": (*ONE, *backend(RAM)),
    "anonymous shared": (*ONE, *backend(RAM, "share=on")),
    "no back-end named": ("-m", "16M"),
    "-mem-path and -mem-prealloc": ("-m", "16M", "-mem-path", "/dev/shm", "-mem-prealloc"),
    "prealloc shared": (*ONE, *backend(MEMFD, "share=on", "prealloc=on")),
    "prealloc hugetlb private": (*ONE, *backend(HUGE, "share=off", "prealloc=on")),
    "prealloc anonymous": (*ONE, *backend(RAM, "prealloc=on")),
    "mem-lock anonymous": (*ONE, *backend(RAM), "-overcommit", "mem-lock=on"),
    "mem-lock shared": (*ONE, *backend(MEMFD, "share=on"), "-overcommit", "mem-lock=on"),
    "merge, dump and reserve off": (
        *ONE,
        *backend(RAM, "merge=off", "dump=off", "reserve=off"),
        *("-machine", "mem-merge=off,dump-guest-core=off"),
    ),
    "bound to a host node": (*ONE, *backend(MEMFD, "policy=bind", "host-nodes=0", "share=on")),
    "nodes of different kinds": (
        *THREE,
        *backend(MEMFD, "share=on", size="size=6M"),
        *backend(HUGE, "share=off", name="m1", size="size=4M"),
        *backend(RAM, name="m2", size="size=6M"),
    ),
}
#: Only QEMU 10 has these.
CASES_OF_10: dict[str, tuple[str, ...]] = {
    "nodes in one file": (
        *TWO,
        *backend(FILE, "share=on", "mem-path=@", size="size=8M"),
        *backend(FILE, "share=on", "mem-path=@", "offset=8M", name="m1", size="size=8M"),
    ),
    "memory-backend-shm": (*ONE, *backend("memory-backend-shm")),
    "mem-lock on fault": (*ONE, *backend(RAM), "-overcommit", "mem-lock=on-fault"),
}


@dataclass(frozen=True)
class MemorySpec(VmSpec):
    """A guest whose memory is what these arguments make it."""

    memory_arguments: tuple[str, ...] = ()

    def argv(self, run_dir: Path) -> list[str]:
        return [
            *(self.binary, "-machine", self.machine, "-accel", self.accel, "-nodefaults"),
            *("-display", "none", "-cpu", self.cpu or "qemu64", *self.memory_arguments),
            *("-serial", f"file:{run_dir / 'console.log'}", *self.extra_arguments),
        ]


@pytest.fixture
def memory_file() -> Iterator[Path]:
    path = Path(f"/dev/shm/qpc-{uuid.uuid4().hex[:8]}")
    path.touch()
    os.truncate(path, RAM_BYTES)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def qemu10() -> Path:
    return Path(os.environ["QPC_QEMU10"])


@pytest.fixture
def best_accelerator() -> Accelerator:
    if missing("kvm"):
        return Accelerator("tcg", "qemu64")
    return Accelerator("kvm", "qemu64,+kvm-asyncpf-int")


Start = Callable[..., Guest]


@pytest.fixture
def start(
    lab: Lab, micro_guest: MicroGuest, best_accelerator: Accelerator, memory_file: Path
) -> Start:
    """Starts the micro guest, or with `waiting` a QEMU that waits for it, on such memory."""

    def run(qemu: Path, case: tuple[str, ...], *, waiting: bool = False) -> Guest:
        if any("hugetlb=on" in argument for argument in case):
            lab.need_huge_pages(RAM_BYTES)
        guest = lab.launch(
            MemorySpec(
                str(qemu),
                accel=best_accelerator.name,
                cpu=best_accelerator.cpu,
                memory_arguments=tuple(part.replace("@", str(memory_file)) for part in case),
                extra_arguments=(*micro_guest.qemu_arguments(), *(INCOMING if waiting else ())),
            )
        )
        if not waiting:
            wait_until(lambda: len(passes(guest, starts_midway=False)) >= 1, "a pass")
        return guest

    return run


def check_case(start: Start, lab: Lab, run_dir: Path, qemu: Path, case: tuple[str, ...]) -> None:
    """By a launch of ours and on demand only; then attached to, filled and left."""
    snapshot = save(start(qemu, case), run_dir / "image", qemu)

    restored = lab.restore(snapshot, *RESTORE)
    wait_whole_passes(restored, 1)
    restored.kill()

    waiting = start(qemu, case, waiting=True)
    attached = lab.attach(waiting, snapshot.image)
    attached.wait_sidecar_gone()
    assert attached.registered_ranges() == 0
    wait_whole_passes(attached, 1)


def needs_of(case: tuple[str, ...]) -> list[pytest.MarkDecorator]:
    huge = any("hugetlb=on" in argument for argument in case)
    return [pytest.mark.needs("hugetlb")] if huge else []


def each_with_one_qemu() -> Iterator[ParameterSet]:
    """Each case with one QEMU, by turns; with the other one where there is time (soak)."""
    for number, (name, case) in enumerate(CASES.items()):
        for turn, qemu in enumerate(("qemu", "qemu10")):
            marks = [*needs_of(case), pytest.mark.needs(qemu)]
            if (number + turn) % 2:
                marks.append(pytest.mark.soak)
            yield pytest.param(name, qemu, marks=marks, id=f"{name}-{qemu}")


@pytest.mark.parametrize(("case", "version"), list(each_with_one_qemu()))
def test_memory_is_intact(case: str, version: str, lab: Lab, run_dir: Path, start: Start) -> None:
    qemu = Path(os.environ["QPC_QEMU10"] if version == "qemu10" else shutil.which(SYSTEM) or SYSTEM)
    check_case(start, lab, run_dir, qemu, CASES[case])


@pytest.mark.needs("qemu10")
@pytest.mark.parametrize("case", CASES_OF_10)
def test_memory_that_only_qemu_10_has_is_intact(
    case: str, qemu10: Path, lab: Lab, run_dir: Path, start: Start
) -> None:
    check_case(start, lab, run_dir, qemu10, CASES_OF_10[case])
