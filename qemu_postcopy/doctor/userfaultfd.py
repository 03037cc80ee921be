"""Which userfaultfd features the kernel has, and by which way this process gets at one.

The feature bits are those of include/uapi/linux/userfaultfd.h up to Linux 6.18; a kernel answers
UFFDIO_API with every bit that it knows, so a bit without a name here is shown by its number.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from qemu_postcopy._native import ffi, lib, new_error
from qemu_postcopy.doctor.report import Finding, Status

AREA = "userfaultfd"
DEVICE = Path("/dev/userfaultfd")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


class Feature(NamedTuple):
    """A bit of the feature mask; ``cost`` says what is lost without it."""

    bit: int
    name: str
    cost: str
    essential: bool = False


NOT_USED = "Nothing: this version does not use it."

FEATURES = (
    Feature(0, "PAGEFAULT_FLAG_WP", "No dirty tracking by write-protection."),
    Feature(1, "EVENT_FORK", NOT_USED),
    Feature(
        2, "EVENT_REMAP", "A QEMU that moves its RAM mapping goes unnoticed; stock QEMU does not."
    ),
    Feature(
        3,
        "EVENT_REMOVE",
        "Pages that a guest gives back (balloon, free page reporting) would come back from the"
        " image instead of reading as zero.",
        True,
    ),
    Feature(4, "MISSING_HUGETLBFS", "Guests on huge pages (hugetlbfs) cannot be restored lazily."),
    Feature(
        5, "MISSING_SHMEM", "Guests on memfd or /dev/shm memory cannot be restored lazily.", True
    ),
    Feature(6, "EVENT_UNMAP", "Memory that is unplugged while a guest is served goes unnoticed."),
    Feature(7, "SIGBUS", NOT_USED),
    Feature(8, "THREAD_ID", "Faults cannot be told apart by the thread that made them."),
    Feature(9, "MINOR_HUGETLBFS", NOT_USED),
    Feature(10, "MINOR_SHMEM", NOT_USED),
    Feature(11, "EXACT_ADDRESS", NOT_USED),
    Feature(12, "WP_HUGETLBFS_SHMEM", "No dirty tracking of memfd, /dev/shm and huge page memory."),
    Feature(13, "WP_UNPOPULATED", "No dirty tracking of anonymous pages that are not there yet."),
    Feature(14, "POISON", NOT_USED),
    Feature(15, "WP_ASYNC", "No dirty tracking without a stop of the writing vCPU."),
    Feature(16, "MOVE", NOT_USED),
)


class Access(NamedTuple):
    """What came of opening a userfaultfd in one way; ``errnum`` is 0 where it worked."""

    features: int
    errnum: int

    @property
    def works(self) -> bool:
        return self.errnum == 0


def open_by(way: int) -> Access:
    """Opens and closes a userfaultfd by ``lib.QPC_WAY_*``."""
    features = ffi.new("uint64_t *")
    error = new_error()
    if lib.qpc_probe_userfaultfd(way, features, error) < 0:
        return Access(0, error.errnum or errno.EIO)
    return Access(int(features[0]), 0)


def says(access: Access) -> str:
    """``can be opened``, or the kernel's word against it."""
    return "can be opened" if access.works else f"refused: {os.strerror(access.errnum)}"


def device_finding(device: Access, other_way: bool) -> Finding:
    status: Status = "ok" if device.works else "warn" if other_way else "missing"
    if device.works:
        advice = ""
    elif DEVICE.exists():
        advice = f"Give the user who runs QEMU access: setfacl -m u:USER:rw {DEVICE}"
    else:
        advice = (
            f"Linux 6.1 and later have {DEVICE}; in a container, pass it in"
            f" (docker run --device {DEVICE})."
        )
    return Finding(
        "userfaultfd.device",
        AREA,
        str(DEVICE),
        status,
        says(device),
        "A QEMU without CAP_SYS_PTRACE (libvirt's, an unprivileged user's) cannot be attached.",
        advice,
        data={"exists": DEVICE.exists(), "errno": device.errnum},
    )


def syscall_finding(syscall: Access, other_way: bool) -> Finding:
    setting = SYSCTL.read_text().strip() if SYSCTL.exists() else "absent"
    status: Status = "ok" if syscall.works else "warn" if other_way else "missing"
    return Finding(
        "userfaultfd.syscall",
        AREA,
        "userfaultfd(2)",
        status,
        f"{says(syscall)}; vm.unprivileged_userfaultfd is {setting}",
        f"Nothing where {DEVICE} can be opened; otherwise no guest can be restored lazily.",
        ""
        if syscall.works
        else "Run as root or with CAP_SYS_PTRACE, or: sysctl vm.unprivileged_userfaultfd=1",
        data={"errno": syscall.errnum, "unprivileged_userfaultfd": setting},
    )


def access_finding(device: Access, syscall: Access, user_mode: Access) -> Finding:
    ways = [
        name
        for name, access in ((str(DEVICE), device), ("userfaultfd(2)", syscall))
        if access.works
    ]
    found = "by " + " and ".join(ways) if ways else "none"
    if not ways and user_mode.works:
        found = "only for faults of user mode (UFFD_USER_MODE_ONLY), which KVM guests cannot use"
    return Finding(
        "userfaultfd.access",
        AREA,
        "A userfaultfd that also gets the kernel's faults",
        "ok" if ways else "missing",
        found,
        "No guest can be restored lazily on this host by this user.",
        ""
        if ways
        else f"Get access to {DEVICE}, or CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1;"
        " a container's seccomp profile must allow userfaultfd as well.",
        essential=True,
        data={
            "device": device.works,
            "syscall": syscall.works,
            "user_mode_only": user_mode.works,
        },
    )


def feature_findings(mask: int) -> list[Finding]:
    """One finding for each known bit, and one for each set bit without a name here."""
    findings = [
        Finding(
            f"userfaultfd.feature.{feature.name}",
            AREA,
            f"UFFD_FEATURE_{feature.name}",
            "ok" if mask >> feature.bit & 1 else "missing",
            "there" if mask >> feature.bit & 1 else "not in this kernel",
            feature.cost,
            "" if mask >> feature.bit & 1 else "Use a kernel that has it.",
            essential=feature.essential,
            data={"bit": feature.bit},
        )
        for feature in FEATURES
    ]
    known = sum(1 << feature.bit for feature in FEATURES)
    findings += [
        Finding(
            f"userfaultfd.feature.bit{bit}",
            AREA,
            f"feature bit {bit} ({1 << bit:#x})",
            "ok",
            "there; newer than this program",
            NOT_USED,
            data={"bit": bit},
        )
        for bit in range(64)
        if (mask & ~known) >> bit & 1
    ]
    return findings


def probe() -> list[Finding]:
    """Opens a userfaultfd in each way and asks for its features."""
    device = open_by(lib.QPC_WAY_DEVICE)
    syscall = open_by(lib.QPC_WAY_SYSCALL)
    user_mode = open_by(lib.QPC_WAY_USER_MODE)
    mask = device.features | syscall.features | user_mode.features
    return [
        access_finding(device, syscall, user_mode),
        device_finding(device, syscall.works),
        syscall_finding(syscall, device.works),
        *feature_findings(mask),
    ]
