"""The rules for AppArmor and SELinux are understood by their own tools."""

from __future__ import annotations

import json
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
