"""What the versions of libvirt differ in, as the README's table says; asked of each."""

from __future__ import annotations

from pathlib import Path

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import start_domain

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "root")

#: by stack: may QEMU's private /dev have the device; virsh save --image-format; the sparse format
TABLE = {"libvirt": (False, False, False), "libvirt11": (True, True, True)}


def test_the_table_of_versions_is_true(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    start_domain(host, shared_guest, shared_dir, fill_mib=8)
    (qemu,) = host.qemus()
    device = Path(f"/proc/{qemu}/root/dev/userfaultfd").exists()
    formats = host.run("virsh", "help", "save").stdout
    expected = TABLE[host.stack.name]
    assert (device, "--image-format" in formats) == expected[:2]
    path = shared_dir / "saved"
    status = 0 if expected[2] else 1
    host.virsh("save", "guest", path, "--image-format", "sparse", status=status)
    assert path.exists() == expected[2]
