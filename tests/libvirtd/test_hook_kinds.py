"""Whatever virsh writes, and whatever the domain's memory is, the hook restores it lazily."""

from __future__ import annotations

from pathlib import Path

import pytest
from libvirtd.by_hook import ON_DEMAND, ask, entries, require_nothing_left, started, states
from libvirtd.daemons import Host
from libvirtd.saved import MEMFD, save_in_format
from vm.guests import wait_until

from qemu_postcopy.image.libvirt_save import read_save_header
from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")

#: What qemu.conf's save_image_format may say, by stack.
PACKED = {
    "libvirt": ("gzip", "bzip2", "xz", "lzop"),
    "libvirt11": ("gzip", "bzip2", "xz", "lzop", "zstd"),
}
FILE = "<source type='file'/><access mode='shared'/>"


@pytest.mark.soak
def test_packed_save_files_are_restored_lazily(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    host = hooked
    domain = started(host, shared_guest, shared_dir, fill_mib=16)
    ask(host, "guest", ON_DEMAND)
    for name in PACKED[host.stack.name]:
        path = shared_dir / f"guest.{name}"
        save_in_format(host, name, path)
        with path.open("rb") as file:
            assert read_save_header(file.fileno()).format == name
        content = path.read_bytes()
        host.virsh("restore", path)
        domain.console.wait_passes(1)
        # libvirt lets the guest run, and its sidecar hears of that from it.
        wait_until(lambda: states(host) == [("guest", "running")], f"{name}: it is served")
        assert path.read_bytes() == content
    host.virsh("destroy", "guest")
    require_nothing_left(host, shared_dir)
    host.restart_daemon("libvirtd")  # with the configuration that it had


def cells(image: GuestImage, fill_mib: int, count: int) -> str:
    size = image.ram_mib(fill_mib) // count
    assert size * count == image.ram_mib(fill_mib)
    each = (f"<cell id='{n}' cpus='{n}' memory='{size}' unit='MiB'/>" for n in range(count))
    return f"<numa>{''.join(each)}</numa>"


@pytest.mark.parametrize(
    "backing",
    [
        "memfd",
        pytest.param("anonymous", marks=pytest.mark.soak),
        pytest.param("file", marks=pytest.mark.soak),
        pytest.param("huge pages", marks=[pytest.mark.soak, pytest.mark.needs("hugetlb")]),
    ],
)
def test_cells_of_one_size_are_told_apart(
    hooked: Host,
    shared_guest: GuestImage,
    shared_dir: Path,
    backing: str,
    request: pytest.FixtureRequest,
) -> None:
    host = hooked
    if backing == "huge pages":
        request.getfixturevalue("huge_pages")
    if backing == "file":
        host.run("mount", "-t", "tmpfs", "tmpfs", "/var/lib/libvirt/qemu/ram")
    try:
        kinds = {"memfd": MEMFD, "anonymous": "", "file": FILE, "huge pages": "<hugepages/>"}
        domain = started(
            host, shared_guest, shared_dir, fill_mib=16, vcpus=2,
            cells=cells(shared_guest, 16, 2), memory_backing=kinds[backing],
        )  # fmt: skip
        ask(host, "guest", ON_DEMAND)
        path = shared_dir / "guest.save"
        host.virsh("save", "guest", path)
        host.virsh("restore", path)
        domain.console.wait_passes(1)
        wait_until(lambda: states(host) == [("guest", "running")], "it is served")
        host.tool("fill", entries(host)[0]["name"])
        wait_until(lambda: entries(host)[0]["state"] == "detached", "all of it is there")
        domain.console.wait_more_ticks(2)
        host.virsh("destroy", "guest")
        require_nothing_left(host, shared_dir)
    finally:
        if backing == "file":
            host.run("umount", "-l", "/var/lib/libvirt/qemu/ram")
