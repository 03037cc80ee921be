"""Ctrl-C: before there is a guest nothing is left; a guest runs on, and the exit status says so.

What these exit statuses mean decides whether a script starts the same virtual machine again.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from vm.guests import (
    PATIENCE,
    Guest,
    Lab,
    SharedSnapshots,
    cli,
    cli_command,
    send,
    status_of,
    wait_until,
)

from qemu_postcopy.errors import LeftRunningError
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.sidecar.rundir import RunDirectory

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace"), pytest.mark.timeout(300)]

#: The guest does not touch what is missing, and nobody else fills it.
STAYS_INCOMPLETE = ("--paused", "--no-background")
LEFT_RUNNING = LeftRunningError.exit_code


def begin(*arguments: object) -> subprocess.Popen[str]:
    """The tool, to be reached by Ctrl-C: what a shell's background job starts ignores it."""
    return subprocess.Popen(
        cli_command(*arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(tool: subprocess.Popen[str]) -> tuple[int, str]:
    """Ctrl-C; its exit status, and what it has said."""
    tool.send_signal(signal.SIGINT)
    _, said = tool.communicate(timeout=PATIENCE)
    return tool.returncode, said


def shell_script(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def served(lab: Lab, run_dir: Path, name: str) -> Guest:
    """The guest of that name, which must be served; ended with the test."""
    wait_until(lambda: status_of(name)["state"] in ("loaded", "running"), "it is served")
    run = RunDirectory(run_dir / "run" / name)
    record = run.read_record()
    assert record is not None
    return lab.adopt(Guest(record.pid, run.path, name, record.sidecar_pid))


def test_interrupt_before_the_guest_ends_sidecar_and_qemu(
    lab: Lab, snapshots: SharedSnapshots, qemu: Path, run_dir: Path
) -> None:
    """QEMU is one that never gets ready."""
    snapshot = snapshots.bare(lab, qemu)
    started = run_dir / "started"
    stuck = shell_script(
        run_dir / "qemu-system-stuck",
        f"echo $$ >{started}.new && mv {started}.new {started}",
        "exec sleep 600",
    )
    tool = begin("restore", "--name", "stuck", "--qemu", stuck, snapshot.image)
    wait_until(started.exists, "the stuck QEMU is started")
    pid = int(started.read_text())
    status, said = interrupt(tool)
    assert status == 130, said
    assert "interrupted" in said
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.needs("guest")
def test_interrupt_while_a_guest_is_served_says_that_it_runs_on(
    lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, qemu: Path, run_dir: Path
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    tool = begin("restore", "--name", "on", *STAYS_INCOMPLETE, "--wait", "complete", snapshot.image)
    wait_until((run_dir / "run" / "on" / "session.json").exists, "the restore has begun")
    guest = served(lab, run_dir, "on")
    status, said = interrupt(tool)
    assert status == LEFT_RUNNING, said
    assert "on runs on" in said
    assert guest.alive()


@pytest.mark.needs("guest")
def test_interrupt_that_comes_too_late_to_take_the_guest_back_says_so(
    lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, qemu: Path, run_dir: Path
) -> None:
    """The command has heard of nothing yet; its sidecar has brought the guest to run meanwhile."""
    snapshot = snapshots.checker(lab, guest_image, qemu)
    started, go = run_dir / "started", run_dir / "go"
    slow = shell_script(
        run_dir / "qemu-system-slow",
        f"touch {started}",
        f"while ! test -e {go}; do sleep 0.02; done",
        f'exec {qemu} "$@"',
    )
    tool = begin(
        *("restore", "--name", "late", *STAYS_INCOMPLETE, "--wait", "complete"),
        *("--qemu", slow, snapshot.image),
    )
    wait_until(started.exists, "QEMU is started")
    tool.send_signal(signal.SIGSTOP)
    go.touch()
    guest = served(lab, run_dir, "late")
    tool.send_signal(signal.SIGINT)
    tool.send_signal(signal.SIGCONT)
    _, said = tool.communicate(timeout=PATIENCE)
    assert tool.returncode == LEFT_RUNNING, said
    assert "late runs on" in said
    assert guest.alive()


@pytest.mark.needs("guest")
def test_interrupt_of_a_take_over_leaves_it_to_its_sidecar(
    lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, qemu: Path, run_dir: Path
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    guest = lab.restore(snapshot, *STAYS_INCOMPLETE, name="taken")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    run = RunDirectory(guest.directory)
    run.lock()  # as what a dead sidecar has left may hold it: the next one waits a while for it
    tool = begin("recover", "taken")
    children = Path(f"/proc/{tool.pid}/task/{tool.pid}/children")
    wait_until(children.read_text, "a sidecar is to take over")
    tool.send_signal(signal.SIGINT)
    run.release()
    _, said = tool.communicate(timeout=PATIENCE)
    assert tool.returncode == LEFT_RUNNING, said
    assert "taken over by PID" in said
    served(lab, run_dir, "taken")
    cli("fill", "taken")
