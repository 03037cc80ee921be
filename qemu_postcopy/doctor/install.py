"""Installs the system packages behind what the doctor found missing, by apt or dnf.

It first works out the exact commands (pure), shows them, and then runs them as root; nothing else
of the system is touched.  It trusts the package sources that the machine is configured with.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.doctor.report import HostReport
from qemu_postcopy.errors import HostError

APT_LISTS = Path("/var/lib/apt/lists")
#: Debian's mirrors keep only current versions: older lists may name files that are gone.
LISTS_STALE_SECONDS = 24 * 3600.0

#: finding -> packages. dnf: Fedora and RHEL call QEMU for the host's architecture qemu-kvm; RHEL
#: has glibc-static in its CodeReady repository.
PACKAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "qemu.native": {
        "apt-x86_64": ("qemu-system-x86",),
        "apt-aarch64": ("qemu-system-arm",),
        "dnf": ("qemu-kvm",),
    },
    "tools.static_cc": {
        "apt": ("gcc", "libc6-dev"),
        "dnf": ("gcc", "glibc-devel", "glibc-static"),
    },
    # With what the Python module (the extra "libvirt") is compiled against.
    "libraries.libvirt": {
        "apt": ("libvirt-daemon-system", "libvirt-clients", "libvirt-dev", "pkg-config"),
        "dnf": ("libvirt-daemon-kvm", "libvirt-client", "libvirt-devel", "pkgconf-pkg-config"),
    },
}

MANAGERS = {"apt": "apt-get", "dnf": "dnf"}


@dataclass(frozen=True, slots=True)
class Step:
    """One command; ``optional`` where the plan goes on without its success."""

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    optional: bool = False

    def shell(self) -> str:
        """The command as a shell takes it, its environment included."""
        settings = [f"{name}={value}" for name, value in self.environment]
        prefix = ["env", *settings] if settings else []
        return shlex.join([*prefix, *self.argv])


def package_manager() -> str:
    """``apt`` or ``dnf``; HostError where the host has neither."""
    for family, program in MANAGERS.items():
        if shutil.which(program):
            return family
    raise HostError(
        "This host has neither apt-get nor dnf.",
        hint="Install QEMU and a C compiler with a static libc by hand; "
        "`qemu-postcopy doctor` says what is missing.",
    )


def packages_for(report: HostReport, family: str, machine: str) -> list[str]:
    """The packages, of this family of distributions, for everything that is missing."""
    wanted: list[str] = []
    for finding in report.findings:
        table = PACKAGES.get(finding.id, {})
        if finding.status == "missing":
            wanted += table.get(f"{family}-{machine}", ()) or table.get(family, ())
    return wanted


def newest_list_age_seconds() -> float | None:
    """The age of apt's youngest package list; None where there is none."""
    times = [path.stat().st_mtime for path in APT_LISTS.glob("*_Packages*")]
    return time.time() - max(times) if times else None


def plan(family: str, packages: list[str], lists_age_seconds: float | None) -> list[Step]:
    """The commands, in order; empty where there is nothing to do.

    ``lists_age_seconds`` (None: no lists) matters for apt only: its lists are fetched where there
    are none, since the test guest is downloaded by apt too, or where they are too old to install
    from.
    """
    if family == "dnf":
        return [Step(("dnf", "install", "-y", *packages))] if packages else []
    steps = []
    if lists_age_seconds is None or (packages and lists_age_seconds > LISTS_STALE_SECONDS):
        # One unreachable source among several fails the update, and need not matter for ours.
        steps.append(Step(("apt-get", "update"), optional=True))
    if packages:
        steps.append(
            Step(
                ("apt-get", "install", "-y", "--no-install-recommends", *packages),
                environment=(("DEBIAN_FRONTEND", "noninteractive"),),
            )
        )
    return steps


def as_line(steps: list[Step]) -> str:
    """All steps as one line for root's shell."""
    line = ""
    for step in steps:
        line += step.shell() + ("; " if step.optional else " && ")
    return line.removesuffix("; ").removesuffix(" && ")


def plan_for(report: HostReport) -> list[Step]:
    """What is to be run on this host."""
    family = package_manager()
    age = newest_list_age_seconds() if family == "apt" else None
    return plan(family, packages_for(report, family, platform.machine()), age)


def run(steps: list[Step], say: Callable[[str], None]) -> None:
    """Runs the steps as root, in order; their output goes to standard error.

    Raises HostError without root's rights (with the line to run), or where a step fails.
    """
    if os.geteuid() != 0:
        raise HostError(
            "Installing packages needs root.", hint=f"Run: sudo sh -c {shlex.quote(as_line(steps))}"
        )
    for step in steps:
        say(f"+ {step.shell()}")
        done = subprocess.run(
            step.argv,
            env=os.environ | dict(step.environment),
            stdin=subprocess.DEVNULL,
            stdout=2,
            check=False,
        )
        if done.returncode and not step.optional:
            raise HostError(
                f"`{step.shell()}` ended with status {done.returncode}.",
                hint="Its output above says why; `apt-get update` helps if packages are not found.",
            )
