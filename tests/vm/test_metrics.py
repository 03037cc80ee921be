"""Promise: Prometheus gets the figures of every guest, from its sidecar, at each scrape."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from vm.guests import Lab, SharedSnapshots, goes_on_from

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.timeout(300)


@contextmanager
def exporter() -> Iterator[str]:
    """Its URL."""
    command = [sys.executable, "-m", "qemu_postcopy", "metrics", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.fullmatch(r"listening on 127\.0\.0\.1 port (\d+)\n", line)
            assert match, line
            yield f"http://127.0.0.1:{match[1]}/metrics"
        finally:
            process.kill()


def scrape(url: str) -> dict[tuple[str, ...], float]:
    """Values by name and values of labels."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(sample.labels[key] for key in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.needs("qemu", "uffd", "ptrace", "guest")
def test_each_scrape_has_the_figures_of_that_moment(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, run_dir: Path
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    chaos = run_dir / "chaos.toml"
    chaos.write_text("limit = 10\n[fail]\nprobability = 0.5\n")  # over long before all is read
    with exporter() as url:
        assert not any(name == "qemu_postcopy_faults_total" for name, *_ in scrape(url))
        guest = lab.restore(snapshot, "--no-background", "--no-working-set", "--chaos", chaos)
        goes_on_from(guest, snapshot)
        first = scrape(url)
        guest.console.wait_passes(1)
        values = scrape(url)
        name = guest.name
        assert values["qemu_postcopy_guest", name, "running"] == 1
        assert values["qemu_postcopy_trouble", name] == 0
        statistics = guest.status()["statistics"]
        faults = ("qemu_postcopy_faults_total", name)
        assert 0 < first[faults] < values[faults] <= statistics["faults"]
        assert values["qemu_postcopy_vcpu_stopped_seconds_total", name, "vCPU 0"] > 0
        assert values["qemu_postcopy_all_vcpus_stopped_seconds_total", name] > 0
        assert values["qemu_postcopy_async_fault_share", name] == 0
        assert 0 < values["qemu_postcopy_block_faults_total", "m0", name] <= statistics["faults"]
        errors = values["qemu_postcopy_source_errors_total", name]
        assert 0 < errors == statistics["source_errors"]
        assert values["qemu_postcopy_pages_data", name] == statistics["pages_data"]
        assert values["qemu_postcopy_fault_latency_seconds_sum", name, "vCPU 0"] > 0
        count = values["qemu_postcopy_fault_latency_seconds_count", name, "vCPU 0"]
        assert 10 < count <= values[faults]
        guest.kill()
        assert scrape(url)["qemu_postcopy_guest", name, "ended"] == 1
