"""No space is left where run directories lie: a guest is served on, taken over and left as ever."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, Snapshot, cli, refused, send, status_of

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [
    pytest.mark.needs("qemu", "uffd", "ptrace", "guest", "root"),
    pytest.mark.timeout(300),
]

ON_DEMAND = ("--no-background", "--chunk", "4K")


@pytest.fixture
def small(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Run directories lie on a file system of 1 MiB."""
    base = run_dir / "small"
    base.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M,mode=0700", "tmpfs", base], check=True)
    monkeypatch.setenv("QEMU_POSTCOPY_RUN_DIR", str(base))
    yield base
    subprocess.run(["umount", "-l", base], check=True)


def fill_up(folder: Path) -> Path:
    """To the last byte."""
    path = folder / "junk"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


@pytest.fixture
def snapshot(qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage) -> Snapshot:
    return snapshots.checker(lab, guest_image, qemu)


def test_guest_is_taken_over_and_finished_without_a_byte_of_space(
    lab: Lab, snapshot: Snapshot, small: Path
) -> None:
    manifest = json.loads((snapshot.image / "manifest.json").read_text())
    argv = list(manifest["launch"]["argv"])
    console = lab.directory / "console"
    argv[argv.index("-serial") + 1] = f"file:{console}"
    guest = lab.follow(
        cli("restore", "--json", "--name", "r", *ON_DEMAND, snapshot.image, "--", *argv)
    )
    guest.console.path = console
    guest.console.wait_more_ticks(2)
    junk = fill_up(small)
    guest.console.wait_more_ticks(2)
    for _ in range(2):
        assert guest.sidecar is not None
        send(guest.sidecar, signal.SIGKILL)
        guest.wait_sidecar_gone()
        assert status_of("r")["state"] == "waiting"
        (said,) = json.loads(cli("recover", "r", "--json").stdout)
        guest.sidecar = ProcessIdentity.open(said["sidecar_pid"])
        guest.console.wait_more_ticks(2)
        assert status_of("r")["state"] == "running"
    guest.console.wait_passes(1)
    cli("fill", "r")
    guest.wait_sidecar_gone()
    assert guest.registered_ranges() == 0
    assert status_of("r")["state"] == "detached"
    junk.unlink()
    guest.console.wait_passes(1)


def test_restore_that_finds_no_space_ends_and_says_so(
    lab: Lab, snapshot: Snapshot, small: Path
) -> None:
    junk = fill_up(small)
    refused("restore", "--name", "r", snapshot.image, status=3, words=["space"])
    junk.unlink()
    assert not list(small.iterdir())
