"""Network and serial-port I/O from and into missing memory: QEMU's main loop touches it first.

What the guest sends is checked here, what it gets it checks itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vm.disk_guest import PAGE_BYTES, pattern
from vm.guests import Guest, Lab, take_snapshot, wait_until
from vm.links import ASKED, PORT_PAGES, SENT, Peer, boot, talking_by_port

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.origin import MAIN

pytestmark = pytest.mark.needs("uffd", "ptrace", "guest", "tap")


@pytest.fixture
def peer() -> Iterator[Peer]:
    """Named before the lab: its tap is free when the QEMUs have ended."""
    with Peer() as made:
        yield made


def main_loop_faults(guest: Guest) -> int:
    said = guest.status()
    assert said["trouble"] == ""
    assert said["statistics"]["pages_background"] == 0
    faults: int = said["origins"].get(MAIN, {"faults": 0})["faults"]
    return faults


def wait_verified(guest: Guest, passes: int) -> None:
    wait_until(
        lambda: guest.console.ticks and guest.console.ticks[-1].passes == passes, f"pass {passes}"
    )


def test_what_goes_out_and_comes_in_through_missing_memory_is_right(
    peer: Peer, qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    booted = boot(lab, guest_image, qemu_binary, "memfd", peer)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, "memfd")
    booted.kill()
    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    before = main_loop_faults(guest)

    peer.go()
    wait_verified(guest, 1)
    assert sorted(peer.received) == list(range(SENT))
    assert [page for page in range(SENT) if peer.received[page] != pattern(page, 0)] == []
    assert len(peer.asked) == ASKED
    assert guest.console.ticks[-1].pages == SENT + ASKED
    by_network = main_loop_faults(guest) - before
    # What came in went through buffers of the guest, some of them more than once.
    assert by_network >= SENT

    with talking_by_port(guest.directory / "port.sock") as sent:
        wait_verified(guest, 2)
    wrong = [
        page
        for page in range(PORT_PAGES)
        if sent[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] != pattern(page, 1)
    ]
    assert wrong == []
    by_port = main_loop_faults(guest) - before - by_network
    assert by_port >= PORT_PAGES
    print(f"faults of the main loop: {by_network} by the network, {by_port} by the port")
    guest.kill()
