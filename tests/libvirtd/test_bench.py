"""bench restore --connect: a domain is restored by each way, and nothing of it stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from libvirtd.daemons import Host
from libvirtd.saved import run_directories, sidecars

pytestmark = [
    pytest.mark.needs("guest", "uffd", "ptrace", "root"),
    pytest.mark.soak,
    pytest.mark.timeout(1800),
]
#: Of the domain's filled memory, and rounds; for figures: 4G and 5 or more.
SIZE = os.environ.get("QPC_BENCH_SIZE", "64M")
RUNS = os.environ.get("QPC_BENCH_RUNS", "1")


def test_a_domain_is_restored_by_every_way_and_gone(hooked: Host, shared_dir: Path) -> None:
    host = hooked
    said = host.tool(
        "bench", "restore", "--connect", "qemu:///system", "--sizes", SIZE, "--runs", RUNS,
        "--directory", shared_dir, "--json", patience=1700,
    ).stdout  # fmt: skip
    print(said)
    report = json.loads(said)
    assert [entry["runs"] for entry in report["results"]] == [int(RUNS)] * len(report["results"])
    assert len(report["results"]) == 6
    assert {entry["to"] for entry in report["ratios"]} == {"virsh restore"}
    assert (host.domains(), sidecars(host), run_directories(host)) == ([], [], [])
    assert list(shared_dir.iterdir()) == []
