"""`bench restore` resumes a real guest in each of its ways, and reports each once a round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vm.guests import Lab, cli

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


@pytest.mark.soak
def test_one_round_of_every_way(lab: Lab, run_dir: Path) -> None:
    said = cli(
        *("bench", "restore", "--sizes", "32M", "--runs", "1", "--json"),
        *("--directory", run_dir),
    )
    results = {entry["name"]: entry for entry in json.loads(said.stdout)["results"]}
    assert len(results) >= 4, results
    assert all(name.endswith(", 32 MiB") and entry["runs"] == 1 for name, entry in results.items())
    assert list(run_dir.glob("bench-*")) == []
