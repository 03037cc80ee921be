"""Builds the C core and a C test driver under sanitizers, without Python in the process.

The sources are those of the tree: the wheel has only what was compiled of them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Protocol

import pytest

CORE = Path(__file__).resolve().parents[2] / "qemu_postcopy" / "_native"
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-parameter",
    "-pthread",
]


class BuildDriver(Protocol):
    """``build_driver(driver.c, "address,undefined")``: the driver linked with the whole core."""

    def __call__(self, driver: Path, sanitizers: str, defines: tuple[str, ...] = ()) -> Path: ...


def run_tool(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


def sanitizing(sanitizers: str) -> list[str]:
    """The first finding ends the program."""
    return [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="session")
def build_driver(tmp_path_factory: pytest.TempPathFactory) -> BuildDriver:
    """The core is compiled once for each set of sanitizers (as ``-fsanitize=`` takes them) and of
    macros (as ``-D`` takes them)."""
    folder = tmp_path_factory.mktemp("native")
    archives: dict[tuple[str, ...], Path] = {}

    def archive(flags: list[str]) -> Path:
        place = folder / str(len(archives))
        place.mkdir()
        objects = []
        for source in sorted(CORE.glob("*.c")):
            if source.name == "_core.c":
                continue
            objects.append(place / f"{source.stem}.o")
            run_tool("cc", *flags, "-c", source, "-o", objects[-1])
        run_tool("ar", "rcs", place / "libcore.a", *objects)
        return place / "libcore.a"

    def build(driver: Path, sanitizers: str, defines: tuple[str, ...] = ()) -> Path:
        flags = [*FLAGS, *sanitizing(sanitizers), *(f"-D{define}" for define in defines)]
        key = (sanitizers, *defines)
        if key not in archives:
            archives[key] = archive(flags)
        binary = archives[key].parent / driver.stem
        run_tool("cc", *flags, f"-I{CORE}", driver, archives[key], "-o", binary)
        return binary

    return build
