"""The README's Python sample runs as it is written there, and its guest has every word."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from vm.guests import PATIENCE, Guest, Lab, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.sidecar.rundir import RunDirectory

README = Path(__file__).resolve().parents[2] / "README.md"

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


def test_the_sample_saves_a_guest_and_restores_it_whole(
    lab: Lab, guest_image: GuestImage, qemu: Path, run_dir: Path
) -> None:
    booted = lab.boot(guest_image, qemu, fill_mib=16)
    (sample,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert '"/run/vm.qmp"' in sample and '"vm.qpc"' in sample
    program = sample.replace("/run/vm.qmp", str(booted.qmp_path))
    last = booted.console.ticks[-1].number
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=run_dir, capture_output=True, text=True,
        timeout=PATIENCE,
    )  # fmt: skip
    run = RunDirectory(run_dir / "run" / "vm")
    record = run.read_record(missing_ok=True)
    assert done.returncode == 0 and record is not None, done.stderr
    restored = lab.adopt(Guest(record.pid, run.path, "vm"))
    assert record.state == "detached" and restored.registered_ranges() == 0
    restored.console.wait_passes(1)
    assert restored.console.ticks[0].number > last
    # The one that was saved goes on as before.
    wait_until(lambda: booted.run_state() == "running", "it runs")
    booted.console.wait_more_ticks(1)
