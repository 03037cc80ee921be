"""Killing sidecars at random moments, those that take over included; and how long it took.

Of the tests that do so again and again, with guests of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import suppress

from vm.guests import Guest, cli, cli_command

from qemu_postcopy.errors import TargetGoneError
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.process import ProcessIdentity

#: Seed of the moments; another one by QPC_SEED.
SEED = int(os.environ.get("QPC_SEED", "1"))
#: Of the long tests.
SOAK_KILLS = int(os.environ.get("QPC_KILLS", "1000"))


def needs_none(guest: Guest) -> bool:
    """Whether it has all of its memory, so that there is no sidecar to be killed."""
    record = RunDirectory(guest.directory).read_record()
    return record is not None and record.state == "detached"


def kill_one_that_takes_over(guest: Guest, seconds: float) -> None:
    """So long after its command was given; it must not have failed by then."""
    command = subprocess.Popen(
        cli_command("recover", "--foreground", guest.name),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds)
    ended = command.poll()
    assert ended is None or (ended == 0 and needs_none(guest)), f"it has ended: {ended}"
    command.kill()
    command.wait()


def take_over(guest: Guest, *options: str) -> float:
    """Returns how long that took, from the command to the first fault answered."""
    (said,) = json.loads(cli("recover", guest.name, "--json", *options).stdout)
    with suppress(TargetGoneError):  # it has done its work already
        guest.sidecar = ProcessIdentity.open(said["sidecar_pid"])
    seconds = said["seconds"]["serving"]
    assert isinstance(seconds, float)
    return seconds


def report(took: list[float], kills: int) -> None:
    """What was done, in one line, and the times themselves, to be put together with others."""
    ordered = sorted(1000 * seconds for seconds in took)
    print(
        f"QPC_SEED={SEED}: {kills} kills; {len(ordered)} take-overs, from the command to serving: "
        f"min {ordered[0]:.1f} ms, median {ordered[len(ordered) // 2]:.1f}, "
        f"p99 {ordered[int(len(ordered) * 0.99)]:.1f}, max {ordered[-1]:.1f}"
    )
    print("ms:", *(f"{milliseconds:.1f}" for milliseconds in ordered))
