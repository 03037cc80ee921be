"""What was handed over by a VMM must be able to serve its guest: asked before anything is served.

Between a handshake and serving.  Memory that is not registered reads as zeros and tells nobody.
And KVM faults in kernel mode: with a descriptor for user mode only (UFFD_USER_MODE_ONLY, which a
process without rights may open) such a fault is no message but EFAULT, or, with asynchronous page
faults, a virtual CPU that tries for ever.  Descriptors that we have opened ourselves in QEMU
(``attach``, ``preload``) are never of that kind.  Blocks for some milliseconds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from qemu_postcopy._native import check, lib, new_error
from qemu_postcopy.errors import AttachTimeoutError, HandshakeError, PostcopyError, TargetGoneError
from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)

#: A page that is present tells nothing, so others are tried.
PAGES_TRIED = 16


def require_registered(identity: ProcessIdentity, ranges: Iterable[tuple[int, int]]) -> None:
    """Every byte is under a userfaultfd for missing pages.

    Where this process may not look, a warning is logged.

    Args:
        ranges: address and length in bytes of each.

    Raises:
        HandshakeError: some memory is not.
        TargetGoneError: the process has ended.
    """
    try:
        registered = list(_registered(identity.pid))
    except OSError as error:
        identity.require_alive()
        log.warning("whether the VMM has registered its memory is not known: %s", error)
        return
    for address, length in ranges:
        at = address
        for start, end in registered:
            if start <= at < end:
                at = end
        if at < address + length:
            identity.require_alive()
            raise HandshakeError(
                f"memory of process {identity.pid} at {at:#x} is not registered with a userfaultfd",
                hint="the VMM must register all of it (UFFDIO_REGISTER, MISSING), then hand over",
                vm=identity.pid,
            )


def require_kernel_faults(
    identity: ProcessIdentity, userfaultfd: int, addresses: Iterable[int]
) -> None:
    """Has the kernel touch missing pages of the process; nothing is filled by that.

    Where this process may not trace the other one, or all of these pages are present, it cannot be
    found out: then a warning is logged, and the guest is served.

    Args:
        userfaultfd: nobody reads its messages yet.
        addresses: of pages that are registered with it, most likely missing ones first.

    Raises:
        HandshakeError: it is for faults of user mode only.
        TargetGoneError: the process has ended.
    """
    reason = "all pages that were tried are present"
    for _, address in zip(range(PAGES_TRIED), addresses, strict=False):
        error = new_error()
        try:
            found = check(
                lib.qpc_kernel_faults_probe(userfaultfd, identity.pid, address, error), error
            )
        except TargetGoneError:
            raise
        except AttachTimeoutError as failure:
            reason = failure.message
            continue
        except PostcopyError as failure:
            reason = failure.message
            break
        if found == lib.QPC_KERNEL_FAULTS_TOLD:
            return
        if found == lib.QPC_KERNEL_FAULTS_FAIL:
            identity.require_alive()
            raise HandshakeError(
                "the userfaultfd is for faults of user mode only (UFFD_USER_MODE_ONLY): KVM and "
                "system calls would get EFAULT where memory is missing",
                hint="let the VMM's user open /dev/userfaultfd (a group and mode 0660), or set "
                "sysctl vm.unprivileged_userfaultfd=1, and have it open one without that flag",
                vm=identity.pid,
            )
    log.warning("whether the userfaultfd gets the kernel's faults is not known: %s", reason)


def _registered(pid: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each mapping whose missing pages are told (proc(5), VmFlags: um)."""
    start = end = 0
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(found[1], 16), int(found[2], 16)
        elif line.startswith("VmFlags:") and "um" in line.split():
            yield start, end
