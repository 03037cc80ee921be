"""Plain virsh restores lazily where the hook is installed; nobody else is touched by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from libvirtd.by_hook import (
    ON_DEMAND,
    ask,
    entries,
    require_nothing_left,
    sidecars,
    started,
)
from libvirtd.conftest import Hosts
from libvirtd.daemons import Host
from libvirtd.domains import start_domain
from libvirtd.saved import MEMFD
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")


@pytest.mark.parametrize("backing", ["anonymous", pytest.param("memfd", marks=pytest.mark.soak)])
def test_virsh_restores_what_virsh_has_saved_lazily_and_leaves_nothing(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path, backing: str
) -> None:
    host = hooked
    memory = MEMFD if backing == "memfd" else ""
    domain = started(host, shared_guest, shared_dir, memory_backing=memory)
    ask(host, "guest", ON_DEMAND)
    path = shared_dir / "guest.save"
    host.virsh("save", "guest", path)
    content = path.read_bytes()
    host.virsh("restore", path)
    domain.console.wait_passes(1)
    (entry,) = entries(host)
    assert (entry["domain"], entry["state"]) == ("guest", "running")
    assert entry["sidecar_pid"] in sidecars_inside(host)
    assert path.read_bytes() == content
    require_stock_sandbox(host)

    # It is a domain like any other, also while it is being filled, and can be restored eagerly.
    again = shared_dir / "again.save"
    host.virsh("save", "guest", again)
    require_nothing_left(host, shared_dir)
    host.tool("libvirt", "install-hooks", "--remove")
    host.virsh("restore", again)
    domain.console.wait_passes(1)
    assert entries(host) == []
    host.virsh("destroy", "guest")
    require_nothing_left(host, shared_dir)


def require_stock_sandbox(host: Host) -> None:
    """libvirt's own user, private /dev and seccomp filter, as without us."""
    (qemu,) = host.qemus()
    assert "Uid:\t64055" in status(qemu) and "Seccomp:\t2" in status(qemu)
    namespaces = [Path(f"/proc/{pid}/ns/mnt").readlink() for pid in (qemu, host.pid)]
    assert namespaces[0] != namespaces[1]


def sidecars_inside(host: Host) -> list[int]:
    """Their PIDs as the host's own processes see them."""
    found = []
    for pid in sidecars(host):
        text = Path(f"/proc/{pid}/status").read_text()
        found.append(int(text.split("NSpid:")[1].splitlines()[0].split()[-1]))
    return found


def test_a_lazy_save_file_is_restored_by_plain_virsh_and_never_without_the_hook(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    host = hooked
    domain = started(host, shared_guest, shared_dir, memory_backing=MEMFD, fill_mib=8)
    image, path = shared_dir / "guest.qpc", shared_dir / "guest.save"
    host.tool("snapshot", "--connect", "qemu:///system", "--then", "quit", "guest", image)
    wait_until(lambda: host.qemus() == [], "its QEMU has ended")
    host.tool("libvirt", "save-file", image, path)

    host.virsh("restore", "--paused", path)
    assert domain.state() == "paused"
    (entry,) = entries(host)
    assert entry["image"] == str(image)
    host.virsh("resume", "guest")
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    require_nothing_left(host, shared_dir)

    # Another image in its place, or none: the hook refuses, and says why.
    (shared_dir / "guest.qpc").rename(shared_dir / "elsewhere")
    said = host.run("virsh", "restore", path, status=1).stderr
    assert "qemu-postcopy" in said and "guest.qpc" in said
    (shared_dir / "elsewhere").rename(image)
    assert host.qemus() == []

    host.tool("libvirt", "install-hooks", "--remove")
    said = host.run("virsh", "restore", path, status=1).stderr
    assert "migration" in said
    assert host.qemus() == []
    assert host.domains() == []
    require_nothing_left(host, shared_dir)


def test_a_managed_save_of_a_supervised_domain_is_started_lazily_and_its_sidecar_replaced(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    host = hooked
    domain = started(host, shared_guest, shared_dir, fill_mib=8)
    (shared_dir / "guest.xml").write_text(host.virsh("dumpxml", "guest"))
    host.virsh("define", shared_dir / "guest.xml")
    host.tool("libvirt", "set", "guest", "--no-background", "--supervise")
    host.virsh("managedsave", "guest")
    host.virsh("start", "guest")
    domain.console.wait_more_ticks(2)
    (entry,) = entries(host)
    victim = next(
        pid for pid in sidecars(host) if f"NSpid:\t{pid}\t{entry['sidecar_pid']}\n" in status(pid)
    )
    os.kill(victim, signal.SIGKILL)
    domain.console.wait_passes(1)
    (entry,) = entries(host)
    assert entry["state"] == "running"
    os.kill(host.qemus()[0], signal.SIGKILL)  # a crash
    wait_until(lambda: domain.state() == "shut off", "libvirt has noticed")
    require_nothing_left(host, shared_dir)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_sidecar_that_is_to_end_while_its_guest_is_loaded_serves_that_guest(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path, which: signal.Signals
) -> None:
    host = hooked
    domain = started(host, shared_guest, shared_dir, fill_mib=64)
    ask(host, "guest", ON_DEMAND)
    path = shared_dir / "guest.save"
    host.virsh("save", "guest", path)
    run = host.directory / "run/qemu-postcopy/guest"
    restoring = host.popen("virsh", "restore", path)
    # QEMU has accepted, and now does not read: what it is given stays in the pipe.
    wait_until((run / "disposable-image").exists, "QEMU has accepted")
    (qemu,) = host.qemus()
    os.kill(qemu, signal.SIGSTOP)
    try:
        (sidecar,) = sidecars_of_hook(host)
        wait_until(lambda: waits_in_pipe(sidecar), "its state is given to it")
        os.kill(sidecar, which)
        wait_until(lambda: "asked to end" in (run / "sidecar.log").read_text(), "it was asked")
    finally:
        os.kill(qemu, signal.SIGCONT)
    assert restoring.wait(60) == 0
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    require_nothing_left(host, shared_dir)


def waits_in_pipe(pid: int) -> bool:
    """Whether a thread waits for room in a pipe."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return any("pipe_write" in (thread / "wchan").read_text() for thread in threads)


def sidecars_of_hook(host: Host) -> list[int]:
    return [
        pid
        for pid in sidecars(host)
        if b".libvirt.hook" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


@pytest.mark.soak
def test_a_restore_by_the_hook_that_fails_leaves_the_file_and_nothing_else(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    host = hooked
    started(host, shared_guest, shared_dir, fill_mib=8)
    ask(host, "guest")
    path = shared_dir / "guest.save"
    host.virsh("save", "guest", path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    host.virsh("restore", path, status=1)
    require_nothing_left(host, shared_dir)
    # libvirt gives up before QEMU: the offer is withdrawn.
    path.write_bytes(whole)
    conflict = shared_dir / "conflict.xml"
    conflict.write_text(host.virsh("save-image-dumpxml", path).replace("vmlinuz", "missing"))
    host.virsh("restore", path, "--xml", conflict, status=1)
    require_nothing_left(host, shared_dir)


@pytest.mark.soak
@pytest.mark.parametrize("what", ["no settings", "eager", "misspelt", "broken", "hanging"])
def test_a_domain_that_asks_for_nothing_or_a_hook_that_is_broken_is_as_without_it(
    hooked: Host, shared_guest: GuestImage, shared_dir: Path, what: str
) -> None:
    host = hooked
    domain = started(host, shared_guest, shared_dir, fill_mib=8)
    if what == "eager":
        ask(host, "guest", '<paging><sidecar restore="eager"/></paging>')
    elif what == "misspelt":
        ask(host, "guest", '<paging><sidecar restore="lzay"/></paging>')
    elif what != "no settings":
        ask(host, "guest")
        script = host.directory / "etc/hooks/qemu.d/50-qemu-postcopy"
        program = {"broken": "false", "hanging": "sleep"}[what]
        text = script.read_text().replace(
            f"'{sys.executable}' -P -m qemu", f"/bin/{program} 60 -m qemu"
        )
        script.write_text(text.replace(" 20 ", " 1 "))
    path = shared_dir / "guest.save"
    host.virsh("save", "guest", path)
    host.virsh("restore", path)
    domain.console.wait_passes(1)
    assert entries(host) == []
    assert "LD_PRELOAD" not in host.virsh("dumpxml", "guest")


@pytest.mark.soak
@pytest.mark.needs("libvirt11")
def test_a_plain_migration_goes_on_to_postcopy_by_the_domains_own_settings(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path
) -> None:
    source, target = hosts.get("libvirt11"), hosts.get("libvirt11", "beta")
    hosts.link(source, target).limit(8 << 20)
    for host in (source, target):
        host.tool("libvirt", "install-hooks")
        host.restart_daemon("libvirtd")
    domain = start_domain(source, shared_guest, shared_dir, memory_backing=MEMFD)
    domain.wait_ready()
    # Settings count from the next start on: a restore is one.
    source.tool("libvirt", "set", "guest", "--restore", "lazy", "--postcopy-after", "1")
    path = shared_dir / "guest.save"
    source.virsh("save", "guest", path)
    source.virsh("restore", path)
    domain.console.wait_more_ticks(2)
    assert "PRELOAD" in source.virsh("dumpxml", "guest")
    wait_until(lambda: watchers(source) != [], "its migrations are watched")
    wait_until(lambda: entries(source)[0]["state"] == "detached", "all of its memory is there")
    told = source.popen("virsh", "-q", "event", "guest", "lifecycle", "--loop", "--timeout", "30",
                        stdout=subprocess.PIPE, text=True)  # fmt: skip
    source.virsh("migrate", "--live", "--postcopy", "guest", target.uri)
    said, _ = told.communicate(timeout=70)
    assert "Post-copy" in said
    assert target.domains() == ["guest"]
    domain.console.wait_passes(1)
    assert "PRELOAD" not in target.virsh("dumpxml", "guest")
    wait_until(lambda: watchers(source) == [], "who watched has ended")
    assert len(watchers(target)) == 1
    require_nothing_left(source, shared_dir)
    target.virsh("destroy", "guest")
    wait_until(lambda: watchers(target) == [], "who watched has ended")
    for host in (source, target):
        host.tool("libvirt", "install-hooks", "--remove")


def watchers(host: Host) -> list[int]:
    return [
        pid for pid in sidecars(host) if b"\0watch\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
