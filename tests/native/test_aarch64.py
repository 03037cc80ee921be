"""The C core and the preload library compile for aarch64; there is no such machine to run them on.

Debian: apt-get install gcc-aarch64-linux-gnu.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

CORE = Path(__file__).resolve().parents[2] / "qemu_postcopy" / "_native"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-fPIC")


@pytest.mark.needs("aarch64_cc")
def test_every_source_compiles_without_a_warning(tmp_path: Path) -> None:
    sources = [path for path in sorted(CORE.rglob("*.c")) if path.name != "_core.c"]
    assert len(sources) > 10
    output = str(tmp_path / "out.o")
    for source in sources:
        command = ["aarch64-linux-gnu-gcc", *FLAGS, f"-I{CORE}", "-c", "-o", output, str(source)]
        subprocess.run(command, check=True)
