"""A restore that is interrupted before there is a guest leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from vm.guests import PATIENCE, Lab, SharedSnapshots, cli_command, wait_until

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace"), pytest.mark.timeout(120)]


def test_interrupt_before_the_guest_ends_sidecar_and_qemu(
    lab: Lab, snapshots: SharedSnapshots, qemu: Path, run_dir: Path
) -> None:
    """QEMU is one that never gets ready."""
    snapshot = snapshots.bare(lab, qemu)
    stuck = run_dir / "qemu-system-stuck"
    started = run_dir / "started"
    stuck.write_text(
        f"#!/bin/sh\necho $$ >{started}.new && mv {started}.new {started}\nexec sleep 600\n"
    )
    stuck.chmod(0o755)
    tool = subprocess.Popen(
        cli_command("restore", "--name", "stuck", "--qemu", stuck, snapshot.image),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job has SIGINT ignored, and so has what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(started.exists, "the stuck QEMU is started")
    pid = int(started.read_text())
    tool.send_signal(signal.SIGINT)
    _, said = tool.communicate(timeout=PATIENCE)
    assert tool.returncode == 130, said
    assert "interrupted" in said
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
