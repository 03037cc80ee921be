"""Memory that comes and goes while a guest is being filled, and after."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vm.dynamic_guest import (
    BALLOON_MIB,
    BASE_MIB,
    DIMM_MIB,
    FILL_MIB,
    LITTER_MIB,
    LITTER_PASSES,
    SAVED_BALLOON_MIB,
    boot,
    check_given_back,
    complete,
    contents,
    given_back,
    kill_and_recover,
    memory_devices,
    patterned,
    plug_dimm,
    resize,
    set_balloon,
    unplug_dimm,
    wait_ready,
)
from vm.guests import MIB, Guest, Lab, cli, goes_on_from, refused, take_snapshot, wait_until

from qemu_postcopy.image.image import Image
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.spec import MemoryKind, VmSpec

pytestmark = [pytest.mark.needs("uffd", "ptrace", "guest"), pytest.mark.timeout(400)]

PAGES_PER_MIB = 256
VIRTIO_MEM_MIB = 256
PLUGGED_MIB = 192
#: No fault waits longer, in a storm of removals on a busy machine: 2^20 us are a second.
LONGEST_WAIT_LOG2_US = 20
EVERY_KIND = pytest.mark.parametrize(
    "kind", ["memfd", pytest.param("anonymous", marks=pytest.mark.soak)]
)
DIMM_KIND = pytest.mark.parametrize(
    "kind",
    [
        "memfd",
        pytest.param("anonymous", marks=pytest.mark.soak),
        pytest.param("hugetlb", marks=[pytest.mark.soak, pytest.mark.needs("hugetlb")]),
    ],
)


def block(guest: Guest, name: str) -> dict[str, object]:
    """What `status` says of one of its blocks."""
    (found,) = (entry for entry in guest.status()["blocks"] if entry["name"].endswith(name))
    assert isinstance(found, dict)
    return found


@EVERY_KIND
def test_what_a_balloon_and_free_page_reporting_gave_back_is_never_the_images_again(
    kind: MemoryKind, qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    booted = boot(
        lab, guest_image, qemu_binary, kind,
        "-device", "virtio-balloon-pci,id=b0,free-page-reporting=on",
        words=f"qpc.litter={LITTER_MIB} qpc.litter_until={LITTER_PASSES}",
    )  # fmt: skip
    set_balloon(booted, BASE_MIB - SAVED_BALLOON_MIB)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, kind)
    assert booted.console.ticks[-1].passes < LITTER_PASSES, "the litter was freed before"
    booted.kill()

    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    goes_on_from(guest, snapshot)
    assert guest.ask("query-balloon")["actual"] == (BASE_MIB - SAVED_BALLOON_MIB) * MIB
    # Free memory that is missing here, and has data in the image, is reported.
    data = patterned(snapshot, "m0")
    half = LITTER_MIB // 2 * PAGES_PER_MIB
    wait_until(lambda: guest.console.ticks[-1].passes >= LITTER_PASSES, "there is litter")
    wait_until(lambda: len(given_back(guest, "m0") & data.keys()) > half, "free pages are reported")
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    removed = given_back(guest, "m0")
    kill_and_recover(guest)
    set_balloon(guest, BASE_MIB)
    guest.console.wait_passes(1)

    # While the background fills.
    cli("fill", guest.name, "--rate", "10M")
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    assert block(guest, "m0")["pages_data_missing"]
    removed |= given_back(guest, "m0")
    check_given_back(guest, {page: data[page] for page in removed & data.keys()}, run_dir)
    complete(guest)
    # Nobody is told any more.
    set_balloon(guest, BASE_MIB)
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    set_balloon(guest, BASE_MIB)
    guest.console.wait_passes(1)


@EVERY_KIND
def test_virtio_mem_shrinks_and_grows_while_its_memory_is_missing(
    kind: MemoryKind, qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    booted = boot(
        lab, guest_image, qemu_binary, kind,
        "-object", lab.memory(kind, VIRTIO_MEM_MIB * MIB, "v0").option(),
        "-device", f"virtio-mem-pci,id=vm0,memdev=v0,requested-size={PLUGGED_MIB}M",
        words=f"qpc.memory={BASE_MIB}",
    )  # fmt: skip
    wait_until(lambda: memory_devices(booted)["vm0"]["size"] == PLUGGED_MIB * MIB, "it is plugged")
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, kind)
    booted.kill()
    data = patterned(snapshot, "v0")
    assert len(data) > FILL_MIB // 2 * PAGES_PER_MIB

    guest = lab.restore(snapshot, "--no-background")
    goes_on_from(guest, snapshot)
    assert memory_devices(guest)["vm0"]["size"] == PLUGGED_MIB * MIB
    resize(guest, "vm0", 0)
    assert len(given_back(guest, "v0")) == VIRTIO_MEM_MIB * PAGES_PER_MIB
    kill_and_recover(guest)
    guest.console.wait_passes(1)
    resize(guest, "vm0", VIRTIO_MEM_MIB)
    guest.console.wait_passes(1)
    check_given_back(guest, data, run_dir, memory_devices(guest)["vm0"]["memaddr"])
    resize(guest, "vm0", 64)
    complete(guest)
    resize(guest, "vm0", 128)
    guest.console.wait_passes(1)


@DIMM_KIND
def test_dimms_are_plugged_saved_restored_and_unplugged(
    kind: MemoryKind, qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    words = f"qpc.memory={BASE_MIB}"
    if kind == "hugetlb":
        lab.need_huge_pages((BASE_MIB + 2 * DIMM_MIB) * MIB)
    booted = boot(lab, guest_image, qemu_binary, kind, words=words, ready=False)
    booted.console.wait_more_ticks(1)
    plug_dimm(booted, 0, kind)
    wait_ready(booted)
    first = take_snapshot(booted, run_dir / "first", qemu_binary, kind)
    booted.kill()
    assert len(patterned(first, "d0")) > FILL_MIB // 2 * PAGES_PER_MIB

    # The DIMM is on no command line of the user's; it came back all the same.
    lazy = lab.restore(first, "--no-background", name="lazy")
    goes_on_from(lazy, first)
    assert memory_devices(lazy)["dimm0"]["size"] == DIMM_MIB * MIB
    # A second one comes while the guest is being filled, the first one goes.
    plug_dimm(lazy, 1, kind)
    # The first steps of a guest are not disturbed by such questions.
    plugged_in = [{"name": "d1", "bytes": DIMM_MIB * MIB}]
    wait_until(lambda: lazy.status()["plugged_in"] == plugged_in, "it is seen")
    unplug_dimm(lazy, 0)
    wait_until(lambda: block(lazy, "d0")["taken_away"], "its end is seen")
    assert "d1 (128 MiB)" in cli("status", lazy.name).stdout
    kill_and_recover(lazy)
    # QEMU 7.2 has no use for that memory any more, and keeps it mapped after an incoming migration.
    if not str(Image.open(first.image).manifest.qemu_version).startswith("7."):
        pages = DIMM_MIB * PAGES_PER_MIB
        wait_until(lambda: block(lazy, "d0")["pages_unmapped"] == pages, "d0 is let go")
        assert block(lazy, "d0")["pages_data_missing"] == 0
    kill_and_recover(lazy)
    lazy.console.wait_passes(1)
    complete(lazy)
    second = take_snapshot(lazy, run_dir / "second", qemu_binary, kind)
    lazy.kill()

    guest = lab.restore(second, name="again")
    goes_on_from(guest, second)
    assert list(memory_devices(guest)) == ["dimm1"]
    unplug_dimm(guest, 1)
    complete(guest)
    guest.console.wait_passes(1)


@pytest.mark.soak
@pytest.mark.needs("hugetlb")
def test_memory_of_huge_pages_comes_and_goes_while_it_is_missing(
    qemu: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    """The guest itself finds all of it right; QEMU tells nobody of huge pages that go."""
    lab.need_huge_pages((BASE_MIB + VIRTIO_MEM_MIB + DIMM_MIB) * MIB)
    booted = boot(
        lab, guest_image, qemu, "hugetlb",
        *("-device", "virtio-balloon-pci,id=b0"),
        *("-object", lab.memory("hugetlb", VIRTIO_MEM_MIB * MIB, "v0").option()),
        *("-device", f"virtio-mem-pci,id=vm0,memdev=v0,requested-size={PLUGGED_MIB}M"),
        words=f"qpc.memory={BASE_MIB}",
    )  # fmt: skip
    wait_until(lambda: memory_devices(booted)["vm0"]["size"] == PLUGGED_MIB * MIB, "it is plugged")
    snapshot = take_snapshot(booted, run_dir / "image", qemu, "hugetlb")
    assert len(patterned(snapshot, "v0")) > FILL_MIB // 2 * PAGES_PER_MIB
    booted.kill()

    guest = lab.restore(snapshot, "--no-background")
    goes_on_from(guest, snapshot)
    plug_dimm(guest, 0, "hugetlb")
    resize(guest, "vm0", 0)
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    kill_and_recover(guest)
    guest.console.wait_passes(1)
    set_balloon(guest, BASE_MIB)
    resize(guest, "vm0", VIRTIO_MEM_MIB)
    complete(guest)
    resize(guest, "vm0", 64)
    guest.console.wait_passes(1)


@EVERY_KIND
def test_no_fault_waits_long_while_a_balloon_is_inflated_again_and_again(
    kind: MemoryKind, qemu: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    booted = boot(
        lab, guest_image, qemu, kind, *("-smp", "2", "-device", "virtio-balloon-pci,id=b0")
    )
    snapshot = take_snapshot(booted, run_dir / "image", qemu, kind)
    booted.kill()
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    passes = guest.console.wait_more_ticks(1)[-1].passes
    inflated = 0
    # Each page that is put into it is a removal of its own.
    while inflated < 2 or guest.console.ticks[-1].passes < passes + 2:
        set_balloon(guest, BASE_MIB - BALLOON_MIB)
        set_balloon(guest, BASE_MIB)
        inflated += 1
    told = guest.status()["statistics"]
    longest = max(i for i, count in enumerate(told["latency_us"]) if count)
    print(
        f"{inflated} times inflated, {told['events_remove']} removals, {told['faults']} faults, "
        f"each answered in less than {1 << longest} us"
    )
    assert told["events_remove"] >= inflated * BALLOON_MIB * PAGES_PER_MIB // 2
    assert told["faults"] > FILL_MIB // 2 * PAGES_PER_MIB
    assert longest <= LONGEST_WAIT_LOG2_US
    complete(guest)
    guest.console.wait_passes(1)


@pytest.mark.parametrize(
    "remade",
    [
        pytest.param(False, id="gone"),
        pytest.param(True, id="plugged in anew and larger", marks=pytest.mark.soak),
    ],
)
def test_dimm_is_restored_where_it_was_whatever_became_of_the_one_before_it(
    remade: bool, qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    dimms: list[str] = []
    for number in range(2):
        dimms += ["-object", lab.memory("memfd", DIMM_MIB * MIB, f"d{number}").option()]
        dimms += ["-device", f"pc-dimm,id=dimm{number},memdev=d{number}"]
    booted = boot(lab, guest_image, qemu_binary, "memfd", *dimms, words=f"qpc.memory={BASE_MIB}")
    unplug_dimm(booted, 0)
    if remade:
        # Too large for the place that it had.  Of another kind too: QEMU 10 keeps the file of a
        # memfd back-end that is gone, and takes it again for the next one of that id.
        plug_dimm(booted, 0, "anonymous", 2 * DIMM_MIB)
        booted.console.wait_passes(1)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, "memfd")
    there = {name: {**data, "hotplugged": False} for name, data in memory_devices(booted).items()}
    assert set(there) == ({"dimm0", "dimm1"} if remade else {"dimm1"})
    held = contents(booted, "dimm1", run_dir)
    assert len(patterned(snapshot, "d1")) > PAGES_PER_MIB
    booted.kill()

    guest = lab.restore(snapshot, "--paused", "--no-background")
    assert memory_devices(guest) == there
    assert contents(guest, "dimm1", run_dir) == held
    guest.ask("cont")
    goes_on_from(guest, snapshot)
    complete(guest)
    guest.console.wait_passes(1)


@pytest.mark.needs("qemu10")
def test_memory_device_that_qemu_crashes_on_is_refused_and_the_guest_lives(
    lab: Lab, run_dir: Path
) -> None:
    spec = VmSpec(
        os.environ["QPC_QEMU10"],
        memory=(lab.memory("memfd", BASE_MIB * MIB),),
        extra_arguments=(
            *("-S", "-m", f"{BASE_MIB}M,slots=4,maxmem=2G"),
            *("-object", lab.memory("memfd", 512 * MIB, "d0").option()),
            *("-device", "pc-dimm,id=dimm0,memdev=d0"),
        ),
    )
    machine = lab.launch(spec)
    refused(
        "snapshot", machine.qmp_path, run_dir / "image", status=5, words=["dimm0", "TCG", "256 MiB"]
    )
    assert machine.alive()


def test_virtio_mem_that_was_plugged_into_a_running_guest_is_refused(
    qemu_binary: Path, lab: Lab, run_dir: Path
) -> None:
    spec = VmSpec(
        str(qemu_binary),
        memory=(lab.memory("memfd", BASE_MIB * MIB),),
        extra_arguments=("-S", "-m", f"{BASE_MIB}M,slots=4,maxmem=2G"),
    )
    machine = lab.launch(spec)
    machine.ask(
        "object-add", **{"qom-type": "memory-backend-ram"}, id="v0", size=VIRTIO_MEM_MIB * MIB
    )
    machine.ask("device_add", driver="virtio-mem-pci", id="vm0", memdev="v0")
    refused("snapshot", machine.qmp_path, run_dir / "image", status=5, words=["vm0", "plugged in"])
    assert machine.alive()
