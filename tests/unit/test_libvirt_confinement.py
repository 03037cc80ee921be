"""The rules for AppArmor and SELinux are understood by their own tools."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_postcopy.libvirt import confinement
from qemu_postcopy.libvirt.hook import LIBRARY
from qemu_postcopy.libvirt.offer import SOCKETS

PROFILE = """abi <abi/3.0>,
#include <tunables/global>
profile qpc_test flags=(attach_disconnected) {
  #include <abstractions/base>
%s
}
"""


@pytest.mark.needs("checkers")
def test_apparmor_understands_the_rules(run_dir: Path) -> None:
    profile = run_dir / "profile"
    profile.write_text(PROFILE % confinement.APPARMOR.read_text())
    subprocess.run(["apparmor_parser", "-Q", "-K", str(profile)], check=True)
    profile.write_text(PROFILE % "  /some/where nonsense,")
    assert subprocess.run(["apparmor_parser", "-Q", "-K", str(profile)], check=False).returncode


@pytest.mark.needs("checkers")
def test_selinux_compiles_the_module(run_dir: Path) -> None:
    for command in confinement.steps()["selinux"][:2]:
        subprocess.run(command, shell=True, cwd=run_dir, check=True)
        assert (run_dir / command.split(" -o ")[1].split()[0]).stat().st_size > 0


def test_the_rules_name_the_paths_that_are_used() -> None:
    rules = confinement.APPARMOR.read_text()
    assert f"{LIBRARY} mr," in rules
    assert f"/{{,var/}}{str(SOCKETS).removeprefix('/')}/* rw," in rules
    contexts = confinement.SELINUX_CONTEXTS.read_text()
    assert f"{LIBRARY.parent}(/.*)?\t" in contexts and f"{SOCKETS}(/.*)?\t" in contexts


def test_the_command_says_where_they_lie() -> None:
    command = [sys.executable, "-m", "qemu_postcopy", "libvirt", "confinement", "--json"]
    said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert set(said["steps"]) == {"apparmor", "selinux"}
    assert str(confinement.APPARMOR) in said["steps"]["apparmor"][0]


@pytest.mark.needs("checkers", "libvirt")
def test_libvirts_own_profile_of_a_domain_takes_the_rules_in(run_dir: Path) -> None:
    """As the printed command installs them, in a copy of this host's directory of profiles."""
    profiles = run_dir / "apparmor.d"
    shutil.copytree("/etc/apparmor.d", profiles)
    local = profiles / confinement.APPARMOR_LOCAL.relative_to("/etc/apparmor.d")
    local.parent.mkdir(parents=True, exist_ok=True)
    (command,) = confinement.steps()["apparmor"]
    command = command.replace(str(confinement.APPARMOR_LOCAL), str(local))
    subprocess.run(command, shell=True, check=True)
    template = (profiles / "libvirt/TEMPLATE.qemu").read_text()
    domain = profiles / "libvirt/libvirt-4dea22b3-1d52-d8f3-2516-782e98ab3fa0"
    domain.write_text(template.replace("LIBVIRT_TEMPLATE", domain.name))

    def compiled() -> bytes:
        command = ["apparmor_parser", "-Q", "-K", "-S", "--base", str(profiles), str(domain)]
        return subprocess.run(command, capture_output=True, check=True).stdout

    daemon = (profiles / "usr.sbin.libvirtd").read_text()
    assert "/etc/libvirt/hooks/** rmix," in daemon and "/usr/bin/* PUx," in daemon
    with_rules = compiled()
    local.write_text("")
    assert len(with_rules) > len(compiled())
    local.write_text("  /some/where nonsense,\n")
    with pytest.raises(subprocess.CalledProcessError):
        compiled()
