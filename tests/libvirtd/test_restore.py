"""Domains that virsh has saved are restored lazily, and are ordinary domains afterwards."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import start_domain
from libvirtd.saved import (
    MEMFD,
    left_beside,
    restore,
    run_directories,
    save_in_format,
    saved_domain,
    sidecars,
    wait_detached,
)
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")

#: Raw is what the other tests save in.
FORMATS = {
    "libvirt": ("gzip", "lzop"),
    "libvirt11": ("zstd", "sparse"),
}
#: These two take libvirt a minute.
SLOW_FORMATS = ("bzip2", "xz")


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
def test_a_saved_domain_is_restored_lazily_saved_again_and_ended(
    host: Host, shared_guest: GuestImage, shared_dir: Path, backing: str
) -> None:
    domain, path = saved_domain(
        host, shared_guest, shared_dir, memory_backing=MEMFD if backing == "memfd" else ""
    )
    xml = host.virsh("save-image-dumpxml", path)
    content = path.read_bytes()
    restore(host, path)
    assert domain.state() == "running"
    domain.console.wait_more_ticks(3)
    wait_detached(host, "guest")
    domain.console.wait_passes(1)

    assert path.read_bytes() == content
    assert left_beside(shared_dir) == []
    again = shared_dir / "again"
    host.virsh("save", "guest", again)
    assert host.virsh("save-image-dumpxml", again) == xml
    host.virsh("restore", again)
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    assert host.qemus() == []
    assert sidecars(host) == []


def test_a_domain_still_being_filled_is_saved_whole_and_its_end_is_that_of_the_sidecar(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir, memory_backing=MEMFD)
    restore(host, path, "--no-background")
    domain.console.wait_more_ticks(2)
    assert sidecars(host) != []
    again = shared_dir / "again"
    host.virsh("save", "guest", again)
    wait_until(lambda: sidecars(host) == [], "the sidecar has ended")
    assert left_beside(shared_dir) == []
    restore(host, again, "--no-background")
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    wait_until(lambda: sidecars(host) == [], "the sidecar has ended")
    assert (left_beside(shared_dir), run_directories(host)) == ([], [])


@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_every_format_that_virsh_saves_in_is_restored_lazily(
    host: Host, shared_guest: GuestImage, shared_dir: Path, slow: bool
) -> None:
    domain = start_domain(host, shared_guest, shared_dir, fill_mib=8)
    domain.wait_ready()
    path = shared_dir / "saved"
    for name in SLOW_FORMATS if slow else FORMATS[host.stack.name]:
        save_in_format(host, name, path)
        result = restore(host, path, "--wait", "complete")
        assert result["statistics"]["pages_data_missing"] == 0
        domain.console.wait_passes(1)
        path.unlink()


def test_a_domain_saved_paused_stays_so_and_can_be_told_otherwise(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(host, shared_guest, shared_dir, fill_mib=8)
    domain.wait_ready()
    host.virsh("suspend", "guest")
    path = shared_dir / "saved"
    host.virsh("save", "guest", path)
    image = shared_dir / "kept.qpc"
    restore(host, path, "--keep-image", image)
    assert domain.state() == "paused"
    host.virsh("resume", "guest")
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    # The image that was kept is restored without a conversion, and by nobody else.
    path.unlink()
    restore(host, image, "--running")
    assert domain.state() == "running"
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    host.virsh("restore", image / "state.bin", status=1)
    assert host.qemus() == []


def test_a_snapshot_of_a_running_domain_is_restored_and_the_domain_goes_on(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(host, shared_guest, shared_dir, memory_backing="")
    domain.wait_ready()
    image = shared_dir / "guest.qpc"
    host.tool("snapshot", "--connect", "qemu:///system", "guest", image)
    assert domain.state() == "running"
    domain.console.wait_passes(1)
    host.tool("snapshot", "--connect", "qemu:///system", "--then", "quit", "guest", image, status=2)
    assert domain.state() == "running"
    host.virsh("destroy", "guest")
    restore(host, image)
    assert domain.state() == "running"
    domain.console.wait_passes(1)


@pytest.mark.parametrize("stage", ["filling", "restarted"])
def test_a_sidecar_or_a_libvirtd_that_is_killed_costs_nothing(
    host: Host, shared_guest: GuestImage, shared_dir: Path, stage: str
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir)
    result = restore(host, path, "--no-background")
    if stage == "restarted":
        host.restart_daemon("libvirtd", signal.SIGKILL)
        domain.console.wait_passes(1)
        assert domain.state() == "running"
    for pid in sidecars(host):
        os.kill(pid, signal.SIGKILL)
    host.tool("recover", result["name"])
    domain.console.wait_passes(1)
    host.tool("fill", "guest")
    wait_detached(host, "guest")
    assert left_beside(shared_dir) == []
    domain.console.wait_passes(1)
    assert domain.state() == "running"


def test_what_libvirt_refuses_is_told_and_leaves_nothing(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir, fill_mib=8)
    content = path.read_bytes()
    host.virsh("restore", path)
    domain.console.wait_more_ticks(1)
    said = host.tool("restore", "--connect", "qemu:///system", path, status=14).stderr
    assert "already" in said
    assert domain.state() == "running"
    host.virsh("destroy", "guest")
    # A stream that is cut short or damaged never becomes a guest.
    path.write_bytes(content[: len(content) // 2])
    host.tool("restore", "--connect", "qemu:///system", path, status=4)
    assert host.qemus() == [] and sidecars(host) == []
    assert left_beside(shared_dir) == []
