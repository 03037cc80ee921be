"""Whatever libvirt makes a domain's memory of is saved by virsh and restored lazily, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import start_domain
from libvirtd.saved import left_beside, restore, sidecars, wait_detached

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("guest", "uffd", "ptrace", "root"), pytest.mark.soak]

HUGE = "<hugepages/>"
FILE = "<source type='file'/><access mode='shared'/>"
PRIVATE_MEMFD = "<source type='memfd'/><access mode='private'/><allocation mode='immediate'/>"


def save_and_restore(host: Host, image: GuestImage, directory: Path, **choices: Any) -> None:
    domain = start_domain(host, image, directory, fill_mib=16, **choices)
    domain.wait_ready()
    path = directory / "saved"
    host.virsh("save", "guest", path)
    restore(host, path)
    domain.console.wait_passes(1)
    wait_detached(host, "guest")
    domain.console.wait_passes(1)
    host.virsh("save", "guest", path)
    host.virsh("restore", path)
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    assert (sidecars(host), left_beside(directory)) == ([], [])


@pytest.mark.needs("hugetlb")
@pytest.mark.usefixtures("huge_pages")
def test_huge_pages(host: Host, shared_guest: GuestImage, shared_dir: Path) -> None:
    save_and_restore(host, shared_guest, shared_dir, memory_backing=HUGE)


def test_two_cells_with_memory_of_their_own(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    half = shared_guest.ram_mib(16) // 2
    cells = "".join(
        f"<cell id='{number}' cpus='{number}' memory='{half}' unit='MiB'/>" for number in (0, 1)
    )
    save_and_restore(host, shared_guest, shared_dir, vcpus=2, cells=f"<numa>{cells}</numa>")


def test_a_private_memory_file_that_is_filled_at_once(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    save_and_restore(host, shared_guest, shared_dir, memory_backing=PRIVATE_MEMFD)


def test_files_work_on_tmpfs_and_are_refused_on_a_disk(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(host, shared_guest, shared_dir, fill_mib=16, memory_backing=FILE)
    domain.wait_ready()
    path = shared_dir / "saved"
    host.virsh("save", "guest", path)
    content = path.read_bytes()
    said = host.tool("restore", "--connect", "qemu:///system", path, status=6).stderr
    assert "only memory on tmpfs" in said
    assert (host.qemus(), sidecars(host), left_beside(shared_dir)) == ([], [], [])
    assert path.read_bytes() == content
    host.run("mount", "-t", "tmpfs", "tmpfs", "/var/lib/libvirt/qemu/ram")
    try:
        restore(host, path)
        domain.console.wait_passes(1)
        host.virsh("destroy", "guest")
    finally:
        host.run("umount", "-l", "/var/lib/libvirt/qemu/ram")
