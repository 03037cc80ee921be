"""The page file is cut short while a guest is served from it: the guest waits, and goes on."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from vm.guests import PATIENCE, Lab, SharedSnapshots, cli, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]

PART_BYTES = 1 << 20


@pytest.mark.parametrize("background", [False, True], ids=["demand", "background"])
def test_guest_waits_while_data_is_missing_and_is_intact_when_it_is_back(
    background: bool,
    qemu: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    good = snapshots.checker(lab, guest_image, qemu)
    own = good.copy(run_dir / "image")
    page_file = own.image / "ram" / "m0"
    size_bytes = page_file.stat().st_size

    guest = lab.restore(own, "--paused", "--no-background")
    kept_bytes = 1 << 20
    os.truncate(page_file, kept_bytes)
    if background:
        cli("fill", guest.name)
    # The virtual CPU may hold QEMU's lock when it meets its first missing page (delivering an
    # interrupt it does): then the answer comes when the data does.
    cont = threading.Thread(target=guest.ask, args=("cont",))
    cont.start()
    said = wait_until(lambda: guest.status()["trouble"], "the trouble is reported")
    assert "m0" in said
    assert "put its data back" in said
    assert "m0" in cli("status").stdout
    wait_until(guest.console.stands_still, "the guest waits for its data")
    assert guest.alive()
    statistics = guest.status()["statistics"]
    assert statistics["faults_waiting"] > 0
    assert statistics["source_errors"] > 0

    # In order from the border on: no byte is a hole before it is data again.
    with (good.image / "ram" / "m0").open("rb") as source, page_file.open("ab") as target:
        source.seek(kept_bytes)
        while part := source.read(PART_BYTES):
            target.write(part)
    assert page_file.stat().st_size == size_bytes
    cont.join(PATIENCE)
    assert not cont.is_alive()
    guest.console.wait_passes(2)
    wait_until(lambda: not guest.status()["trouble"], "the trouble is over")
    if not background:
        cli("fill", guest.name)
    guest.wait_sidecar_gone()
    guest.console.wait_passes(1)
