"""What the versions of libvirt, with their QEMU, differ in: asked of those on this host.

Where a running domain would have to be tried, the programs themselves are looked into instead: a
capability, a device or a refusal that they know of is named in them.  Only a fault of libvirt's
goes by its version.  Nothing is started and no daemon is asked.  What was found is said beside what
holds for the two pairs of versions that are tested (tests/libvirtd/test_support.py asks those).
"""

from __future__ import annotations

import mmap
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.doctor.report import Finding, Status
from qemu_postcopy.doctor.software import RHEL_QEMU, TARGETS, answer
from qemu_postcopy.migrate.native_terms import CRASHES_ON_RESUME

AREA = "libvirt with its QEMU"
#: The pairs that the tests run on.
TESTED = ("libvirt 9.0, QEMU 7.2", "libvirt 11.3, QEMU 10.0")
DAEMONS = ("libvirtd", "virtqemud")
DRIVER = "libvirt/connection-driver/libvirt_driver_qemu.so"
LIBRARIES = ("lib/*-linux-gnu", "lib64", "lib")
CONFIGURATION = Path("/etc/libvirt/qemu.conf")
DEVICE = "/dev/userfaultfd"
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


@dataclass(frozen=True)
class Programs:
    """What is asked.

    Attributes:
        version: libvirt's, as it counts itself: 9.0.0 is 9000000.
        driver, qemu: its QEMU driver, and the QEMU for guests of this architecture.
        acl: the devices that qemu.conf lets QEMU have; None: it leaves that to the driver.
        unprivileged: vm.unprivileged_userfaultfd is 1.
    """

    version: int
    driver: bytes | mmap.mmap
    qemu: bytes | mmap.mmap
    acl: tuple[str, ...] | None = None
    unprivileged: bool = False

    def driver_knows(self, words: str) -> bool:
        return self.driver.find(words.encode()) >= 0

    def qemu_knows(self, words: str) -> bool:
        return self.qemu.find(words.encode()) >= 0

    @property
    def device_in_private_dev(self) -> bool:
        return DEVICE in self.acl if self.acl is not None else self.driver_knows(DEVICE)


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def version_number(text: str) -> int:
    """libvirt's own count of the first version in a text; 0 where there is none."""
    match = re.search(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        return 0
    major, minor, micro = map(int, match.groups())
    return major * 1_000_000 + minor * 1_000 + micro


def allowed_devices(configuration: str) -> tuple[str, ...] | None:
    """cgroup_device_acl of a qemu.conf, what is in QEMU's private /dev; None: not set."""
    match = re.search(r"^\s*cgroup_device_acl\s*=\s*\[(.*?)\]", configuration, re.M | re.S)
    return tuple(re.findall(r'"([^"]*)"', match.group(1))) if match else None


def programs(machine: str) -> Programs | None:
    """Those of this host; None where libvirt, its QEMU driver or QEMU is missing."""
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    daemons = (shutil.which(name, path=path) for name in DAEMONS)
    daemon = next((found for found in daemons if found), None)
    driver = next((f for place in LIBRARIES for f in Path("/usr").glob(f"{place}/{DRIVER}")), None)
    qemu = shutil.which(f"qemu-system-{TARGETS.get(machine, machine)}", path=path) or (
        str(RHEL_QEMU) if RHEL_QEMU.exists() else None
    )
    if daemon is None or driver is None or qemu is None:
        return None
    try:
        configuration = CONFIGURATION.read_text()
    except OSError:  # not there, or not for this user
        configuration = ""
    return Programs(
        version_number(answer(daemon, "--version") or ""),
        _mapped(driver),
        _mapped(Path(qemu)),
        allowed_devices(configuration),
        SYSCTL.exists() and SYSCTL.read_text().strip() == "1",
    )


def findings(asked: Programs) -> list[Finding]:
    """The table, from top to bottom."""
    may_open = asked.unprivileged or (asked.device_in_private_dev and asked.qemu_knows(DEVICE))
    first, last = CRASHES_ON_RESUME
    crashes = first <= asked.version <= last
    return [
        _row(
            "private_dev",
            f"{DEVICE} in QEMU's private /dev",
            asked.device_in_private_dev,
            ("no", "yes"),
            "A sidecar hands an open one over, which needs the right to trace QEMU.",
            f"Nothing to do; or add {DEVICE} to cgroup_device_acl in {CONFIGURATION}.",
        ),
        _row(
            "postcopy_destination",
            "post-copy migration to this host",
            may_open,
            ("with vm.unprivileged_userfaultfd=1", "yes"),
            "A migration to here cannot be switched to post-copy.",
            "sysctl vm.unprivileged_userfaultfd=1; or a newer libvirt and QEMU.",
        ),
        _row(
            "postcopy_resume",
            "resume of an interrupted post-copy to this host",
            not crashes,
            ("yes", "no"),
            "Its libvirtd ends by a fault of its own at each try; the guest waits.",
            "A newer libvirt; guests run on while it is installed.",
        ),
        _row(
            "postcopy_preempt",
            "a channel of its own for pages that the guest waits for",
            asked.driver_knows("postcopy-preempt") and asked.qemu_knows("postcopy-preempt"),
            ("no", "yes"),
            "Such pages queue behind those that are sent anyway.",
            "A newer libvirt on both hosts.",
        ),
        _row(
            "sparse_save",
            "sparse save files (virsh save --image-format sparse)",
            asked.driver_knows("mapped-ram") and asked.qemu_knows("mapped-ram"),
            ("no", "yes"),
            "virsh writes plain or compressed streams.",
            "A newer libvirt and QEMU.",
        ),
    ]


def _row(
    name: str, title: str, here: bool, tested: tuple[str, str], cost: str, advice: str
) -> Finding:
    status: Status = "ok" if here else "warn"
    said = "; ".join(f"{pair}: {word}" for pair, word in zip(TESTED, tested, strict=True))
    return Finding(
        f"libvirt.{name}",
        AREA,
        title,
        status,
        f"{'yes' if here else 'no'} (tested with {said})",
        cost,
        "" if here else advice,
        data={"here": here, "tested": dict(zip(TESTED, tested, strict=True))},
    )


def probe(machine: str) -> Iterable[Finding]:
    """The table of this host's libvirt; nothing where there is none."""
    asked = programs(machine)
    return findings(asked) if asked is not None else ()
