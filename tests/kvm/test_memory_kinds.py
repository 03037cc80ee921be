"""Every kind of guest memory: saved, restored by a launch of ours, and attached to.

The table in the README names these cases.  The micro guest verifies each word; KVM where there is
one, since huge pages matter to it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet
from kvm.memory import FILE, HUGE, MEMFD, ONE, RAM, THREE, TWO, Case, Start, backend
from kvm.micro import RESTORE, save, wait_whole_passes
from vm.guests import Lab, cli, send

from qemu_postcopy.images.micro_guest import AREA_START
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = pytest.mark.needs("uffd", "ptrace", "cc", "root")

SYSTEM = "qemu-system-x86_64"

#: What each case adds to QEMU's command line.
CASES: dict[str, Case] = {
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
CASES_OF_10: dict[str, Case] = {
    "nodes in one file": (
        *TWO,
        *backend(FILE, "share=on", "mem-path=@", size="size=8M"),
        *backend(FILE, "share=on", "mem-path=@", "offset=8M", name="m1", size="size=8M"),
    ),
    "memory-backend-shm": (*ONE, *backend("memory-backend-shm")),
    "mem-lock on fault": (*ONE, *backend(RAM), "-overcommit", "mem-lock=on-fault"),
}


def needs_of(case: Case) -> list[pytest.MarkDecorator]:
    huge = any("hugetlb=on" in argument for argument in case)
    return [pytest.mark.needs("hugetlb")] if huge else []


#: Those in which the library has something to keep from filling, or to offer, that others lack.
PRELOADED = [
    "mem-lock anonymous",
    *(
        pytest.param(case, marks=[pytest.mark.soak, *needs_of(CASES[case])])
        for case in ("memfd private", "hugetlb private", "prealloc anonymous", "mem-lock shared")
    ),
]
TAKEN_OVER = [
    "memfd private",
    *(
        pytest.param(case, marks=[pytest.mark.soak, *needs_of(CASES[case])])
        for case in ("hugetlb private", "file on tmpfs private")
    ),
]


@pytest.fixture
def gib_pages() -> Iterator[None]:
    """One page of 1 GiB in the pool, if the host has so much in one piece."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages")
    if not os.access(pool, os.W_OK):
        pytest.skip(f"{pool} cannot be written")
    before = int(pool.read_text())
    pool.write_text(str(before + 1))
    if int(pool.read_text()) <= before:
        pytest.skip("no 1 GiB of memory in one piece")
    yield
    pool.write_text(str(before))


@pytest.fixture
def qemu10() -> Path:
    return Path(os.environ["QPC_QEMU10"])


def check_case(start: Start, lab: Lab, run_dir: Path, qemu: Path, case: Case) -> None:
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


@pytest.mark.needs("qemu")
@pytest.mark.parametrize("case", PRELOADED)
def test_memory_that_the_preload_library_offers_is_intact(
    case: str, qemu_binary: Path, lab: Lab, run_dir: Path, start: Start
) -> None:
    snapshot = save(start(qemu_binary, CASES[case]), run_dir / "image", qemu_binary)
    guest = lab.restore(snapshot, "--attach-by", "preload")
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    wait_whole_passes(guest, 1)


@pytest.mark.parametrize("case", TAKEN_OVER)
def test_private_memory_is_intact_after_a_take_over(
    case: str, qemu: Path, lab: Lab, run_dir: Path, start: Start
) -> None:
    """What is there is asked of the page table, since the file has nothing."""
    snapshot = save(start(qemu, CASES[case]), run_dir / "image", qemu)
    guest = lab.restore(snapshot, *RESTORE, "--paused")
    guest.ask("human-monitor-command", **{"command-line": f"xp /1xg {AREA_START:#x}"})
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    (said,) = json.loads(cli("recover", guest.name, "--json").stdout)
    guest.sidecar = ProcessIdentity.open(said["sidecar_pid"])
    guest.ask("cont")
    wait_whole_passes(guest, 1)


@pytest.mark.soak
@pytest.mark.parametrize("share", ["on", "off"])
def test_a_guest_on_pages_of_1_gib_is_intact(
    share: str, qemu_binary: Path, lab: Lab, run_dir: Path, start: Start, gib_pages: None
) -> None:
    """One fault brings all of it; the sidecar holds as much meanwhile."""
    memory = f"{MEMFD},hugetlb=on,hugetlbsize=1G"
    case = ("-machine", "memory-backend=m0", "-m", "1G")
    check_case(
        start,
        lab,
        run_dir,
        qemu_binary,
        (*case, *backend(memory, f"share={share}", size="size=1G")),
    )
