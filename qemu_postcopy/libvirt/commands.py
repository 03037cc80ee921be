"""The commands that go through libvirt, as far as only they need it: arguments in, jobs out."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from qemu_postcopy.cli import session_options, start_sidecar
from qemu_postcopy.errors import PostcopyError, UsageError
from qemu_postcopy.libvirt.connection import load
from qemu_postcopy.libvirt.restore import LibvirtRestoreOptions, open_saved
from qemu_postcopy.progress import byte_progress
from qemu_postcopy.sidecar import process
from qemu_postcopy.sidecar.rundir import RunDirectory


def run_name_of(domain: str) -> str:
    """The name of a domain's run directory: as near to its own as a directory's may be."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", domain)[:48].lstrip(".-") or "_"


def restore_by_libvirt(
    uri: str,
    source: Path,
    *,
    xml: str | None,
    running: bool,
    reset_nvram: bool,
    bypass_cache: bool,
    keep_image: Path | None,
    rest: dict[str, Any],
) -> None:
    """`restore --connect`; ``rest`` as serving_options gives it."""
    if running and rest["paused"]:
        raise UsageError("--running and --paused exclude each other", hint="choose one")
    load()  # before a file is converted for nothing
    options = LibvirtRestoreOptions(
        uri=uri,
        source=source,
        xml=xml,
        afterwards="paused" if rest["paused"] else "running" if running else "as-saved",
        reset_nvram=reset_nvram,
        keep_image=keep_image,
        verify=rest["verify"],
        session=session_options(rest),
    )
    with byte_progress("converting") as progress:
        saved = open_saved(source, keep_image, progress)
    if bypass_cache and source.is_file():
        _drop_cache(source)
    if not running and not saved.was_running:
        rest["paused"] = True
    try:
        run = RunDirectory.create(rest["name"] or run_name_of(saved.name))
    except PostcopyError:
        saved.discard()
        raise
    job = process.restoring_domain(options, saved, run)
    start_sidecar(job, run, rest, f"virsh -c {uri} dominfo {saved.name}")


def _drop_cache(source: Path) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
