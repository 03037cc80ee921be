"""Where a domain goes and what is kept of it: destinations by ssh, and definitions."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from libvirtd.conftest import Hosts
from libvirtd.daemons import Host
from libvirtd.domains import MIB, Domain, domain_xml
from libvirtd.pairs import NEWER_FIRST, Begun, Pair, busy_domain
from libvirtd.ssh import SecureShell
from vm.guests import PATIENCE, GuestConsole, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")


SecureShells = Callable[[Host, Host], SecureShell]


@pytest.fixture(scope="session")
def secure_shells(all_hosts: Hosts) -> SecureShells:
    """Between two hosts; made at the first use, and ended with them."""
    return functools.cache(SecureShell.between)


@NEWER_FIRST
@pytest.mark.needs("sshd")
def test_a_destination_by_ssh_works_and_a_missing_key_is_named(
    pair: Pair, secure_shells: SecureShells, shared_guest: GuestImage, shared_dir: Path
) -> None:
    shell = secure_shells(pair.source, pair.target)
    domain = busy_domain(pair, shared_guest, shared_dir, fill_mib=8)
    key = shell.key.read_bytes()
    trial = f"ssh -o BatchMode=yes root@{pair.target.name} true"
    shell.key.unlink()
    try:
        for options in ((), ("--dry-run",)):
            said = pair.source.tool("migrate", *options, "guest", shell.uri, status=14).stderr
            assert "Permission denied (" in said
            assert "as the user who runs the command" in said and trial in said
        # The user who runs it has a key, and the daemon, which moves the guest, has none.
        tool = (sys.executable, "-m", "qemu_postcopy", "migrate", "--after-passes", 0)
        own = (*shell.with_a_key_of_ones_own(), *tool)
        said = pair.source.run(*own, "guest", shell.uri, status=14).stderr
        assert "Permission denied (" in said
        assert "as root at its host" in said and trial in said, said
    finally:
        shell.key.write_bytes(key)
        shell.key.chmod(0o600)
    assert pair.where() == (["guest"], [])
    # What QEMU cannot do with post-copy is refused, also where it does not say so itself (7.2).
    multifd = ("migrate", "--dry-run", "--multifd", 2, "guest", shell.uri)
    assert "multifd: not with post-copy" in pair.source.tool(*multifd, status=5).stderr
    said = pair.source.tool("migrate", "--json", "--after-passes", 0, "guest", shell.uri).stdout
    assert json.loads(said)["outcome"] == "completed"
    assert pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)


@pytest.mark.soak
@pytest.mark.needs("sshd")
def test_direct_needs_no_way_from_daemon_to_daemon_and_dies_with_the_command_in_pre_copy(
    pair: Pair, secure_shells: SecureShells, shared_guest: GuestImage, shared_dir: Path
) -> None:
    shell = secure_shells(pair.source, pair.target)
    domain = busy_domain(pair, shared_guest, shared_dir, fill_mib=8)
    key = shell.key.read_bytes()
    shell.key.unlink()
    own = shell.with_a_key_of_ones_own()
    tool = (sys.executable, "-m", "qemu_postcopy", "migrate", "--direct")
    try:
        pair.link.limit(MIB)
        # It does not come to a second pass, in which QEMU 7.2 would lose writes.
        policy = ("--after-passes", 1000, "--accept-lost-writes")
        command = pair.source.command(*own, *tool, *policy, "guest", shell.uri)
        begun = Begun(pair.source, command)
        begun.wait_said("pre-copy, pass 1")
        begun.signal(signal.SIGKILL)
        begun.process.wait(PATIENCE)
        wait_until(lambda: pair.where() == (["guest"], []), "nothing is left at the destination")
        assert domain.state() == "running"
        pair.link.limit(1000 * MIB)
        said = pair.source.run(*own, *tool, "--json", "--after-passes", 0, "guest", shell.uri)
        assert json.loads(said.stdout)["outcome"] == "completed"
    finally:
        shell.key.write_bytes(key)
        shell.key.chmod(0o600)
    assert pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)


def definition(host: Host) -> str:
    """Whether a host has the domain's definition, as virsh says; empty: it has no such domain."""
    if "guest" not in host.domains():
        return ""
    info = host.virsh("dominfo", "guest")
    return info.split("Persistent:")[1].split()[0]


@NEWER_FIRST
def test_a_persistent_domain_is_defined_where_the_options_say(
    pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    pair.link.limit(1000 * MIB)
    xml = domain_xml("guest", shared_guest, shared_dir / "guest.console", fill_mib=8)
    file = shared_dir / "guest.xml"
    file.write_text(xml)
    pair.source.virsh("define", file)
    pair.source.virsh("start", "guest")
    domain = Domain(pair.source, "guest", GuestConsole(shared_dir / "guest.console"), xml)
    domain.wait_ready()
    back = Pair(pair.target, pair.source, pair.link)

    def move(way: Pair, *options: object) -> tuple[str, str]:
        way.migrate("--after-passes", 0, *options)
        assert way.target.virsh("domstate", "guest").strip() == "running"
        return definition(way.source), definition(way.target)

    # As with virsh: the definition stays where it was, and nothing else is said.
    assert move(pair) == ("yes", "no")
    assert pair.source.virsh("domstate", "guest").strip() == "shut off"
    assert move(back) == ("", "yes")
    # Defined at both hosts; and by other words at the destination than at the source.
    titled = shared_dir / "titled.xml"
    inactive = pair.source.virsh("dumpxml", "--inactive", "guest")
    titled.write_text(inactive.replace("</name>", "</name><title>moved</title>"))
    assert move(pair, "--persistent", "--persistent-xml", titled) == ("yes", "yes")
    assert "<title>moved</title>" in pair.target.virsh("dumpxml", "--inactive", "guest")
    assert "<title>moved</title>" not in pair.source.virsh("dumpxml", "--inactive", "guest")
    # The whole of it moves: nothing stays behind that could be started a second time.
    assert move(back, "--persistent", "--undefinesource") == ("", "yes")
    domain.console.wait_passes(1)
