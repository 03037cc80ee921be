"""A device whose back-end maps guest memory is plugged into a guest that is still being filled."""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vm.dynamic_guest import kill_and_recover, patterned
from vm.guests import (
    INCOMING,
    MIB,
    TICK_MS,
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    goes_on_from,
    take_snapshot,
    wait_until,
)
from vm.vhost_back_end import BackEnd

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.qmp import Qmp
from qemu_postcopy.vm.spec import VmSpec

pytestmark = [pytest.mark.needs("uffd", "ptrace", "guest", "root"), pytest.mark.timeout(300)]

FILL_MIB = 48
ZERO_WORD = bytes(8)


def spec(lab: Lab, qemu: Path, guest_image: GuestImage, *extra: str) -> VmSpec:
    """A memory checker that can drive a disk that comes later."""
    return VmSpec(
        str(qemu),
        memory=(lab.memory("memfd", guest_image.ram_mib(FILL_MIB) * MIB),),
        kernel=str(guest_image.kernel),
        initrd=str(guest_image.initramfs),
        append=guest_image.kernel_command_line(
            "check", fill_mib=FILL_MIB, tick_ms=TICK_MS, modules=("virtio_pci", "virtio_blk")
        ),
        extra_arguments=("-no-reboot", *extra),
    )


MakeSnapshot = Callable[[Path], Snapshot]


@pytest.fixture
def snapshot_in(lab: Lab, guest_image: GuestImage, snapshots: SharedSnapshots) -> MakeSnapshot:
    """Of such a guest in the middle of its work, in that QEMU."""

    def snapshot_in(qemu: Path) -> Snapshot:
        def make(image: Path) -> Snapshot:
            booted = lab.launch(spec(lab, qemu, guest_image))
            wait_until(lambda: booted.console.ready, "the guest has filled its memory", 240)
            booted.console.wait_more_ticks(3)
            taken = take_snapshot(booted, image, qemu, "memfd")
            booted.kill()
            return taken

        return snapshots.once(("plugged", qemu), make)

    return snapshot_in


def plug(guest: Guest, back_end: BackEnd) -> None:
    """A vhost-user disk, as a script does it: in one go."""
    address = {"type": "unix", "data": {"path": str(back_end.path)}}

    async def talk() -> None:
        async with await Qmp.connect(guest.qmp_path) as qmp:
            await qmp.execute(
                "chardev-add",
                {
                    "id": "c0",
                    "backend": {"type": "socket", "data": {"addr": address, "server": False}},
                },
            )
            await qmp.execute(
                "device_add",
                {"driver": "vhost-user-blk-pci", "id": "d0", "chardev": "c0", "num-queues": 1},
            )

    asyncio.run(talk())


@contextmanager
def memory_of(guest: Guest, snapshot: Snapshot) -> Iterator[mmap.mmap]:
    """The guest's memory file, mapped by this process."""
    (name,) = (
        line.split()[0]
        for line in Path(f"/proc/{guest.pid}/maps").read_text().splitlines()
        if "memory-backend-memfd" in line
    )
    descriptor = os.open(f"/proc/{guest.pid}/map_files/{name}", os.O_RDWR | os.O_CLOEXEC)
    try:
        with mmap.mmap(descriptor, snapshot.ram_bytes) as memory:
            yield memory
    finally:
        os.close(descriptor)


def log_of(guest: Guest) -> str:
    return (guest.directory / "sidecar.log").read_text()


def check_looks(back_end: BackEnd, snapshot: Snapshot) -> None:
    """The back-end has never seen zeros where the guest's data is."""
    data = patterned(snapshot, "m0")
    assert len(data) > FILL_MIB // 2 * 256
    assert back_end.looks
    for look in back_end.looks:
        assert [page for page in data if look.word(page) == ZERO_WORD] == []


def test_a_device_that_shares_memory_is_kept_from_it_until_nothing_is_missing(
    qemu_binary: Path, lab: Lab, snapshot_in: MakeSnapshot, run_dir: Path
) -> None:
    snapshot = snapshot_in(qemu_binary)
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    goes_on_from(guest, snapshot)
    assert guest.status()["statistics"]["pages_data_missing"]
    with BackEnd(run_dir / "b") as back_end:
        plug(guest, back_end)
        guest.wait_sidecar_gone()
        said = guest.status()
        assert (said["state"], said["trouble"]) == ("detached", "")
        assert said["statistics"]["pages_foreign"] == 0
        assert "vhost-user-blk-pci" in log_of(guest)
        assert guest.run_state() == "running"
        wait_until(lambda: back_end.looks, "the guest starts the device")
        check_looks(back_end, snapshot)
        guest.console.wait_passes(1)


def test_whoever_takes_over_lets_the_guest_go_on_that_was_stopped_for_a_device(
    qemu: Path, lab: Lab, snapshot_in: MakeSnapshot, run_dir: Path
) -> None:
    snapshot = snapshot_in(qemu)
    slow = run_dir / "slow.toml"
    slow.write_text("seed = 1\n[delay]\nprobability = 1.0\nus = [10000, 10000]\n")
    guest = lab.restore(snapshot, "--no-background", "--chaos", slow)
    goes_on_from(guest, snapshot)
    with BackEnd(run_dir / "b") as back_end:
        plug(guest, back_end)
        wait_until(lambda: "plugged in: device d0" in guest.status()["trouble"], "it is found")
        wait_until(lambda: guest.run_state() == "paused", "the guest is stopped")
        kill_and_recover(guest)
        guest.wait_sidecar_gone()
        assert guest.run_state() == "running"
        assert guest.status()["statistics"]["pages_foreign"] == 0
        wait_until(lambda: back_end.looks, "the guest starts the device")
        check_looks(back_end, snapshot)
        guest.console.wait_passes(1)


def test_qemu_is_stopped_as_a_whole_where_it_cannot_be_asked_and_somebody_maps_the_memory(
    qemu: Path, lab: Lab, snapshot_in: MakeSnapshot, guest_image: GuestImage
) -> None:
    snapshot = snapshot_in(qemu)
    waiting = lab.launch(spec(lab, snapshot.qemu, guest_image, *INCOMING))
    guest = lab.attach(waiting, snapshot.image, "--no-background")
    goes_on_from(guest, snapshot)
    wait_until(lambda: guest.status()["vcpus"]["count"], "the monitor is free again")

    async def plug_and_stay() -> None:
        async with await Qmp.connect(guest.qmp_path) as qmp:
            data = {"out": "/dev/null"}
            backend = {"type": "file", "data": data}
            await qmp.execute("chardev-add", {"id": "c0", "backend": backend})
            await asyncio.to_thread(guest.wait_sidecar_gone)
            assert await qmp.status() == "running"

    with memory_of(guest, snapshot) as memory:
        asyncio.run(plug_and_stay())
        assert "SIGSTOP" in log_of(guest)
        data = patterned(snapshot, "m0")
        assert [page for page in data if not any(memory[page * 4096 : page * 4096 + 8])] == []
    assert guest.status()["statistics"]["pages_foreign"] == 0
    guest.console.wait_passes(1)


def test_pages_that_another_process_has_touched_are_told_as_damage_for_good(
    qemu: Path, lab: Lab, snapshot_in: MakeSnapshot
) -> None:
    snapshot = snapshot_in(qemu)
    guest = lab.restore(snapshot, "--paused", "--no-background")
    touched = sorted(patterned(snapshot, "m0"))[100:110]
    with memory_of(guest, snapshot) as memory:
        assert all(memory[page * 4096] == 0 for page in touched)
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    said = guest.status()
    assert said["state"] == "detached"
    for words in ("memory of this guest is wrong: 10 pages", f"page {touched[0]} of block m0"):
        assert words in said["trouble"]
        assert words in log_of(guest)


def test_damage_is_told_also_by_whoever_takes_over(
    qemu: Path, lab: Lab, snapshot_in: MakeSnapshot, run_dir: Path
) -> None:
    """Its own pager meets those pages as they should be: filled."""
    snapshot = snapshot_in(qemu)
    slow = run_dir / "slow.toml"
    slow.write_text("seed = 1\n[delay]\nprobability = 1.0\nus = [10000, 10000]\n")
    guest = lab.restore(snapshot, "--paused", "--no-background", "--chaos", slow)
    first = min(patterned(snapshot, "m0"))
    with memory_of(guest, snapshot) as memory:
        assert memory[first * 4096] == 0
    cli("fill", guest.name)
    words = "memory of this guest is wrong: 1 pages were touched by another process"
    wait_until(lambda: words in guest.status()["trouble"], "it is found")
    kill_and_recover(guest)
    assert words in guest.status()["trouble"]
    guest.wait_sidecar_gone()
    said = guest.status()
    assert said["state"] == "detached" and words in said["trouble"]
    assert said["statistics"]["pages_foreign"] == 0
