"""With ``--require`` no test skips unseen: neither for a named lack nor by its own decision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CASES = """
import pytest

def test_body(): pytest.skip("as it likes")

@pytest.mark.skipif(True, reason="by a mark")
def test_mark(): pass

@pytest.fixture
def lacking(): pytest.skip("in a fixture")

def test_fixture(lacking): pass

def test_part(subtests):
    with subtests.test("part"): pytest.skip("in a part")

@pytest.mark.needs("nothing_has_it")
def test_needs(): pass

@pytest.mark.xfail
def test_known(): assert False
"""
PLUGIN = """
import capabilities
capabilities.PROBES["nothing_has_it"] = lambda: "no host does"
"""


@pytest.mark.parametrize(
    ("options", "failed", "skipped"),
    [
        ((), [], ["body", "mark", "fixture", "needs"]),
        (("--require=cc",), ["body", "mark", "fixture", "part"], ["needs"]),
    ],
    ids=["nothing", "something else"],
)
def test_a_skip_is_a_failure_where_capabilities_are_required(
    options: tuple[str, ...], failed: list[str], skipped: list[str], tmp_path: Path
) -> None:
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "lack.py").write_text(PLUGIN)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS} {tmp_path}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", "-p", "lack", "-p",
         "conftest", "-p", "no:hypothesispytest", *options, tmp_path],
        capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path),
    )  # fmt: skip
    said = done.stdout
    assert done.returncode == (1 if failed else 0), said + done.stderr
    for name in failed:
        assert any(
            line.startswith(("FAILED", "ERROR", "SUBFAILED")) and f"test_{name}" in line
            for line in said.splitlines()
        ), (name, said)
    summary = said.splitlines()[-1]
    assert (f"{len(skipped)} skipped" in summary) == bool(skipped), summary
    assert "1 xfailed" in summary


def environment(folder: Path) -> dict[str, str]:
    """Without what the outer pytest was told."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    kept.pop("TOX_ENV_NAME", None)
    return {**kept, "PYTHONPATH": f"{TESTS}:{folder}"}
