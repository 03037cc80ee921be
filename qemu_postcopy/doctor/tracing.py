"""Whether this process may reach into a QEMU: ptrace for a moment, then pidfd_getfd.

Attaching stops one thread of QEMU, lets it open a userfaultfd and takes a copy of the descriptor.
Both need the right that ptrace(2) calls PTRACE_MODE_ATTACH; processes made for this are probed.
"""

from __future__ import annotations

import os
from pathlib import Path

from qemu_postcopy._native import lib, new_error
from qemu_postcopy.doctor.report import Finding

AREA = "attaching"
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
CAP_SYS_PTRACE_BIT = 19  # include/uapi/linux/capability.h

#: Documentation/admin-guide/LSM/Yama.rst
YAMA_MEANING = {
    "0": "any process of the same user",
    "1": "descendants only, unless the tracer has CAP_SYS_PTRACE",
    "2": "CAP_SYS_PTRACE needed",
    "3": "no process at all, until the next boot",
}


def has_cap_sys_ptrace() -> bool:
    """Whether CAP_SYS_PTRACE is in the effective set of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> CAP_SYS_PTRACE_BIT & 1)
    return False


def ptrace_errno(stranger: bool) -> int:
    """0, or why PTRACE_SEIZE of a child (or of a process that is none) was refused."""
    error = new_error()
    return 0 if lib.qpc_probe_ptrace(int(stranger), error) == 0 else int(error.errnum)


def ptrace_finding(child_errno: int, stranger_errno: int) -> Finding:
    data = {"child_errno": child_errno, "stranger_errno": stranger_errno}
    title = "ptrace of processes of the same user"
    cost = (
        "QEMUs that others started cannot be attached; `restore` has QEMU load a library instead "
        "(--attach-by preload)."
    )
    if child_errno and stranger_errno:
        return Finding(
            "attaching.ptrace",
            AREA,
            title,
            "missing",
            f"refused: {os.strerror(child_errno)}",
            cost,
            "Run as root or with CAP_SYS_PTRACE; in a container: docker run --cap-add SYS_PTRACE;"
            f" if {YAMA} is 3, reboot with another setting.",
            essential=True,
            data=data,
        )
    if stranger_errno:
        return Finding(
            "attaching.ptrace",
            AREA,
            title,
            "warn",
            "only of our own children",
            "A QEMU started by something else (`attach`) cannot be served.",
            "Run as root or with CAP_SYS_PTRACE, or: sysctl kernel.yama.ptrace_scope=0",
            essential=True,
            data=data,
        )
    return Finding(
        "attaching.ptrace", AREA, title, "ok", "allowed", cost, essential=True, data=data
    )


def capability_finding() -> Finding:
    has_it = has_cap_sys_ptrace()
    return Finding(
        "attaching.cap_sys_ptrace",
        AREA,
        "CAP_SYS_PTRACE",
        "ok" if has_it else "warn",
        "effective" if has_it else "not effective",
        "Guests of other users, such as those that libvirt runs, cannot be attached.",
        "" if has_it else "Run as root, or: setpriv/systemd AmbientCapabilities=CAP_SYS_PTRACE",
    )


def yama_finding(scope: str | None, has_cap: bool) -> Finding:
    """``scope`` is the content of the sysctl, None where the kernel has no Yama."""
    harmless = scope in (None, "0") or (scope in ("1", "2") and has_cap)
    return Finding(
        "attaching.yama",
        AREA,
        "Yama ptrace scope",
        "ok" if harmless else "warn",
        "no Yama" if scope is None else f"{scope}: {YAMA_MEANING.get(scope, 'unknown')}",
        "Narrows down which processes may be attached.",
        ""
        if harmless
        else "Reboot with another setting."
        if scope == "3"
        else "Run with CAP_SYS_PTRACE, or: sysctl kernel.yama.ptrace_scope=0",
        data={"ptrace_scope": scope},
    )


def pidfd_finding() -> Finding:
    error = new_error()
    refused = 0 if lib.qpc_probe_pidfd_getfd(error) == 0 else int(error.errnum)
    return Finding(
        "attaching.pidfd_getfd",
        AREA,
        "pidfd_open and pidfd_getfd",
        "missing" if refused else "ok",
        f"refused: {os.strerror(refused)}" if refused else "a descriptor was taken from a child",
        "QEMUs that others started cannot be attached; `restore` has QEMU load a library instead.",
        "Needs Linux 5.6 and a seccomp profile that allows both calls." if refused else "",
        essential=True,
        data={"errno": refused},
    )


def probe() -> list[Finding]:
    """Traces a child and a stranger, and takes a descriptor from a child."""
    scope = YAMA.read_text().strip() if YAMA.exists() else None
    return [
        ptrace_finding(ptrace_errno(stranger=False), ptrace_errno(stranger=True)),
        pidfd_finding(),
        capability_finding(),
        yama_finding(scope, has_cap_sys_ptrace()),
    ]
