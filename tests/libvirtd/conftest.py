"""Hosts with libvirt: started once for all tests that want one like it, clean for each test."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from libvirtd.daemons import Host, Stack
from libvirtd.network import Link
from libvirtd.pairs import Pair, joined

from qemu_postcopy.images.guest_image import GuestImage

STACKS: dict[str, Callable[[], Stack]] = {
    "libvirt": Stack.of_machine,
    "libvirt11": lambda: Stack.unpacked(Path(os.environ["QPC_LIBVIRT11"])),
}


class Hosts:
    """The hosts of a test run, by stack and name; made at their first use."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, str], Host] = {}
        self._links: dict[tuple[str, str], Link] = {}

    def get(self, stack: str, name: str = "alpha") -> Host:
        key = (stack, name)
        if key not in self._made:
            self._made[key] = Host.start(STACKS[stack](), f"{name}-{stack}")
        return self._made[key]

    def link(self, left: Host, right: Host) -> Link:
        """The network between two of them."""
        key = (left.name, right.name)
        if key not in self._links:
            self._links[key] = Link.between(left, right)
        return self._links[key]

    def clean(self) -> list[str]:
        """Ends all domains, and says which there were."""
        return [f"{host.name}: {name}" for host in self._made.values() for name in host.clean()]

    def close(self) -> None:
        for host in self._made.values():
            host.close()
        self._made.clear()


@pytest.fixture(scope="session")
def all_hosts() -> Iterator[Hosts]:
    hosts = Hosts()
    yield hosts
    hosts.close()


@pytest.fixture
def hosts(all_hosts: Hosts) -> Iterator[Hosts]:
    """Hosts on which no domain is left when the test has ended."""
    yield all_hosts
    all_hosts.clean()


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.needs(name)) for name in STACKS],
)
def host(request: pytest.FixtureRequest, hosts: Hosts) -> Host:
    """One host of each libvirt that the machine has."""
    return hosts.get(request.param)


@pytest.fixture
def hooked(host: Host) -> Iterator[Host]:
    """A host with the hook; it had none before."""
    done = json.loads(host.tool("libvirt", "install-hooks", "--json").stdout)
    if done["restart"] and not (host.directory / "hooks-seen").exists():
        host.restart_daemon("libvirtd")
        (host.directory / "hooks-seen").touch()
    yield host
    host.clean()
    host.tool("libvirt", "install-hooks", "--remove")


@pytest.fixture
def huge_pages(
    host: Host, shared_guest: GuestImage, reserve_huge_pages: Callable[[int], None]
) -> Iterator[None]:
    """libvirtd knows where huge pages are; it looks when it starts."""
    reserve_huge_pages((shared_guest.ram_mib(16) + 16) << 20)
    host.run("mkdir", "-p", "/dev/hugepages")
    host.run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "hugetlbfs", "/dev/hugepages")
    host.restart_daemon("libvirtd")
    yield
    host.clean()
    host.run("umount", "/dev/hugepages")
    host.restart_daemon("libvirtd")


@pytest.fixture(scope="session")
def shared_guest(guest_image: GuestImage) -> Iterator[GuestImage]:
    """The test guest where libvirt's QEMU, a user of its own, can read it."""
    directory = Path(tempfile.mkdtemp(prefix="qpcg-"))
    directory.chmod(0o755)
    copies = [shutil.copy(path, directory) for path in (guest_image.kernel, guest_image.initramfs)]
    for copy in copies:
        copy_path = Path(copy)
        copy_path.chmod(0o644)
    kernel, initramfs = map(Path, copies)
    yield dataclasses.replace(guest_image, kernel=kernel, initramfs=initramfs)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def shared_dir(run_dir: Path) -> Path:
    """The test's own directory, which libvirt's QEMU may enter."""
    run_dir.chmod(0o755)
    path = run_dir / "shared"
    path.mkdir()
    path.chmod(0o777)
    return path


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.needs(name)) for name in STACKS])
def pair(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[Pair]:
    with joined(hosts, request.param) as made:
        yield made


@pytest.fixture(params=[pytest.param("libvirt11", marks=pytest.mark.needs("libvirt11"))])
def new_pair(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[Pair]:
    """Of the newer libvirt only."""
    with joined(hosts, request.param) as made:
        yield made


@pytest.fixture(params=[pytest.param("libvirt", marks=pytest.mark.needs("libvirt"))])
def old_pair(request: pytest.FixtureRequest, hosts: Hosts) -> Iterator[Pair]:
    """Of the libvirt whose daemon survives a resume."""
    with joined(hosts, request.param) as made:
        yield made
