"""``qemu-postcopy libvirt confinement``: rules for AppArmor and SELinux, and how to have them used.

libvirt's own sandbox (a user of its own, a private /dev, seccomp, cgroups) needs none.  Nothing is
changed here: an administrator reads the rules and installs them.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).with_name("data")
APPARMOR = DATA / "apparmor-libvirt-qemu"
SELINUX_MODULE = DATA / "qemu_postcopy.te"
SELINUX_CONTEXTS = DATA / "qemu_postcopy.fc"
APPARMOR_LOCAL = Path("/etc/apparmor.d/local/abstractions/libvirt-qemu")


def steps() -> dict[str, list[str]]:
    """Commands for a shell, as root, by security driver."""
    return {
        "apparmor": [f"cat {APPARMOR} >> {APPARMOR_LOCAL}"],
        "selinux": [
            f"checkmodule -M -m -o qemu_postcopy.mod {SELINUX_MODULE}",
            f"semodule_package -o qemu_postcopy.pp -m qemu_postcopy.mod -f {SELINUX_CONTEXTS}",
            "semodule -i qemu_postcopy.pp",
            "restorecon -R /var/lib/libvirt/qemu-postcopy /run/qemu-postcopy-hook",
        ],
    }


def in_force() -> list[str]:
    """Which of them the running kernel has: ``apparmor``, ``selinux``."""
    found = []
    if Path("/sys/kernel/security/apparmor").is_dir():
        found.append("apparmor")
    if Path("/sys/fs/selinux/enforce").exists():
        found.append("selinux")
    return found
