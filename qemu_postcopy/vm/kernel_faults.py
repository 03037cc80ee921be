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
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy._native import check, lib, new_error
from qemu_postcopy.errors import AttachTimeoutError, HandshakeError, PostcopyError, TargetGoneError
from qemu_postcopy.vm.handshake import Region
from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)

#: A page that is present tells nothing, so others are tried.
PAGES_TRIED = 16


def require_registered(identity: ProcessIdentity, regions: Iterable[Region]) -> None:
    """Every byte is under a userfaultfd for missing pages only, in pages of the size that was said.

    Faults of another kind would be answered as if a page were missing, for ever.  Where this
    process may not look, a warning is logged.

    Raises:
        HandshakeError: some memory is not.
        TargetGoneError: the process has ended.
    """
    try:
        mappings = list(_mappings(identity.pid))
    except OSError as error:
        identity.require_alive()
        log.warning("whether the VMM has registered its memory is not known: %s", error)
        return
    regions = sorted(regions, key=lambda region: region.address)
    _tell_of_others(identity, regions, mappings)
    for region in regions:
        at = region.address
        for mapping in mappings:
            if not mapping.start <= at < mapping.end or "um" not in mapping.flags:
                continue
            if mapping.flags & {"ui", "uw"}:
                raise HandshakeError(
                    f"memory of process {identity.pid} at {at:#x} is registered for faults of "
                    "other kinds as well",
                    hint="the VMM must register it for MISSING only, then hand over",
                    vm=identity.pid,
                )
            if mapping.page_size_bytes != region.page_size_bytes:
                raise HandshakeError(
                    f"memory of process {identity.pid} at {at:#x} has pages of "
                    f"{mapping.page_size_bytes:,} bytes, and the VMM says "
                    f"{region.page_size_bytes:,}",
                    hint="the VMM must say the page size that its memory has (page_size, bytes)",
                    vm=identity.pid,
                )
            at = mapping.end
        if at < region.address + region.size_bytes:
            identity.require_alive()
            raise HandshakeError(
                f"memory of process {identity.pid} at {at:#x} is not registered with a userfaultfd",
                hint="the VMM must register all of it (UFFDIO_REGISTER, MISSING), then hand over",
                vm=identity.pid,
            )


def _tell_of_others(
    identity: ProcessIdentity, regions: Iterable[Region], mappings: Iterable[_Mapping]
) -> None:
    """The VMM may have another userfaultfd for them; if not, it waits there for ever."""
    for mapping in mappings:
        at = mapping.start if "um" in mapping.flags else mapping.end
        for region in regions:
            if region.address <= at:
                at = max(at, region.address + region.size_bytes)
        if at < mapping.end:
            log.warning(
                "memory of process %d at %#x is registered with a userfaultfd and was not handed "
                "over: it is not served",
                identity.pid,
                at,
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


@dataclass(frozen=True)
class _Mapping:
    start: int
    end: int
    page_size_bytes: int
    flags: frozenset[str]


def _mappings(pid: int) -> Iterator[_Mapping]:
    """Each mapping of a process (proc(5); its VmFlags um, uw, ui: missing, write-protected, minor).

    Raises:
        OSError: this process may not look.
    """
    start = end = page_size = 0
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            start, end = int(found[1], 16), int(found[2], 16)
        elif line.startswith("KernelPageSize:"):
            page_size = int(line.split()[1]) << 10
        elif line.startswith("VmFlags:"):
            yield _Mapping(start, end, page_size, frozenset(line.split()[1:]))
