"""Who restores a guest may have closed its standard streams, or be allowed few files."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from vm.guests import Guest, Lab, SharedSnapshots, cli_command, status_of

from qemu_postcopy.sidecar.rundir import RunDirectory

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace"), pytest.mark.timeout(120)]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_guest_is_served_though_standard_streams_are_closed(
    closed: str, lab: Lab, qemu: Path, snapshots: SharedSnapshots
) -> None:
    """As by cron or a daemon: what is opened next has their numbers then."""
    snapshot = snapshots.bare(lab, qemu)
    command = cli_command("restore", "--no-background", "--name", "r", snapshot.image)
    subprocess.run(f"{shlex.join(command)} {closed}", shell=True, check=True)
    run = RunDirectory.find("r")
    record = run.read_record()
    assert record is not None
    guest = Guest(record.pid, run.path, "r", record.sidecar_pid)
    lab._guests.append(guest)
    # It may have all of its memory already; if not, whoever serves it has the lock.
    assert status_of("r")["trouble"] == ""
    assert guest.run_state() == "running"
    for process in (guest.identity, guest.sidecar):
        if process is not None and process.is_alive():
            assert all(Path(f"/proc/{process.pid}/fd/{number}").is_symlink() for number in range(3))


@pytest.mark.parametrize("limit", ["--nofile=12", "--fsize=4096"])
def test_limit_that_is_too_low_is_named_and_leaves_nothing(
    limit: str, lab: Lab, qemu: Path, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    done = subprocess.run(
        ["prlimit", limit, *cli_command("restore", "--name", "r", snapshot.image)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    assert "ulimit" in done.stderr and "Traceback" not in done.stderr
    lab.restore(snapshot)
