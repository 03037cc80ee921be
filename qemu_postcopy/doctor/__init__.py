"""What this host can do, found out by doing it; the first step of every flow.

Nothing but a known fault of libvirt's is concluded from a version number: a userfaultfd is opened,
a process is traced, a virtual machine is created, a program is compiled, and all of it is cleaned
up again.  It trusts its own kernel and the programs on PATH, and runs in the caller's thread, for a
second or two; each program that is asked for its version has a time limit.

:func:`probe_host` is the way in; the command is in :mod:`qemu_postcopy.doctor.commands`.
"""

from qemu_postcopy.doctor.report import Finding, HostReport, Status

__all__ = ["Finding", "HostReport", "Status", "probe_host"]


def probe_host() -> HostReport:
    """Probes this host with the rights of the calling process.

    Never raises for something that the host lacks: a lack is a :class:`Finding`.  Thread safe; it
    forks short-lived children, which are gone when it returns.
    """
    import platform

    from qemu_postcopy.doctor import (
        host,
        kvm,
        libvirt_support,
        memory,
        software,
        tracing,
        userfaultfd,
    )

    return HostReport(
        host=host.describe(),
        findings=(
            *userfaultfd.probe(),
            *tracing.probe(),
            *kvm.probe(),
            *memory.probe(),
            *software.probe(),
            *libvirt_support.probe(platform.machine()),
            *host.probe(),
        ),
    )
