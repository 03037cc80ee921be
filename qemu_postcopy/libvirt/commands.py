"""The commands that go through libvirt, as far as only they need it: arguments in, jobs out."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import click

from qemu_postcopy.cli import session_options, start_sidecar
from qemu_postcopy.errors import UsageError
from qemu_postcopy.libvirt import domain_xml
from qemu_postcopy.libvirt.connection import load, require_local
from qemu_postcopy.libvirt.restore import (
    LibvirtRestoreOptions,
    open_saved,
    require_pageable,
    saved_xml,
)
from qemu_postcopy.progress import byte_progress
from qemu_postcopy.sidecar import process
from qemu_postcopy.sidecar.rundir import NAME, RunDirectory, remove_ended


def run_name_of(domain: str) -> str:
    """The name of a domain's run directory: its own where a directory may have that, else one that
    is like it, and no other domain's."""
    if NAME.fullmatch(domain):
        return domain
    like = re.sub(r"[^A-Za-z0-9_.-]", "_", domain).lstrip(".-")[:39] or "_"
    return f"{like}-{hashlib.sha256(domain.encode()).hexdigest()[:8]}"


def restore_by_libvirt(
    uri: str,
    source: Path,
    *,
    xml: str | None,
    running: bool,
    reset_nvram: bool,
    bypass_cache: bool,
    keep_image: Path | None,
    in_place: bool | None,
    rest: dict[str, Any],
) -> None:
    """`restore --connect`; ``rest`` as serving_options gives it."""
    if running and rest["paused"]:
        raise UsageError("--running and --paused exclude each other", hint="choose one")
    # All that can be refused before a file is converted for nothing.
    load()
    require_local(uri, f"restore {source}")
    name = domain_xml.parse(saved_xml(source)).findtext("name") or ""
    if xml is not None:
        require_pageable(xml)
    if bypass_cache and source.is_dir():
        raise UsageError(
            "--bypass-cache is about save files: the page cache is where an image is served from",
            hint="leave it out",
        )
    if in_place and (source.is_dir() or keep_image is not None or bypass_cache):
        raise UsageError(
            "--in-place is about save files, which are not converted then, and stay in the page "
            "cache",
            hint="leave it out, or --keep-image and --bypass-cache",
        )
    if keep_image is not None and source.is_dir():
        raise UsageError(f"{source} is an image already", hint="leave --keep-image out")
    options = LibvirtRestoreOptions(
        uri=uri,
        source=source,
        xml=xml,
        afterwards="paused" if rest["paused"] else "running" if running else "as-saved",
        reset_nvram=reset_nvram,
        keep_image=keep_image,
        verify=rest["verify"],
        in_place=False if bypass_cache else in_place,
        session=session_options(rest),
    )
    remove_ended()
    run = RunDirectory.create(rest["name"] or run_name_of(name))
    try:
        with byte_progress("reading the save file") as progress:
            saved = open_saved(
                source,
                keep_image,
                run,
                progress,
                in_place=options.in_place,
                say=lambda text: click.echo(text, err=True),
            )
        if bypass_cache:
            _drop_cache(source)
    except BaseException:
        run.remove()
        raise
    if not running and not saved.was_running:
        rest["paused"] = True
    job = process.restoring_domain(options, saved, run)
    start_sidecar(job, run, rest, f"virsh -c {uri} dominfo {saved.name}")


def _drop_cache(source: Path) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)  # what is not on disk yet stays (posix_fadvise(2))
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
