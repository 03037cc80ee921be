"""A domain that was restored lazily moves by virsh migrate, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from libvirtd.conftest import STACKS, Hosts
from libvirtd.domains import start_domain
from libvirtd.saved import (
    MEMFD,
    left_beside,
    restore,
    run_directories,
    saved_domain,
    sidecars,
    wait_detached,
)
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")


@pytest.mark.parametrize("stack", [pytest.param(s, marks=pytest.mark.needs(s)) for s in STACKS])
@pytest.mark.parametrize("filled", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_restored_domain_moves_to_another_host(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path, stack: str, filled: bool
) -> None:
    source, target = hosts.get(stack), hosts.get(stack, "beta")
    hosts.link(source, target)
    domain, path = saved_domain(source, shared_guest, shared_dir, fill_mib=16, memory_backing=MEMFD)
    restore(source, path, *(() if filled else ("--no-background",)))
    domain.console.wait_more_ticks(2)
    if filled:
        wait_detached(source, "guest")
    else:
        assert sidecars(source) != []
    # Pre-copy of a running guest under TCG loses writes in QEMU 7.2, whoever asks for it.
    source.virsh("migrate", *(["--live"] if stack == "libvirt11" else []), "guest", target.uri)
    assert (source.domains(), target.domains()) == ([], ["guest"])
    wait_until(lambda: sidecars(source) == [], "the sidecar has ended")
    domain.console.wait_passes(1)
    assert left_beside(shared_dir) == []
    # Migration has read all of its memory: whether the sidecar was done before QEMU ended is open.
    assert run_directories(source) in ([], ["guest"])
    # And back again, lazily: a domain like any other there.
    target.virsh("save", "guest", shared_dir / "there")
    restore(target, shared_dir / "there", "--no-background")
    domain.console.wait_passes(1)
    target.virsh("destroy", "guest")
    wait_until(lambda: sidecars(target) == [], "the sidecar has ended")
    assert (target.qemus(), left_beside(shared_dir)) == ([], [])


@pytest.mark.soak
@pytest.mark.needs("libvirt", "libvirt11")
def test_a_domain_goes_on_in_a_newer_qemu_under_a_newer_libvirt(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path
) -> None:
    older, newer = hosts.get("libvirt"), hosts.get("libvirt11")
    domain = start_domain(older, shared_guest, shared_dir, fill_mib=32, memory_backing=MEMFD)
    domain.wait_ready()
    versions = [host.virsh("version") for host in (older, newer)]
    assert ("QEMU 7.2" in versions[0], "QEMU 10.0" in versions[1]) == (True, True)
    image, path = shared_dir / "guest.qpc", shared_dir / "guest.save"
    older.tool("snapshot", "--connect", "qemu:///system", "--then", "quit", "guest", image)
    wait_until(lambda: older.qemus() == [], "its QEMU has ended")
    restore(newer, image, "--no-background")
    domain.console.wait_passes(1)
    assert sidecars(newer) != []
    newer.tool("fill", "guest")
    wait_detached(newer, "guest")
    domain.console.wait_passes(1)
    newer.virsh("destroy", "guest")

    # By what virsh itself wrote, and an older QEMU again takes what a newer one has not yet seen.
    restore(older, image)
    domain.console.wait_passes(1)
    older.virsh("save", "guest", path)
    wait_until(lambda: sidecars(older) == [], "the sidecar has ended")
    restore(newer, path)
    wait_detached(newer, "guest")
    domain.console.wait_passes(1)
    newer.virsh("destroy", "guest")
    assert left_beside(shared_dir) == []
