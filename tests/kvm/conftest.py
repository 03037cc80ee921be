"""The guests of tests/vm, and micro guests under each accelerator."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from capabilities import missing
from kvm.memory import Case, MemorySpec, Mount, Start
from kvm.micro import KVM, RAM_BYTES, TCG, Accelerator, passes
from vm.conftest import lab, qemu, snapshots
from vm.guests import INCOMING, Guest, Lab, wait_until

from qemu_postcopy.images.micro_guest import MicroGuest, build_micro_guest

__all__ = ["lab", "qemu", "snapshots"]


@pytest.fixture(scope="session")
def micro_cache() -> Path | None:
    """Where ROMs are kept; None for the usual place."""
    cache = os.environ.get("QPC_CACHE")
    return Path(cache) if cache else None


@pytest.fixture(scope="session")
def micro_guest(micro_cache: Path | None) -> MicroGuest:
    """The ROM, built on first use; ``needs("cc")`` goes with it."""
    return build_micro_guest(micro_cache)


@pytest.fixture(
    params=[
        pytest.param(KVM, marks=pytest.mark.needs("kvm")),
        TCG,
    ],
    ids=lambda accelerator: accelerator.name,
)
def accelerator(request: pytest.FixtureRequest) -> Accelerator:
    """Each way to run the guest's instructions."""
    made = request.param
    assert isinstance(made, Accelerator)
    return made


@pytest.fixture
def memory_file() -> Iterator[Path]:
    """An empty file on tmpfs, as large as a guest."""
    path = Path(f"/dev/shm/qpc-{uuid.uuid4().hex[:8]}")
    path.touch()
    os.truncate(path, RAM_BYTES)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def mount(run_dir: Path) -> Iterator[Mount]:
    """Mounts a file system of this type, with these options, for the test."""
    mounted: list[Path] = []

    def run(kind: str, options: str) -> Path:
        folder = run_dir / kind
        folder.mkdir()
        subprocess.run(["mount", "-t", kind, "-o", options, kind, folder], check=True)
        mounted.append(folder)
        return folder

    yield run
    for folder in mounted:
        # Lazily: the test's guests may end after this.
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def start(lab: Lab, micro_guest: MicroGuest, memory_file: Path) -> Start:
    """Starts the micro guest, or with `waiting` a QEMU that waits for it, on such memory; under KVM
    where there is one, since huge pages matter to it."""
    accelerator = TCG if missing("kvm") else KVM

    def run(qemu: Path, case: Case, *, waiting: bool = False) -> Guest:
        if any("hugetlb=on" in argument for argument in case):
            lab.need_huge_pages(RAM_BYTES)
        guest = lab.launch(
            MemorySpec(
                str(qemu),
                accel=accelerator.name,
                cpu=accelerator.cpu,
                memory_arguments=tuple(part.replace("@", str(memory_file)) for part in case),
                extra_arguments=(*micro_guest.qemu_arguments(), *(INCOMING if waiting else ())),
            )
        )
        if not waiting:
            wait_until(lambda: len(passes(guest, starts_midway=False)) >= 1, "a pass")
        return guest

    return run
