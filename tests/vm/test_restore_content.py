"""The main promise: a restored guest goes on, and not one word of its memory is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm.guests import (
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    goes_on_from,
    take_snapshot,
    wait_until,
)

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.spec import MemoryKind

pytestmark = [pytest.mark.needs("uffd", "ptrace", "guest"), pytest.mark.timeout(600)]

FILL_MIB = 512
FULL_PASSES = 2

KINDS: list[MemoryKind] = ["memfd", "file", "hugetlb", "anonymous"]
KIND_PARAMS = [
    pytest.param(kind, marks=pytest.mark.needs("hugetlb") if kind == "hugetlb" else ())
    for kind in KINDS
]
CHUNKS = {"4K chunk": ("--chunk", "4K"), "default chunk": (), "2M chunk": ("--chunk", "2M")}
#: One each; memfd gets every one in a test of its own.
CHUNK_OF_KIND = {
    "memfd": "default chunk",
    "file": "2M chunk",
    "hugetlb": "4K chunk",
    "anonymous": "4K chunk",
}


def check_filled_restore(guest: Guest, snapshot: Snapshot) -> None:
    """With the background on: intact, and afterwards no trace of us is left."""
    goes_on_from(guest, snapshot)
    guest.wait_sidecar_gone()
    assert guest.alive()
    assert guest.registered_ranges() == 0
    assert guest.status()["state"] == "detached"
    guest.console.wait_passes(FULL_PASSES)
    print(f"{len(guest.console.ticks)} ticks, {guest.console.ticks[-1].pages} pages verified")


def check_demand_restore(guest: Guest, snapshot: Snapshot) -> None:
    """With the background off: intact, and served for as long as it takes."""
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(FULL_PASSES)
    said = guest.status()
    assert said["state"] == "running"
    assert said["trouble"] == ""
    assert said["statistics"]["pages_demand"] > 0
    assert said["statistics"]["pages_background"] == 0
    assert guest.registered_ranges() > 0
    print(f"{said['statistics']['faults']} faults, {guest.console.ticks[-1].pages} pages verified")


@pytest.mark.parametrize("kind", KIND_PARAMS)
def test_memory_is_intact_on_every_kind_of_memory(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    """Filled in the background first, on demand only with other chunks after that."""
    booted = lab.boot(guest_image, qemu_binary, kind, FILL_MIB)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, kind)
    booted.kill()

    filled = lab.restore(snapshot, name="filled")
    check_filled_restore(filled, snapshot)
    filled.kill()

    chunk = CHUNKS[CHUNK_OF_KIND[kind]]
    demanded = lab.restore(snapshot, "--no-background", *chunk, name="demanded")
    check_demand_restore(demanded, snapshot)


@pytest.mark.needs("qemu")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("background", [True, False], ids=["background", "demand"])
def test_memory_is_intact_with_every_chunk_and_way_of_filling(
    chunk: str,
    background: bool,
    qemu: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu, fill_mib=FILL_MIB)
    if background:
        guest = lab.restore(snapshot, *CHUNKS[chunk])
        check_filled_restore(guest, snapshot)
    else:
        guest = lab.restore(snapshot, "--no-background", *CHUNKS[chunk])
        check_demand_restore(guest, snapshot)


@pytest.mark.needs("qemu")
def test_guest_that_was_never_filled_is_filled_on_request(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, "--no-background")
    guest.console.wait_passes(1)
    assert guest.status()["statistics"]["pages_data_missing"] > 0
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    wait_until(lambda: guest.status()["state"] == "detached", "the end is on record")
    guest.console.wait_passes(FULL_PASSES)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KIND_PARAMS)
@pytest.mark.parametrize("background", [True, False], ids=["background", "demand"])
def test_thousands_of_passes_find_no_bad_word(
    background: bool,
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
) -> None:
    """A small guest, restored again and again: each restore serves every page anew."""
    snapshot = snapshots.checker(lab, guest_image, qemu_binary, kind, 16)
    option = "--background" if background else "--no-background"
    passes = 0
    while passes < 2000:
        guest = lab.restore(snapshot, option, name="soak")
        begin = guest.console.wait_more_ticks(1)[-1].passes
        guest.console.wait_passes(100)
        passes += guest.console.ticks[-1].passes - begin
        guest.kill()
