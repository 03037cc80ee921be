"""Domains that virsh has saved are restored lazily, and are ordinary domains afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import Domain, start_domain
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")

MEMFD = "<source type='memfd'/><access mode='shared'/>"


def saved_domain(
    host: Host, image: GuestImage, directory: Path, name: str = "guest", **choices: object
) -> tuple[Domain, Path]:
    """A domain in the middle of its work, saved by virsh."""
    domain = start_domain(host, image, directory, name, **choices)
    domain.wait_ready()
    path = directory / f"{name}.save"
    host.virsh("save", name, path)
    return domain, path


def restore(host: Host, path: Path, *options: object) -> dict[str, Any]:
    """By the tool, on the host."""
    said = host.tool("restore", "--connect", "qemu:///system", "--json", *options, path)
    result = json.loads(said.stdout)
    assert isinstance(result, dict)
    return result


def run_directories(host: Host) -> Path:
    return host.directory / "run/qemu-postcopy"


def wait_detached(host: Host, name: str) -> None:
    def detached() -> bool:
        (entry,) = json.loads(host.tool("status", "--json", name).stdout)
        return bool(entry["state"] == "detached")

    wait_until(detached, f"{name} has all of its memory")


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
def test_a_saved_domain_is_restored_lazily_saved_again_and_ended(
    host: Host, shared_guest: GuestImage, shared_dir: Path, backing: str
) -> None:
    domain, path = saved_domain(
        host, shared_guest, shared_dir, memory_backing=MEMFD if backing == "memfd" else ""
    )
    xml = host.virsh("save-image-dumpxml", path)
    content = path.read_bytes()
    restore(host, path, "--wait", "running")
    assert domain.state() == "running"
    domain.console.wait_more_ticks(3)
    wait_detached(host, "guest")
    domain.console.wait_passes(2)

    assert path.read_bytes() == content
    assert list(shared_dir.glob(".*.qpc*")) == []
    again = shared_dir / "again"
    host.virsh("save", "guest", again)
    assert host.virsh("save-image-dumpxml", again) == xml
    host.virsh("restore", again)
    domain.console.wait_passes(2)
    host.virsh("destroy", "guest")
    assert host.qemus() == []
    assert host.processes(program="/usr/bin/python") == []


def test_a_domain_still_being_filled_is_saved_whole(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir, memory_backing=MEMFD)
    restore(host, path, "--no-background")
    domain.console.wait_more_ticks(2)
    again = shared_dir / "again"
    host.virsh("save", "guest", again)
    host.virsh("restore", again)
    domain.console.wait_passes(2)
