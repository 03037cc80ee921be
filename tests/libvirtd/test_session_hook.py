"""The hook serves the domains of users' own libvirtds too, as that user; where it may, that is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from libvirtd.by_hook import NAMESPACE, ON_DEMAND, sidecars
from libvirtd.daemons import OPERATOR, OPERATOR_ID, Host
from libvirtd.domains import domain_xml
from vm.guests import GuestConsole, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")


def virsh(host: Host, *words: object) -> str:
    return host.run("virsh", "-q", "-c", "qemu:///session", *words, user=OPERATOR).stdout


def session_daemons(host: Host) -> list[int]:
    """libvirtd looks for hooks when it starts; a user's is started by its first client."""
    found = []
    for pid in host.processes("/usr/sbin/libvirtd"):
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}").stat().st_uid == OPERATOR_ID:
                found.append(pid)
    return found


@pytest.fixture
def own(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path
) -> Iterator[tuple[GuestConsole, Path]]:
    """A domain of the operator's that asks for lazy restores, saved in the middle of its work."""
    host = hooked
    for pid in session_daemons(host):
        os.kill(pid, signal.SIGTERM)
    wait_until(lambda: session_daemons(host) == [], "the session's libvirtd has ended")
    console = GuestConsole(shared_dir / "own.console")
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(domain_xml("own", shared_guest, console.path, fill_mib=16))
        file.flush()
        Path(file.name).chmod(0o644)
        virsh(host, "create", file.name)
    wait_until(lambda: console.ready, "it has filled its memory")
    console.wait_more_ticks(3)
    virsh(host, "metadata", "own", "--uri", NAMESPACE, "--key", "postcopy", "--set", ON_DEMAND)
    path = shared_dir / "own.save"
    virsh(host, "save", "own", path)
    yield console, path
    for name in virsh(host, "list", "--name").split():
        virsh(host, "destroy", name)
    wait_until(lambda: sidecars(host) == [], "the sidecars have ended")


def test_a_users_domain_is_restored_lazily_by_plain_virsh(
    hooked: Host, own: tuple[GuestConsole, Path]
) -> None:
    host, (console, path) = hooked, own
    host.run("chown", str(OPERATOR_ID), "/dev/userfaultfd")  # as a udev rule has it
    try:
        virsh(host, "restore", path)
        console.wait_passes(1)

        def states() -> list[tuple[str, str]]:
            listed = json.loads(host.tool("list", "--json", user=OPERATOR).stdout)
            return [(entry["domain"], entry["state"]) for entry in listed]

        wait_until(lambda: states() == [("own", "running")], "it is served")
        for pid in sidecars(host):
            assert f"Uid:\t{OPERATOR_ID}\t" in Path(f"/proc/{pid}/status").read_text()
        virsh(host, "save", "own", path.with_name("again"))
        wait_until(lambda: sidecars(host) == [], "the sidecars have ended")
        virsh(host, "restore", path.with_name("again"))
        console.wait_passes(1)
    finally:
        host.run("chown", "0", "/dev/userfaultfd")


@pytest.mark.soak
def test_a_user_who_may_have_no_userfaultfd_gets_the_domain_eagerly(
    hooked: Host, own: tuple[GuestConsole, Path]
) -> None:
    host, (console, path) = hooked, own
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
    before = setting.read_text()
    setting.write_text("0")
    try:
        virsh(host, "restore", path)
    finally:
        setting.write_text(before)
    console.wait_passes(1)
    assert json.loads(host.tool("list", "--json", user=OPERATOR).stdout) == []
    assert sidecars(host) == []
