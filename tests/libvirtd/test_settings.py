"""A domain's settings are kept in its XML, by libvirt, and are read back as they were written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import domain_xml

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "root")


def test_settings_of_a_domain_are_set_shown_and_removed(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    text = shared_dir / "guest.xml"
    text.write_text(domain_xml("guest", shared_guest, shared_dir / "console", fill_mib=8))
    host.virsh("define", text)
    host.virsh("start", "guest")

    host.tool("libvirt", "set", "guest", "--rate", "2M", "--supervise")
    found = json.loads(host.tool("libvirt", "show", "--json", "guest").stdout)
    assert found["live"] == found["config"]
    assert found["live"] == {
        "restore": "lazy",
        "fill": True,
        "rate": 2 << 20,
        "supervise": True,
        "postcopy_passes": 0,
    }
    host.tool("libvirt", "set", "guest", "--restore", "eager")
    assert "eager" in host.tool("libvirt", "show", "guest").stdout
    for inactive in ((), ("--inactive",)):
        assert 'sidecar restore="eager"' in host.virsh("dumpxml", *inactive, "guest")
    host.virsh("destroy", "guest")
    assert "eager" in host.tool("libvirt", "show", "guest").stdout

    # What was saved before keeps what it was saved with.
    host.virsh("start", "guest")
    host.virsh("managedsave", "guest")
    assert "managedsave-edit guest" in host.tool("libvirt", "set", "guest").stderr
    assert "eager" in host.virsh("managedsave-dumpxml", "guest")
    host.virsh("managedsave-remove", "guest")
    assert host.tool("libvirt", "set", "guest", "--restore", "eager").stderr == ""

    host.tool("libvirt", "unset", "guest")
    assert "http://qemu-postcopy" not in host.virsh("dumpxml", "guest")
    assert "nothing is set" in host.tool("libvirt", "show", "guest").stdout
    wrong = '<paging><background rate="much"/></paging>'
    uri = "http://qemu-postcopy/xmlns/domain/1.0"
    host.virsh("metadata", "guest", "--uri", uri, "--key", "postcopy", "--set", wrong)
    said = host.tool("libvirt", "show", "guest", status=2).stderr
    assert "not as it must be" in said
