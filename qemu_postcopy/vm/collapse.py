"""Transparent huge pages of shared memory: whether the kernel would fill missing pages with zeros.

Asked before memory is emptied and registered.  khugepaged makes one huge page out of small ones and
the holes between them; a hole that is a missing page would read as zero from then on, and no fault
would tell.  For private memory every kernel looks at the userfaultfd first, for shared memory those
do that have "mm/khugepaged: skip shmem with userfaultfd" (2023).  Whether this one does is found
out by trying, and only where huge pages of shared memory are on at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from qemu_postcopy.errors import AttachError
from qemu_postcopy.vm.layout import RamBlock, mount_options
from qemu_postcopy.vm.process import ProcessIdentity

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
OFF = ("never", "deny")


def chosen(setting: Path) -> str:
    """The word in brackets of a line such as ``always [advise] never``; without one, `never`."""
    try:
        match = re.search(r"\[(\w+)\]", setting.read_text())
    except OSError:  # a kernel without transparent huge pages, or without this size's setting
        return "never"
    return match[1] if match else "never"


def huge_setting(block: RamBlock, identity: ProcessIdentity, settings: Path = SETTINGS) -> str:
    """What the kernel does about huge pages of the block's file (admin-guide/mm/transhuge.rst)."""
    everywhere = chosen(settings / "shmem_enabled")
    if everywhere in ("deny", "force"):
        return everywhere
    if block.backing != "memfd":  # that is the kernel's own mount, which has no line anywhere
        assert block.file_key is not None
        found = re.search(r"(?:^|,)huge=(\w+)", mount_options(identity, block.file_key) or "")
        return found[1] if found else "never"
    # Linux 6.11: a setting for this size, which may inherit.
    of_size = chosen(settings / "hugepages-2048kB" / "shmem_enabled")
    return everywhere if of_size in ("inherit", *OFF) else of_size


def missing_pages_stay_missing() -> bool:
    """Whether this kernel leaves them alone, found out by trying; False where it cannot be."""
    from qemu_postcopy._native import lib, new_error

    return bool(lib.qpc_probe_collapse(new_error()) == 1)


def refuse_collapsible(blocks: Iterable[RamBlock], identity: ProcessIdentity) -> None:
    """AttachError where huge pages are on for a block's file, and the kernel is one that would fill
    missing pages with them."""
    for block in blocks:
        if block.backing not in ("memfd", "file") or not block.shared:
            continue
        setting = huge_setting(block, identity)
        if setting in OFF or missing_pages_stay_missing():
            continue
        how = (
            f"echo never > {SETTINGS / 'shmem_enabled'}"
            if block.backing == "memfd" or setting == "force"
            else "mount that tmpfs with huge=never"
        )
        raise AttachError(
            f"memory {block.name!r} may get transparent huge pages ({setting}), and this kernel "
            "would fill missing pages with zeros to make them",
            hint=f"{how}, or use a newer kernel.",
            vm=identity.pid,
            block=block.name,
        )
