"""Save files are served in place: not converted, and nothing is lost whoever comes for the file.

Saved by virsh, raw and sparse.  The file is the operator's: it may be removed, replaced, saved to
again while a guest lacks pages that are in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from libvirtd import by_hook
from libvirtd.by_hook import ON_DEMAND, ask
from libvirtd.conftest import Hosts
from libvirtd.daemons import Host
from libvirtd.domains import Domain, start_domain
from libvirtd.saved import (
    left_beside,
    run_directories,
    saved_domain,
    sidecars,
    wait_detached,
)
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")

IN_PLACE = ("--in-place", "--no-background")


def served_in_place(host: Host, path: Path) -> None:
    """Restores the file; what stands beside it then is small, and the file has a second name."""
    said = host.tool("restore", "--connect", "qemu:///system", *IN_PLACE, path)
    assert "converting" not in said.stderr
    assert path.stat().st_nlink == 2
    (beside,) = left_beside(path.parent)
    own = sum(entry.stat().st_size for entry in beside.rglob("*") if entry.name != "saved")
    assert own < path.stat().st_size // 2


def kill_sidecars(host: Host) -> None:
    """Also those that the hook has started."""
    for pid in sidecars(host) + by_hook.sidecars(host):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: sidecars(host) + by_hook.sidecars(host) == [], "the sidecar is dead")


def end(host: Host, domain: Domain) -> None:
    host.virsh("destroy", domain.name)
    wait_until(lambda: sidecars(host) == [], "the sidecar has ended")


@pytest.mark.parametrize(
    ("stack", "form"),
    [
        pytest.param("libvirt", "raw", marks=pytest.mark.needs("libvirt")),
        pytest.param("libvirt11", "sparse", marks=pytest.mark.needs("libvirt11")),
        pytest.param("libvirt11", "raw", marks=[pytest.mark.needs("libvirt11"), pytest.mark.soak]),
    ],
)
def test_a_save_file_is_served_in_place_and_a_domain_may_be_saved_to_it_meanwhile(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path, stack: str, form: str
) -> None:
    host = hosts.get(stack)
    domain = start_domain(host, shared_guest, shared_dir, fill_mib=16)
    domain.wait_ready()
    path = shared_dir / "guest.save"
    host.virsh("save", "guest", path, *(("--image-format", form) if form != "raw" else ()))
    content = path.read_bytes()
    served_in_place(host, path)
    assert domain.state() == "running"
    (entry,) = json.loads(host.tool("status", "--json", "guest").stdout)
    assert entry["image"] == str(path)
    (listed,) = json.loads(host.tool("list", "--json").stdout)
    assert listed["image"] == str(path)
    kill_sidecars(host)
    host.tool("recover", "guest")
    domain.console.wait_passes(1)
    host.tool("fill", "guest")
    wait_detached(host, "guest")
    assert path.read_bytes() == content
    assert (left_beside(shared_dir), path.stat().st_nlink) == ([], 1)
    host.virsh("destroy", "guest")

    served_in_place(host, path)
    host.virsh("save", "guest", path)
    wait_until(lambda: sidecars(host) == [], "the sidecar has ended")
    assert (left_beside(shared_dir), path.stat().st_nlink) == ([], 1)
    host.virsh("restore", path)
    domain.console.wait_passes(1)


@pytest.mark.soak
def test_whoever_overwrites_or_removes_the_file_takes_nothing_from_the_guest(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir)
    kept = shared_dir / "kept"
    shutil.copy2(path, kept)

    # Written to while it is served: that waits until the guest has all of its memory.
    served_in_place(host, path)
    writer = threading.Thread(target=path.write_bytes, args=(b"something else",))
    writer.start()
    wait_detached(host, "guest")
    writer.join(30)
    assert path.read_bytes() == b"something else"
    domain.console.wait_passes(1)
    assert "filling the rest at once" in sidecar_log(host)
    end(host, domain)

    # Removed, and the sidecar killed: another finds it.
    path.unlink()
    shutil.copy2(kept, path)
    served_in_place(host, path)
    path.unlink()
    kill_sidecars(host)
    host.tool("recover", "guest")
    domain.console.wait_passes(1)
    end(host, domain)
    assert left_beside(shared_dir) == []

    # Touched: the guest waits until that is made undone, as the trouble says.
    shutil.copy2(kept, path)
    served_in_place(host, path)
    domain.console.wait_more_ticks(2)
    path.touch()
    wait_until(lambda: "touch -d" in trouble(host), "it is told why the guest waits")
    host.run("sh", "-c", "touch -d" + trouble(host).split("touch -d")[1].split(";")[0])
    domain.console.wait_passes(1)
    assert trouble(host) == ""
    end(host, domain)

    # Written to while no sidecar lives: the guest waits for the content that it was, and gets it.
    shutil.copy2(kept, path)
    served_in_place(host, path)
    domain.console.wait_more_ticks(2)
    kill_sidecars(host)
    path.write_bytes(bytes(kept.stat().st_size))
    assert "was written to" in host.tool("recover", "guest", status=4).stderr
    assert domain.state() == "running"
    # Into the same file: it is the one that is served.
    with path.open("r+b") as file:
        file.write(kept.read_bytes())
    shutil.copystat(kept, path)
    host.tool("recover", "guest")
    domain.console.wait_passes(1)
    end(host, domain)
    assert (left_beside(shared_dir), run_directories(host)) == ([], [])


def trouble(host: Host) -> str:
    (entry,) = json.loads(host.tool("status", "--json", "guest").stdout)
    return str(entry["trouble"])


def sidecar_log(host: Host) -> str:
    return (host.directory / "run/qemu-postcopy/guest/sidecar.log").read_text()


@pytest.mark.soak
def test_what_cannot_be_served_in_place_is_converted_and_what_is_damaged_refused(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir, fill_mib=8)
    content = path.read_bytes()
    with path.open("r+b"):
        said = host.tool("restore", "--connect", "qemu:///system", *IN_PLACE, path)
    assert "converting" in said.stderr and "open for writing" in said.stderr
    domain.console.wait_passes(1)
    end(host, domain)
    # Without the option, where the file system cannot share data: converted, and told how not to.
    said = host.tool("restore", "--connect", "qemu:///system", "--no-background", path)
    assert "--in-place" in said.stderr
    end(host, domain)
    path.write_bytes(content[: len(content) // 2])
    host.tool("restore", "--connect", "qemu:///system", *IN_PLACE, path, status=4)
    assert host.qemus() == [] and sidecars(host) == []
    assert (left_beside(shared_dir), run_directories(host)) == ([], [])
    for option in ("--keep-image=x", "--bypass-cache"):
        said = host.tool(
            "restore", "--connect", "qemu:///system", *IN_PLACE, option, path, status=2
        )
        assert "--in-place" in said.stderr


@contextmanager
def sharing_file_system(host: Host, directory: Path) -> Iterator[Path]:
    """One whose files can share data, mounted where the host alone sees it."""
    disk, mounted = directory / "disk", directory / "xfs"
    disk.touch()
    os.truncate(disk, 600 << 20)
    mounted.mkdir()
    host.run("mkfs.xfs", "-q", disk)
    host.run("mount", "-o", "loop", disk, mounted)
    try:
        host.run("chmod", "755", mounted)
        yield mounted
    finally:
        host.run("umount", mounted)


def require_served_from_a_copy(host: Host, domain: Domain, path: Path) -> None:
    """Nobody who overwrites the file waits, and the guest is none the worse, served by whomever."""
    (listed,) = json.loads(host.tool("list", "--json").stdout)
    assert listed["image"] == str(path)
    assert host.run("stat", "-c", "%h", path).stdout == "1\n"
    host.run("sh", "-c", f"cmp {path} {path.parent}/.{path.name}.*/saved")
    host.run("cp", "/dev/null", path)
    (entry,) = json.loads(host.tool("status", "--json", "guest").stdout)
    assert entry["statistics"]["pages_data_missing"] > 0
    kill_sidecars(host)
    host.tool("recover", "guest")
    domain.console.wait_passes(1)
    host.tool("fill", "guest")
    wait_until(lambda: sidecars(host) == [], "the sidecar has ended")
    domain.console.wait_passes(1)
    assert host.run("ls", "-A", path.parent).stdout == f"{path.name}\n"
    end(host, domain)


@pytest.mark.soak
@pytest.mark.needs("xfs")
def test_where_files_can_share_data_a_private_copy_is_served_unasked(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(host, shared_guest, shared_dir)
    domain.wait_ready()
    with sharing_file_system(host, shared_dir) as mounted:
        path = mounted / "guest.save"
        host.virsh("save", "guest", path)
        before = host.run("sha256sum", path).stdout
        said = host.tool("restore", "--connect", "qemu:///system", "--no-background", path)
        assert "converting" not in said.stderr
        assert host.run("sha256sum", path).stdout == before
        require_served_from_a_copy(host, domain, path)


@pytest.mark.soak
@pytest.mark.needs("xfs")
def test_there_the_hook_converts_nothing_either(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(hooked, shared_guest, shared_dir)
    domain.wait_ready()
    ask(hooked, "guest", ON_DEMAND)
    with sharing_file_system(hooked, shared_dir) as mounted:
        path = mounted / "guest.save"
        hooked.virsh("save", "guest", path)
        hooked.virsh("restore", path)
        require_served_from_a_copy(hooked, domain, path)
