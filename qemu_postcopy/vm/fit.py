"""Whether an image can be resumed in a QEMU: asked before anything is changed.

Runs in the caller's event loop.  QEMU is asked everything at once, because each question alone
costs a round trip on the way to the guest's first instruction.  Nothing is touched: a QEMU that
does not fit goes on waiting as it was found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from qemu_postcopy.errors import LaunchError, MismatchError, PostcopyError, StateError
from qemu_postcopy.image.manifest import Manifest
from qemu_postcopy.vm.layout import RamBlock, read_layout
from qemu_postcopy.vm.monitor import Monitor
from qemu_postcopy.vm.opening import Question
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.refusals import refusals

#: What :func:`check_fit` asks of every QEMU, to be asked ahead; what is missing here is asked then.
QUESTIONS: tuple[Question, ...] = (
    ("query-status", None),
    ("query-target", None),
    ("qom-get", {"path": "/machine", "property": "type"}),
    ("qom-list", {"path": "/machine/peripheral"}),
    ("qom-list", {"path": "/machine/peripheral-anon"}),
    ("qom-list", {"path": "/objects"}),
    ("query-named-block-nodes", {"flat": True}),
    ("human-monitor-command", {"command-line": "info network"}),
    ("qom-get", {"path": "/machine", "property": "confidential-guest-support"}),
    ("query-memdev", None),
    ("human-monitor-command", {"command-line": "info ramblock"}),
    ("human-monitor-command", {"command-line": "gpa2hva 0"}),
)


async def check_fit(
    qmp: Monitor, identity: ProcessIdentity, manifest: Manifest, *, allow_newer: bool
) -> list[RamBlock]:
    """The RAM blocks of a QEMU that fits.

    Args:
        allow_newer: accept a QEMU newer than the one that made the image.

    Raises:
        StateError: it does not wait for a migration.
        MismatchError: version, architecture, machine type or RAM differ, or the guest has something
            that cannot be paged.
        AttachError: its RAM is of a kind that cannot be paged.
    """
    check_version(qmp.version[:2], manifest, allow_newer)
    status, architecture, machine, reasons, layout = await asyncio.gather(
        qmp.status(),
        qmp.target(),
        qmp.machine_type(),
        refusals(qmp),
        read_layout(qmp, identity),
    )
    if status != "inmigrate":
        raise StateError(
            f"QEMU is {status}; it must wait for a migration (inmigrate)",
            hint="start it with -incoming defer",
        )
    if architecture != manifest.architecture:
        raise MismatchError(
            f"the image is of a {manifest.architecture} guest, this QEMU is for {architecture}",
            hint=f"use qemu-system-{manifest.architecture}",
        )
    if machine != manifest.machine:
        raise MismatchError(
            f"the image is of machine type {manifest.machine}, QEMU was started with {machine}",
            hint=f"start it with -machine {manifest.machine}",
        )
    if reasons:
        raise MismatchError(
            "this guest's memory cannot be paged: " + "; ".join(reasons),
            hint="start QEMU without it",
        )
    _check_blocks(layout, manifest)
    return layout


def launch_failure(error: LaunchError, manifest: Manifest) -> PostcopyError:
    """The same failure, or a MismatchError where QEMU does not know the image's machine type."""
    # Printed by select_machine(), system/vl.c, of all versions up to 10.0.
    if "unsupported machine type" not in error.output:
        return error
    made_by = manifest.qemu_version or "an unknown version"
    return MismatchError(
        f"{error.command[0]} does not know the machine type {manifest.machine}: it is older than "
        f"the QEMU that made the image ({made_by}), or built without it",
        hint=f"restore with QEMU {made_by} or newer: choose it by --qemu",
    )


def check_version(version: tuple[int, ...], manifest: Manifest, allow_newer: bool) -> None:
    """Raises MismatchError for a QEMU (major, minor) that the image's guest cannot be sure to run
    in."""
    recorded = manifest.qemu_version
    if recorded is None:  # imported from a file that does not tell
        return
    made_by = tuple(int(part) for part in recorded.split(".")[:2])
    ours, theirs = ".".join(map(str, version)), ".".join(map(str, made_by))
    if version < made_by:
        raise MismatchError(
            f"this QEMU ({ours}) is older than the one that made the image ({theirs})",
            hint=f"restore with QEMU {theirs} or newer: choose it by --qemu",
        )
    if version > made_by and not allow_newer:
        raise MismatchError(
            f"this QEMU ({ours}) is newer than the one that made the image ({theirs})",
            hint=f"restore with QEMU {theirs} (--qemu), or pass --allow-newer-qemu: QEMU supports "
            "that for versioned machine types",
        )


def _check_blocks(layout: Sequence[RamBlock], manifest: Manifest) -> None:
    wanted = {block.name: block.size_bytes for block in manifest.blocks}
    found = {block.name: block.size_bytes for block in layout}
    if wanted == found:
        return
    listed = [
        ", ".join(f"{name} {size >> 20} MiB" for name, size in sorted(blocks.items())) or "none"
        for blocks in (wanted, found)
    ]
    raise MismatchError(
        f"RAM does not match: the image has {listed[0]}; QEMU has {listed[1]}",
        hint="start QEMU with the -m and memory back-ends (ids, sizes) of the snapshot",
    )
