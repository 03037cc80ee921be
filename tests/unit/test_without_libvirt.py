"""Without libvirt-python all that needs none works, and what needs it says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in ("libvirt", "libvirt_qemu", "libvirtmod"):
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
from qemu_postcopy.cli import main
main()
"""


def run(directory: Path, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *map(str, words)],
        capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "QEMU_POSTCOPY_RUN_DIR": str(directory / "run")},
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ("restore", "--connect", "qemu:///system", "saved"),
        ("snapshot", "--connect", "qemu:///system", "web", "web.qpc"),
    ],
)
def test_what_needs_it_says_what_to_install(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 3, done.stderr
    assert "pip install 'qemu-postcopy[libvirt]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_rest_works(tmp_path: Path) -> None:
    for words in (("--help",), ("restore", "--help"), ("snapshot", "--help"), ("status", "--json")):
        done = run(tmp_path, *words)
        assert done.returncode == 0, done.stderr
    saved = tmp_path / "saved"
    saved.write_bytes(b"nothing of libvirt's")
    assert run(tmp_path, "image", "inspect", saved).returncode == 4
