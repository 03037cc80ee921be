"""Kernel modules of the guest: which others each one needs, and the order to load them in.

A step of the image build.  The package of a Debian kernel has no modules.dep (its maintainer script
runs depmod), so the needs are read from the modules themselves.  Trusts the package; any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from qemu_postcopy.errors import HostError

# The .modinfo section of a module: strings that end in NUL (modinfo(8), kernel/module/main.c).
DEPENDS = re.compile(rb"\0depends=([\w,-]*)\0")


def module_name(path: Path) -> str:
    """As modinfo has it: a file's name with `_` for `-`."""
    return path.name.partition(".")[0].replace("-", "_")


def load_order(directory: Path, wanted: Iterable[str]) -> dict[str, list[Path]]:
    """For each module wanted, the files to load, in order, itself last.

    One that the kernel has built in has no file, and an empty list.  Raises HostError for a module
    whose file is compressed or damaged.
    """
    files = {module_name(path): path for path in sorted(directory.rglob("*.ko*"))}
    return {name: _with_needs(name, files, ()) for name in wanted}


def _with_needs(name: str, files: Mapping[str, Path], above: tuple[str, ...]) -> list[Path]:
    path = files.get(name)
    if path is None:
        return []
    match = DEPENDS.search(path.read_bytes())
    if match is None or name in above:
        raise HostError(
            f"the kernel module {path.name} is compressed, or damaged",
            hint="choose another kernel package in vm-images/manifest.toml",
        )
    order: list[Path] = []
    for need in filter(None, match[1].decode().split(",")):
        needed = _with_needs(need.replace("-", "_"), files, (*above, name))
        order += [file for file in needed if file not in order]
    return [*order, path]


def load_list(order: Mapping[str, Iterable[Path]]) -> bytes:
    """The file that the guest's init reads: a line per module, its name, then the files."""
    lines = (" ".join([name, *(path.name for path in paths)]) for name, paths in order.items())
    return "".join(f"{line}\n" for line in lines).encode()
