"""Another QEMU version beside the host's own: unpacked packages of another suite, never installed.

Flow: download what installing that suite's QEMU would add -> unpack into the cache -> a wrapper
that starts it with its own data files and libraries.  It trusts apt.  Blocks for seconds; any
thread, any process.
"""

from __future__ import annotations

import json
import os
import shlex
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.errors import HostError
from qemu_postcopy.images.builder import Architecture, host_architecture
from qemu_postcopy.images.cache import (
    Progress,
    build_lock,
    default_cache_dir,
    staged_directory,
)
from qemu_postcopy.images.other_suite import download, require_suite_name
from qemu_postcopy.images.packages import require_apt, run_tool, unpack_package

_RECORD_NAME = "install.json"
# where Debian's packages qemu-system-data, seabios and ipxe-qemu put what QEMU looks up by -L
_DATA_DIRS = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


@dataclass(frozen=True)
class QemuInstall:
    """A QEMU that lies in the cache.

    `binary` is a wrapper that can be used wherever one path is asked for; it becomes `real_binary`
    (which is what /proc/PID/exe shows) with the arguments and environment it needs.
    `version` is like "10.0.2"; `packages` are what was unpacked, by name.
    """

    binary: Path
    real_binary: Path
    environment: Mapping[str, str]
    data_dir: Path
    version: str
    packages: Mapping[str, str]

    def argv_prefix(self) -> list[str]:
        """The start of a command line that does without the wrapper; needs `environment`."""
        prefix = self.real_binary.parents[2]
        data_dirs = [prefix / name for name in _DATA_DIRS if (prefix / name).is_dir()]
        return [str(self.real_binary), *(word for path in data_dirs for word in ("-L", str(path)))]


def fetch_qemu(
    suite: str = "bookworm-backports",
    cache_dir: Path | None = None,
    progress: Progress = lambda line: None,
) -> QemuInstall:
    """The system emulator of `suite` for this host's architecture, from the cache if it is there.

    Args:
        suite: of the host's own release ("bookworm-backports" on bookworm), since the packages run
            on the host's libraries.
        cache_dir: default :func:`default_cache_dir`.

    Raises:
        UsageError: that is no suite's name.
        HostError: no such suite at the host's mirrors, or its QEMU does not run here.
    """
    require_suite_name(suite)
    cache_dir = (cache_dir or default_cache_dir()).absolute()
    architecture = host_architecture()
    prefix = cache_dir / f"qemu-{suite}-{architecture.name}"
    if not (prefix / _RECORD_NAME).exists():
        require_apt()
        with build_lock(cache_dir, progress):
            if not (prefix / _RECORD_NAME).exists():  # not made while we waited for the lock
                apt_dir = cache_dir / f"apt-{suite}"
                archives = download(apt_dir, suite, [architecture.qemu_package], progress)
                with staged_directory(prefix) as staged:
                    _unpack(staged, prefix, archives, architecture, progress)
    return load_qemu(prefix)


def _unpack(
    staged: Path,
    prefix: Path,
    archives: Sequence[Path],
    architecture: Architecture,
    progress: Progress,
) -> None:
    """Unpacks into `staged`, which will be renamed to `prefix`, and tries the result."""
    packages = {}
    for archive in archives:
        name, version = archive.name.split("_")[:2]
        packages[name] = version.replace("%3a", ":")
        progress(f"unpacking {name} {packages[name]}")
        unpack_package(archive, staged)
    program = Path("usr/bin") / f"qemu-system-{architecture.name}"
    if not (staged / program).exists():
        raise HostError(
            f"{architecture.qemu_package} holds no {program}",
            hint="correct qemu_package in vm-images/manifest.toml",
        )
    _write_wrapper(staged, prefix, program)
    # The wrapper names the final place, where nothing is yet: try the program itself.
    trial = _environment(staged)
    said = run_tool(
        ["env", *(f"{name}={trial[name]}" for name in trial), str(staged / program), "--version"],
        hint="this host's libraries are too old or too new for that QEMU: take another suite",
    )
    version = said.partition("version ")[2].split()[0]
    record = {"program": str(program), "version": version, "packages": packages}
    (staged / _RECORD_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    progress(f"QEMU {version}")


def _environment(prefix: Path) -> dict[str, str]:
    """What the program needs if it lies (or will lie) in `prefix`."""
    triplet = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    libraries = [f"usr/lib/{triplet}", f"lib/{triplet}"]
    return {
        "LD_LIBRARY_PATH": ":".join(str(prefix / path) for path in libraries),
        "QEMU_MODULE_DIR": str(prefix / "usr/lib" / triplet / "qemu"),
    }


def _write_wrapper(staged: Path, prefix: Path, program: Path) -> None:
    wrapper = staged / "bin" / program.name
    wrapper.parent.mkdir(exist_ok=True)
    data_dirs = [prefix / name for name in _DATA_DIRS if (staged / name).is_dir()]
    arguments = " ".join(f"-L {shlex.quote(str(path))}" for path in data_dirs)
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in _environment(prefix).items()
    )
    wrapper.write_text(
        "#!/bin/sh\n"
        "# Becomes the real program with its own data files and libraries.\n"
        f'{exports}exec {shlex.quote(str(prefix / program))} {arguments} "$@"\n'
    )
    wrapper.chmod(0o755)


def load_qemu(prefix: Path) -> QemuInstall:
    """What :func:`fetch_qemu` has unpacked into `prefix`."""
    record = json.loads((prefix / _RECORD_NAME).read_text())
    program = Path(record["program"])
    return QemuInstall(
        binary=prefix / "bin" / program.name,
        real_binary=prefix / program,
        environment=_environment(prefix),
        data_dir=prefix / _DATA_DIRS[0],
        version=record["version"],
        packages=record["packages"],
    )
