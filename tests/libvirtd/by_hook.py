"""Domains that ask the hook for something, and what plain virsh and the hook leave on a host."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from libvirtd.daemons import Host
from libvirtd.domains import Domain, start_domain
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

ASKS = '<paging><sidecar restore="lazy"/></paging>'
#: ... and is filled by nobody but itself, so that a test finds its sidecar at work.
ON_DEMAND = '<paging><background fill="no"/></paging>'
NAMESPACE = "http://qemu-postcopy/xmlns/domain/1.0"


def sidecars(host: Host) -> list[int]:
    return host.processes(program=f"{sys.executable}\0-P\0-m\0qemu_postcopy")


def run_directories(host: Host) -> list[str]:
    base = host.directory / "run/qemu-postcopy"
    return [path.name for path in base.iterdir()] if base.is_dir() else []


def ask(host: Host, name: str, text: str = ASKS) -> None:
    """By virsh, as an operator does without our tool."""
    host.virsh("metadata", name, "--uri", NAMESPACE, "--key", "postcopy", "--set", text)


def entries(host: Host) -> list[dict[str, object]]:
    found = json.loads(host.tool("list", "--json").stdout)
    assert isinstance(found, list)
    return found


def states(host: Host) -> list[tuple[object, object]]:
    """Domain and state of each."""
    return [(entry["domain"], entry["state"]) for entry in entries(host)]


def require_nothing_left(host: Host, directory: Path) -> None:
    wait_until(lambda: sidecars(host) == [], "the sidecars have ended")
    assert host.qemus() == []
    assert run_directories(host) == []
    assert list((host.directory / "run/qemu-postcopy-hook").iterdir()) == []
    assert [path.name for path in directory.glob(".*")] == []


def started(host: Host, image: GuestImage, directory: Path, **choices: object) -> Domain:
    domain = start_domain(host, image, directory, "guest", **choices)
    domain.wait_ready()
    return domain
