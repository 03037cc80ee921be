"""The stream reader and the page files, in C alone, under sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("stream_test.c")


@pytest.mark.needs("cc")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_good_cut_altered_and_random_streams_do_no_harm(
    build_driver: Callable[[Path, str], Path], sanitizers: str
) -> None:
    binary = build_driver(DRIVER, sanitizers)
    ended = subprocess.run([str(binary)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
