"""Save files served in place: the scan and what is read by it, in C alone, under sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("saved_pages_test.c")


@pytest.mark.needs("cc")
def test_pages_are_found_in_good_cut_altered_and_random_files(
    build_driver: Callable[[Path, str], Path],
) -> None:
    binary = build_driver(DRIVER, "address,undefined")
    ended = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
