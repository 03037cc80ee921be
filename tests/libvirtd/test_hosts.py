"""The hosts that other tests rest on: real daemons, stock sandbox, apart from each other, gone."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import libvirt
import pytest
from libvirtd.conftest import Hosts
from libvirtd.daemons import CGROUPS, Host
from libvirtd.domains import start_domain
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

VERSIONS = {"libvirt": (9_000_000, "7.2"), "libvirt11": (11_003_000, "10.0")}


@pytest.mark.needs("guest")
def test_a_domain_runs_in_the_stock_sandbox_and_is_saved_and_restored(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(host, shared_guest, shared_dir)
    domain.wait_ready()
    (qemu,) = host.qemus()
    status = Path(f"/proc/{qemu}/status").read_text()
    assert "Seccomp:\t2" in status
    assert "Uid:\t64055" in status
    saved = shared_dir / "saved"
    host.virsh("save", domain.name, saved)
    assert host.qemus() == []
    host.virsh("restore", saved)
    domain.console.wait_passes(1)


def test_each_libvirt_is_reached_from_outside_by_system_and_session_connections(host: Host) -> None:
    number, qemu = VERSIONS[host.stack.name]
    host.start_session()
    for uri in (host.uri, host.session_uri):
        connection = libvirt.open(uri)
        assert connection.getLibVersion() == number
        assert connection.getHostname() == host.name
        connection.close()
    assert f"QEMU {qemu}" in host.virsh("version")


@pytest.mark.needs("guest", "libvirt")
def test_a_domain_outlives_its_libvirtd(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path
) -> None:
    host = hosts.get("libvirt")
    domain = start_domain(host, shared_guest, shared_dir)
    host.restart_daemon("libvirtd", signal.SIGKILL)
    assert domain.state() == "running"
    domain.wait_ready()


def processes_in_cgroup(name: str) -> list[str]:
    """PIDs whose cgroup has this in its path."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cgroup"):
        with contextlib.suppress(OSError):  # it has just ended
            if name in path.read_text():
                found.append(path.parent.name)
    return found


@pytest.mark.needs("libvirt")
def test_a_killed_test_run_leaves_no_daemon_behind() -> None:
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from libvirtd.daemons import Host, Stack
        host = Host.start(Stack.of_machine(), "brief")
        print(host.pid, host.directory.name, flush=True)
        sys.stdin.read()
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    pid, directory = run.stdout.readline().split()
    run.kill()
    run.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "its PID 1 has ended", 10)
    # With PID 1 the kernel ends all others of its PID namespace; unshare, outside of it, sees that
    # its child is gone and follows.
    wait_until(lambda: not processes_in_cgroup(directory), "the host's processes have ended", 10)
    shutil.rmtree(Path(tempfile.gettempdir(), directory))
    for stale in CGROUPS.glob(f"*/**/qpc-host-{directory}"):
        assert (stale / "cgroup.procs").read_text() == ""


@pytest.mark.needs("guest", "libvirt11")
def test_a_guest_moves_by_virsh_to_a_host_that_is_joined_by_a_network(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path
) -> None:
    source, target = hosts.get("libvirt11"), hosts.get("libvirt11", "beta")
    link = hosts.link(source, target)
    link.limit(64 << 20)
    domain = start_domain(source, shared_guest, shared_dir)
    domain.wait_ready()
    source.virsh("migrate", "--live", "--postcopy", "--postcopy-after-precopy", domain.name,
                 target.uri)  # fmt: skip
    assert source.domains() == []
    assert target.domains() == [domain.name]
    domain.console.wait_passes(1)
