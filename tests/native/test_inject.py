"""The injection, in C alone, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import qemu_postcopy._native

NATIVE = Path(qemu_postcopy._native.__file__).parent
DRIVER = Path(__file__).with_name("inject_test.c")
SKIPPED = 77


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("inject") / "inject_test"
    sources = [DRIVER, *(NATIVE / name for name in ("inject.c", "uffd.c", "error.c"))]
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    flags += ["-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["cc", *flags, f"-I{NATIVE}", *map(str, sources), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return binary


@pytest.mark.parametrize(
    "case",
    ["unnoticed", "blocked_thread", "gone", "stopped_process", "no_descriptor_left", "no_right"],
)
def test_injection_in_c(driver: Path, case: str) -> None:
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/userfaultfd, readable and writable")
    ended = subprocess.run([str(driver), case], capture_output=True, text=True, timeout=120)
    if ended.returncode == SKIPPED:
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout)
