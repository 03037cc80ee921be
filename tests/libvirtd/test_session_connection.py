"""Domains of a user's own libvirtd are restored lazily by that user, with the rights it takes."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from libvirtd.daemons import OPERATOR, OPERATOR_ID, Host
from libvirtd.domains import domain_xml
from libvirtd.saved import MEMFD, left_beside, sidecars
from vm.guests import GuestConsole, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")

URI = "qemu:///session"


def virsh(host: Host, *words: object) -> str:
    return host.run("virsh", "-q", "-c", URI, *words, user=OPERATOR).stdout


@pytest.fixture
def device(host: Host) -> Iterator[None]:
    """The operator may open /dev/userfaultfd, as an administrator's udev rule has it."""
    host.run("chown", str(OPERATOR_ID), "/dev/userfaultfd")
    yield
    host.run("chown", "0", "/dev/userfaultfd")


@pytest.fixture
def saved(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> Iterator[tuple[GuestConsole, Path]]:
    """A domain of the operator's, saved in the middle of its work."""
    console = shared_dir / "own.console"
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(domain_xml("own", shared_guest, console, fill_mib=16, memory_backing=MEMFD))
        file.flush()
        Path(file.name).chmod(0o644)
        virsh(host, "create", file.name)
    speaks = GuestConsole(console)
    wait_until(lambda: speaks.ready, "it has filled its memory")
    speaks.wait_more_ticks(3)
    path = shared_dir / "own.save"
    virsh(host, "save", "own", path)
    yield speaks, path
    for name in virsh(host, "list", "--name").split():
        virsh(host, "destroy", name)


@pytest.mark.usefixtures("device")
def test_a_user_restores_a_domain_of_its_own_and_takes_over_from_a_killed_sidecar(
    host: Host, saved: tuple[GuestConsole, Path]
) -> None:
    console, path = saved
    said = host.tool(
        "restore", "--connect", URI, "--json", "--no-background", path, user=OPERATOR
    ).stdout
    result = json.loads(said)
    console.wait_more_ticks(2)
    for pid in sidecars(host):
        # The process is the user's, and has no right that the user has not.
        status = Path(f"/proc/{pid}/status").read_text()
        assert f"Uid:\t{OPERATOR_ID}\t" in status
        assert "CapEff:\t0000000000000000" in status
        host.run("kill", "-9", str(pid_inside(pid)))
    host.tool("recover", result["name"], user=OPERATOR)
    console.wait_passes(1)
    host.tool("fill", result["name"], user=OPERATOR)
    wait_until(lambda: sidecars(host) == [], "it has all of its memory")
    console.wait_passes(1)
    assert left_beside(path.parent) == []
    virsh(host, "save", "own", path.with_name("again"))
    virsh(host, "restore", path.with_name("again"))
    console.wait_passes(1)


def pid_inside(pid: int) -> int:
    """As the host itself counts (NSpid in proc_pid_status(5))."""
    line = next(
        line
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("NSpid:")
    )
    return int(line.split()[-1])


@pytest.fixture
def nobody_without_rights() -> Iterator[None]:
    """A machine on which not everybody may have a userfaultfd, as it is by default."""
    setting = Path("/proc/sys/vm/unprivileged_userfaultfd")
    before = setting.read_text()
    setting.write_text("0")
    yield
    setting.write_text(before)


@pytest.mark.usefixtures("nobody_without_rights")
def test_the_right_that_a_user_lacks_is_named_and_the_save_file_stays(
    host: Host, saved: tuple[GuestConsole, Path]
) -> None:
    console, path = saved
    content = path.read_bytes()
    said = host.tool("restore", "--connect", URI, path, user=OPERATOR, status=6).stderr
    assert "let this user open /dev/userfaultfd" in said
    assert (virsh(host, "list", "--all", "--name").split(), sidecars(host)) == ([], [])
    assert left_beside(path.parent) == [] and path.read_bytes() == content
    virsh(host, "restore", path)
    console.wait_passes(1)
