"""Step "register": a mapper's userfaultfd is negotiated and the blocks put under its control.

Runs in the control plane, once per attach, before a byte of device state loads.  The descriptor
comes from the mapper; the addresses are the mapper's.  Rests on ioctl_userfaultfd(2).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from qemu_postcopy._native import check, ffi, lib, new_error

#: How long, and how often, it is looked whether the events of unregistered memory were read.
EVENTS_SECONDS = 10.0
EVENTS_POLL_SECONDS = 0.0005


def kernel_features() -> int:
    """Every UFFD_FEATURE bit of the running kernel.

    Raises:
        AttachError: this process may not open a userfaultfd at all.
    """
    features = ffi.new("uint64_t *")
    error = new_error()
    check(
        lib.qpc_uffd_features(features, error),
        error,
        hint="run as root, or let this user open /dev/userfaultfd; one for user mode only "
        "(UFFD_USER_MODE_ONLY) would not do; `qemu-postcopy doctor` tells",
    )
    return int(features[0])


def is_userfaultfd(descriptor: int) -> bool:
    """Whether a descriptor that came from elsewhere is one."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink()) == "anon_inode:[userfaultfd]"


def negotiate(userfaultfd: int, available: int | None = None) -> int:
    """UFFDIO_API on a fresh descriptor, with all that serving a guest needs; returns the features.

    Args:
        available: see :func:`kernel_features`; None: the kernel is asked.

    Raises:
        HostError: the descriptor was negotiated before, or the kernel refuses.
    """
    known = kernel_features() if available is None else available
    features = int(lib.qpc_uffd_wanted_features(known))
    error = new_error()
    check(lib.qpc_uffd_api(userfaultfd, features, error), error)
    return features


def register(userfaultfd: int, address: int, length: int) -> int:
    """Registers ``length`` bytes at ``address`` MISSING (and WP where it can be); returns the mode.

    Raises:
        AttachError: another userfaultfd has the range.
        HostError: the range is not memory that userfaultfd can handle.
    """
    error = new_error()
    return check(
        lib.qpc_uffd_register(userfaultfd, address, length, error),
        error,
        hint="userfaultfd handles anonymous memory, memfd, tmpfs and hugetlbfs; "
        "guest RAM in a file of another file system cannot be paged",
    )


def unregister(userfaultfd: int, address: int, length: int) -> None:
    """Gives the range back to the kernel: what is missing reads as zero from now on.

    Only to be called when every data page is present.

    Raises:
        TargetGoneError: the mapper has exited.
    """
    error = new_error()
    check(lib.qpc_uffd_unregister(userfaultfd, address, length, error), error)


def events_pending(userfaultfd: int) -> bool:
    """Whether a thread of the mapper waits until an event is read, or is about to queue one."""
    return bool(lib.qpc_uffd_event_pending(userfaultfd))


def wait_events_read(userfaultfd: int, *, by_us: bool, seconds: float = EVENTS_SECONDS) -> bool:
    """After all memory of a descriptor was unregistered: until each thread of the mapper that had
    begun to remove or unmap some of it goes on; False where that took longer than ``seconds``.

    Such a thread waits until its event is read, also where that was queued after its memory was
    unregistered; with nobody to read, and a copy of the descriptor open in the mapper, for ever.

    Args:
        by_us: nobody else reads: the descriptor must not block, and what it says is forgotten.
    """
    deadline = time.monotonic() + seconds
    while events_pending(userfaultfd):
        if time.monotonic() > deadline:
            return False
        if by_us:
            with suppress(BlockingIOError):
                os.read(userfaultfd, 4096)
        time.sleep(EVENTS_POLL_SECONDS)
    return True


def wake(userfaultfd: int, address: int, length: int) -> None:
    """Wakes whoever waits in the range; a thread whose page is missing faults anew."""
    error = new_error()
    check(lib.qpc_uffd_wake(userfaultfd, address, length, error), error)
