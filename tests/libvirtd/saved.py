"""Domains that virsh has saved, and their lazy restores by the tool, as the operator runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from libvirtd.daemons import Host
from libvirtd.domains import Domain, start_domain
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

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


def save_in_format(host: Host, name: str, path: Path) -> None:
    """By virsh; before 11 the format is said in libvirtd's configuration."""
    if host.stack.name != "libvirt":
        host.virsh("save", "guest", path, "--image-format", name)
        return
    configuration = host.directory / "etc/qemu.conf"
    before = configuration.read_text()
    configuration.write_text(f'{before}\nsave_image_format = "{name}"\n')
    host.restart_daemon("libvirtd")
    host.virsh("save", "guest", path)
    configuration.write_text(before)


def restore(host: Host, path: Path, *options: object) -> dict[str, Any]:
    """By the tool, on the host."""
    said = host.tool("restore", "--connect", "qemu:///system", "--json", *options, path)
    result = json.loads(said.stdout)
    assert isinstance(result, dict)
    return result


def sidecars(host: Host) -> list[int]:
    """The tool's processes on the host."""
    return host.processes(program=f"{sys.executable}\0-m\0qemu_postcopy")


def wait_detached(host: Host, name: str) -> None:
    def detached() -> bool:
        (entry,) = json.loads(host.tool("status", "--json", name).stdout)
        return bool(entry["state"] == "detached")

    wait_until(detached, f"{name} has all of its memory")
    wait_until(lambda: sidecars(host) == [], "the sidecar has ended")


def left_beside(path: Path) -> list[Path]:
    """What the tool has made in that directory and not taken away."""
    return sorted(path.glob(".*.qpc*"))


def run_directories(host: Host) -> list[str]:
    """Of the guests that root's tool has on the host."""
    return sorted(path.name for path in (host.directory / "run/qemu-postcopy").glob("*"))
