"""The pager in C alone: mapper and pager in one process, under the sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import qemu_postcopy._native

NATIVE = Path(qemu_postcopy._native.__file__).parent
DRIVER = Path(__file__).with_name("pager_test.c")
#: So short a ring of faults overflows with a few dozen threads.
QUEUE_LENGTH = 16

pytestmark = pytest.mark.needs("uffd", "cc")


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def driver(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pager_test.c with the core, instrumented."""
    binary = tmp_path_factory.mktemp("pager") / "pager_test"
    names = ("pager.c", "pager_events.c", "pager_fill.c", "uffd.c", "error.c")
    sources = [DRIVER, *(NATIVE / name for name in names)]
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    flags += ["-pthread", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    flags += [f"-DQPC_PAGER_QUEUE_LENGTH={QUEUE_LENGTH}u", f"-I{NATIVE}"]
    command = ["cc", *flags, *map(str, sources), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return binary


@pytest.mark.parametrize("case", ["fill_all", "touch_and_ask", "storm", "interrupted", "overflow"])
def test_pager_in_c(driver: Path, case: str) -> None:
    ended = subprocess.run([str(driver), case], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert not ended.stderr, ended.stderr
