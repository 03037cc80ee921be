"""Another libvirt beside the host's own, with the QEMU of its suite: unpacked, never installed.

Paths of configuration, modules and emulators are compiled into libvirt, so what is unpacked here
is used by a process for which it lies over the host's /usr (an overlay in a mount namespace of its
own); the tests' hosts are made that way.  It trusts apt.  Blocks for seconds; any thread, process.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.errors import HostError
from qemu_postcopy.images.builder import host_architecture
from qemu_postcopy.images.cache import (
    Progress,
    build_lock,
    default_cache_dir,
    staged_directory,
)
from qemu_postcopy.images.other_suite import download, require_suite_name
from qemu_postcopy.images.packages import require_apt, unpack_package
from qemu_postcopy.images.qemu_versions import QemuInstall, fetch_qemu, load_qemu

_RECORD_NAME = "install.json"
_PACKAGES = ("libvirt-daemon-system", "libvirt-daemon-driver-qemu", "libvirt-clients")


@dataclass(frozen=True)
class LibvirtInstall:
    """A libvirt that lies in the cache, and the QEMU that goes with it.

    `prefix` holds `usr` and `etc/libvirt`; `version` is like "11.3.0"; `packages` are what was
    unpacked, by name.
    """

    prefix: Path
    version: str
    packages: Mapping[str, str]
    qemu: QemuInstall

    def overlays(self) -> list[Path]:
        """What is to lie over /usr, topmost first."""
        return [self.prefix / "usr", self.qemu.real_binary.parents[1]]


def fetch_libvirt(
    suite: str = "bookworm-backports",
    cache_dir: Path | None = None,
    progress: Progress = lambda line: None,
) -> LibvirtInstall:
    """libvirt's daemons, QEMU driver and virsh of `suite`, from the cache if they are there.

    Args:
        suite: of the host's own release ("bookworm-backports" on bookworm), since the packages run
            on the host's libraries.
        cache_dir: default :func:`default_cache_dir`.

    Raises:
        UsageError: that is no suite's name.
        HostError: no such suite at the host's mirrors.
    """
    require_suite_name(suite)
    cache_dir = (cache_dir or default_cache_dir()).absolute()
    qemu = fetch_qemu(suite, cache_dir, progress)
    prefix = cache_dir / f"libvirt-{suite}-{host_architecture().name}"
    if not (prefix / _RECORD_NAME).exists():
        require_apt()
        with build_lock(cache_dir, progress):
            if not (prefix / _RECORD_NAME).exists():  # not made while we waited for the lock
                apt_dir = cache_dir / f"apt-{suite}"
                archives = download(apt_dir, suite, _PACKAGES, progress)
                with staged_directory(prefix) as staged:
                    packages = {}
                    for archive in archives:
                        name, version = archive.name.split("_")[:2]
                        packages[name] = version.replace("%3a", ":")
                        progress(f"unpacking {name} {packages[name]}")
                        unpack_package(archive, staged)
                    _check_and_record(staged, suite, packages, qemu)
    return load_libvirt(prefix)


def load_libvirt(prefix: Path) -> LibvirtInstall:
    """What :func:`fetch_libvirt` has unpacked into `prefix`."""
    record = json.loads((prefix / _RECORD_NAME).read_text())
    qemu = load_qemu(prefix.parent / record["qemu"])
    return LibvirtInstall(prefix, record["version"], record["packages"], qemu)


def _check_and_record(
    staged: Path, suite: str, packages: Mapping[str, str], qemu: QemuInstall
) -> None:
    daemon = "libvirt-daemon"
    if not (staged / "usr/sbin/libvirtd").exists() or daemon not in packages:
        raise HostError(
            f"{daemon} of {suite} holds no usr/sbin/libvirtd",
            hint="take a suite whose libvirt still has the one daemon for everything",
        )
    # A package that still installs into /lib means the same directory as one that does into /usr.
    for name in ("bin", "sbin", "lib", "lib64"):
        if (staged / name).is_dir() and not (staged / name).is_symlink():
            shutil.copytree(staged / name, staged / "usr" / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(staged / name)
    version = packages[daemon].partition("-")[0]
    of_qemu = qemu.real_binary.parents[2].name
    record = {"version": version, "packages": packages, "qemu": of_qemu}
    (staged / _RECORD_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
