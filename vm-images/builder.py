"""Builds the test guest: packages in, a kernel and an initramfs out, the same bytes every time.

Flow: look in the cache -> lock -> download kernel and busybox packages -> unpack -> compile the
guest programs -> write the initramfs -> record what was used -> rename into the cache.  It trusts
apt and the system's compiler.  Blocks for seconds; any thread, any number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_postcopy.errors import HostError
from qemu_postcopy.images.cache import (
    Progress,
    build_lock,
    default_cache_dir,
    staged_directory,
)
from qemu_postcopy.images.guest_image import (
    INITRAMFS_NAME,
    KERNEL_NAME,
    RECORD_NAME,
    GuestImage,
    load_guest_image,
)
from qemu_postcopy.images.initramfs import (
    Entry,
    console_device,
    directory,
    regular_file,
    write_cpio,
)
from qemu_postcopy.images.modules import load_list, load_order
from qemu_postcopy.images.packages import (
    Package,
    download_package,
    file_sha256,
    find_package,
    need_package,
    require_apt,
    run_tool,
    unpack_package,
)

_HERE = Path(__file__).resolve().parent
_GUEST_SOURCES = _HERE / "guest"
_COMPILER_HINT = "install a C compiler and static libc: apt-get install gcc libc6-dev"


@dataclass(frozen=True)
class CheckReport:
    """Two builds from the same inputs: the digest of the first, and the files that differ."""

    digest: str
    differing_files: tuple[str, ...]

    @property
    def reproducible(self) -> bool:
        return not self.differing_files


@dataclass(frozen=True)
class Architecture:
    """The manifest's names for one machine architecture."""

    name: str
    debian_architecture: str
    console: str
    qemu_package: str


def read_manifest() -> dict[str, Any]:
    return tomllib.loads((_HERE / "manifest.toml").read_text())


def host_architecture() -> Architecture:
    """Raises HostError where no test guest is defined for this host's architecture."""
    name = platform.machine()
    known = read_manifest()["architectures"]
    if name not in known:
        raise HostError(
            f"no test guest is defined for {name}", hint=f"use a host of {' or '.join(known)}"
        )
    return Architecture(name=name, **known[name])


def build(cache_dir: Path | None = None, progress: Progress = lambda line: None) -> GuestImage:
    """The test guest, from the cache if it was built before from the same sources.

    Args:
        cache_dir: default :func:`default_cache_dir`; made if missing.
        progress: called with one line for each step.

    Raises:
        HostError: something is missing on this host; the hint says what to run.
    """
    cache_dir = cache_dir or default_cache_dir()
    architecture = host_architecture()
    final = cache_dir / f"guest-{architecture.name}-{_recipe_digest()[:16]}"
    if not (final / RECORD_NAME).exists():
        with build_lock(cache_dir, progress):
            if not (final / RECORD_NAME).exists():  # not built while we waited for the lock
                packages = _fetch_packages(cache_dir, architecture, progress)
                with staged_directory(final) as staged:
                    _assemble(staged, packages, architecture, progress)
    return load_guest_image(final)


def check(cache_dir: Path | None = None, progress: Progress = lambda line: None) -> CheckReport:
    """Builds twice from the same packages in two directories and compares every file.

    Raises HostError as :func:`build`.
    """
    cache_dir = cache_dir or default_cache_dir()
    architecture = host_architecture()
    with build_lock(cache_dir, progress):
        packages = _fetch_packages(cache_dir, architecture, progress)
    with tempfile.TemporaryDirectory(prefix=".check-", dir=cache_dir) as temporary:
        first, second = Path(temporary, "first"), Path(temporary, "second", "and-deeper")
        for target in (first, second):
            target.mkdir(parents=True)
            _assemble(target, packages, architecture, progress)
        names = (KERNEL_NAME, INITRAMFS_NAME, RECORD_NAME)
        differing = [n for n in names if file_sha256(first / n) != file_sha256(second / n)]
        return CheckReport(load_guest_image(first).digest, tuple(differing))


def _recipe_digest() -> str:
    """Of everything of ours that an image is made by; package versions are recorded instead."""
    digest = hashlib.sha256()
    sources = [
        _HERE / name for name in ("manifest.toml", "builder.py", "initramfs.py", "modules.py")
    ]
    for source in [*sources, *sorted(path for path in _GUEST_SOURCES.iterdir() if path.is_file())]:
        digest.update(f"{source.name} {file_sha256(source)}\n".encode())
    return digest.hexdigest()


def _fetch_packages(
    cache_dir: Path, architecture: Architecture, progress: Progress
) -> dict[str, Package]:
    """The archives of the roles "kernel" and "busybox"."""
    require_apt()
    manifest = read_manifest()
    records = {
        "kernel": need_package(_kernel_package(manifest, architecture)),
        "busybox": need_package(manifest["busybox"]["package"]),
    }
    packages = {}
    for role, record in records.items():
        progress(f"{role}: {record.name} {record.version}")
        packages[role] = download_package(record, cache_dir / "packages")
    return packages


def _kernel_package(manifest: dict[str, Any], architecture: Architecture) -> str:
    names = [
        template.format(debian_architecture=architecture.debian_architecture)
        for template in manifest["kernel"]["meta_packages"]
    ]
    for name in names:
        meta = find_package(name)
        for dependency in meta.dependencies if meta else ():
            if dependency.startswith("linux-image-"):
                return dependency
    raise HostError(
        f"apt has none of the kernel packages {', '.join(names)}",
        hint="run 'apt-get update' as root, then try again",
    )


def _assemble(
    target: Path, packages: dict[str, Package], architecture: Architecture, progress: Progress
) -> None:
    """Writes kernel, initramfs and record into `target`, whose name and time leave no trace."""
    manifest = read_manifest()
    with tempfile.TemporaryDirectory(prefix="qpc-image-") as temporary:
        unpacked = {role: Path(temporary, role) for role in packages}
        for role, package in packages.items():
            unpack_package(package.archive, unpacked[role])
        kernels = sorted(unpacked["kernel"].glob("boot/vmlinuz-*"))
        if len(kernels) != 1:
            raise HostError(
                f"{packages['kernel'].name} does not hold one /boot/vmlinuz-* but {len(kernels)}",
                hint="correct meta_packages in vm-images/manifest.toml",
            )
        (target / KERNEL_NAME).write_bytes(kernels[0].read_bytes())
        entries = {name: directory() for name in ("bin", "dev", "etc", "modules", "proc", "sys")}
        entries["dev/console"] = console_device()
        entries["bin/busybox"] = _busybox(manifest, unpacked["busybox"])
        order = load_order(unpacked["kernel"] / "lib/modules", manifest["modules"]["names"])
        entries["modules/list"] = regular_file(load_list(order))
        for module in sorted({path for paths in order.values() for path in paths}):
            entries[f"modules/{module.name}"] = regular_file(module.read_bytes())
        for guest_path, source in manifest["files"].items():
            entries[guest_path] = regular_file((_GUEST_SOURCES / source).read_bytes())
        for guest_path, sources in manifest["programs"].items():
            progress(f"compiling {guest_path}")
            program = Path(temporary, "program")
            _compile(manifest, sources, program)
            entries[guest_path] = regular_file(program.read_bytes(), executable=True)
    (target / INITRAMFS_NAME).write_bytes(write_cpio(entries))
    _write_record(target, packages, architecture)
    progress("done")


def _busybox(manifest: dict[str, Any], unpacked: Path) -> Entry:
    for path in manifest["busybox"]["paths"]:
        if (unpacked / path).is_file():
            return regular_file((unpacked / path).read_bytes(), executable=True)
    raise HostError(
        f"{manifest['busybox']['package']} holds no busybox program",
        hint="correct [busybox] paths in vm-images/manifest.toml",
    )


def _compile(manifest: dict[str, Any], sources: list[str], program: Path) -> None:
    flags = [flag.format(source=_GUEST_SOURCES) for flag in manifest["compiler"]["flags"]]
    environment = {
        **os.environ,
        "LC_ALL": "C",
        "SOURCE_DATE_EPOCH": str(manifest["compiler"]["source_date_epoch"]),
    }
    command = ["cc", *flags, "-o", str(program), *sources]
    try:
        done = subprocess.run(
            command,
            cwd=_GUEST_SOURCES,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError("no C compiler (cc) is installed", hint=_COMPILER_HINT) from error
    if done.returncode:
        raise HostError(f"cannot compile {sources[0]}:\n{done.stderr.strip()}", hint=_COMPILER_HINT)


def _write_record(target: Path, packages: dict[str, Package], architecture: Architecture) -> None:
    """What the image was made of, without anything of this build's place and time."""
    files = {name: file_sha256(target / name) for name in (KERNEL_NAME, INITRAMFS_NAME)}
    compiler = run_tool(["cc", "--version"], hint=_COMPILER_HINT).splitlines()[0]
    record = {
        "architecture": architecture.name,
        "console": architecture.console,
        "packages": {
            package.name: {"version": package.version, "sha256": package.sha256}
            for package in packages.values()
        },
        "compiler": compiler,
        "files": files,
        "digest": hashlib.sha256("".join(files.values()).encode()).hexdigest(),
    }
    (target / RECORD_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
