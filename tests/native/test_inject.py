"""The injection, in C alone, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("inject_test.c")
SKIPPED = 77

pytestmark = pytest.mark.needs("uffd", "ptrace", "cc")


@pytest.fixture(scope="module")
def driver(build_driver: Callable[..., Path]) -> Path:
    """inject_test.c with the core, instrumented."""
    return build_driver(DRIVER, "address,undefined")


@pytest.mark.parametrize(
    "case",
    [
        "unnoticed",
        "blocked_thread",
        "discard",
        "gone",
        "stopped_process",
        "no_descriptor_left",
        "no_right",
        pytest.param("device_passed", marks=pytest.mark.needs("restricted")),
    ],
)
def test_injection_in_c(driver: Path, case: str) -> None:
    ended = subprocess.run([str(driver), case], capture_output=True, text=True, timeout=120)
    if ended.returncode == SKIPPED:
        pytest.skip(ended.stdout.strip())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout)
