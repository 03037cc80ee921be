"""QEMU ends while memory is missing: whoever waits is told by exit status 13, however it waits."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from vm.guests import (
    PATIENCE,
    Guest,
    Lab,
    SharedSnapshots,
    cli_command,
    send,
    status_of,
    wait_until,
)

from qemu_postcopy.errors import GuestEndedError
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.sidecar.rundir import RunDirectory

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]

#: The guest does not touch what is missing, and nobody else fills it.
STAYS_INCOMPLETE = ("--paused", "--no-background")

WAYS = {"waiting": ("--wait", "complete"), "in-the-foreground": ("--foreground",)}


def killed(lab: Lab, run_dir: Path, *command: object) -> tuple[int, str]:
    """Starts that command for the guest g, kills QEMU once it runs; its exit status and words."""
    tool = subprocess.Popen(
        cli_command(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = RunDirectory(run_dir / "run" / "g")
    wait_until(lambda: run.path.exists() and run.is_served(), "a sidecar has begun")
    wait_until(lambda: status_of("g")["state"] in ("loaded", "running"), "it is served")
    record = run.read_record()
    assert record is not None
    lab.adopt(Guest(record.pid, run.path, "g")).kill()
    _, said = tool.communicate(timeout=PATIENCE)
    return tool.returncode, said


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_qemu_that_is_killed_while_it_is_served_is_no_success(
    options: Sequence[str],
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    qemu: Path,
    run_dir: Path,
) -> None:
    image = snapshots.checker(lab, guest_image, qemu).image
    status, said = killed(
        lab, run_dir, "restore", "--name", "g", *STAYS_INCOMPLETE, *options, image
    )
    assert status == GuestEndedError.exit_code, said
    assert "ended while it was served" in said


def test_nor_is_it_where_another_sidecar_had_taken_over(
    lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, qemu: Path, run_dir: Path
) -> None:
    guest = lab.restore(snapshots.checker(lab, guest_image, qemu), *STAYS_INCOMPLETE, name="g")
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    status, said = killed(lab, run_dir, "recover", "--foreground", "g")
    assert status == GuestEndedError.exit_code, said
