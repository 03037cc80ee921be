"""What fuzzing found worth keeping does no harm: the corpora are replayed without a fuzzer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fuzz.targets import TARGETS
from native.conftest import CORE, FLAGS, run_tool, sanitizing

HERE = Path(__file__).parent


@pytest.mark.parametrize("target", TARGETS)
def test_inputs_that_were_kept_do_no_harm(target: str) -> None:
    inputs = sorted((HERE / "corpus" / target).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[target](path.read_bytes())


@pytest.mark.needs("cc")
def test_inputs_of_the_core_that_were_kept_do_no_harm(tmp_path: Path) -> None:
    """In C alone, under sanitizers."""
    binary = tmp_path / "replay"
    core = [path for path in sorted(CORE.glob("*.c")) if path.name != "_core.c"]
    flags = [*FLAGS, *sanitizing("address,undefined"), "-DREPLAY", f"-I{CORE}"]
    run_tool("cc", *flags, HERE / "stream_fuzz.c", *core, "-o", binary)
    inputs = sorted((HERE / "corpus" / "stream-core").iterdir())
    done = subprocess.run([binary, *inputs], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
