"""The pager in C alone: mapper and pager in one process, under the sanitizers."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("pager_test.c")
#: So short a ring of faults overflows with a few dozen threads.
SHORT_QUEUE = "QPC_PAGER_QUEUE_LENGTH=16u"

pytestmark = pytest.mark.needs("uffd", "cc")


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def driver(request: pytest.FixtureRequest, build_driver: Callable[..., Path]) -> Path:
    """pager_test.c with the core, instrumented."""
    return build_driver(DRIVER, request.param, (SHORT_QUEUE,))


@pytest.mark.parametrize(
    "case", ["fill_all", "touch_and_ask", "storm", "interrupted", "failing", "overflow"]
)
def test_pager_in_c(driver: Path, case: str) -> None:
    ended = subprocess.run([str(driver), case], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not ended.stderr, ended.stderr
