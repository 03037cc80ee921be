"""What the versions of libvirt differ in, as the README's table says; asked of each, and the doctor
says what is the case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import start_domain

from qemu_postcopy.doctor.libvirt_support import TESTED
from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "root")

#: by stack: may QEMU's private /dev have the device; virsh save --image-format; the sparse format
TABLE = {"libvirt": (False, False, False), "libvirt11": (True, True, True)}

#: The doctor's names for them.
PAIRS = dict(zip(TABLE, TESTED, strict=True))


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
    # The doctor, which starts no domain, says the same.
    report = json.loads(host.tool("doctor", "--json").stdout)
    told = {one["id"]: one["data"] for one in report["findings"] if "tested" in one["data"]}
    here = {name: data["here"] for name, data in told.items()}
    assert here["libvirt.private_dev"] == device
    assert here["libvirt.sparse_save"] == path.exists()
    assert here["libvirt.postcopy_resume"] == (host.stack.name == "libvirt")
    pair = PAIRS[host.stack.name]
    for name in ("private_dev", "sparse_save", "postcopy_preempt"):
        data = told[f"libvirt.{name}"]
        assert data["tested"][pair] == ("yes" if data["here"] else "no"), name
