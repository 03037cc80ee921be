"""Memory that comes and goes while a guest is being filled, and after."""

from __future__ import annotations

from pathlib import Path

import pytest
from vm.dynamic_guest import (
    BALLOON_MIB,
    BASE_MIB,
    LITTER_MIB,
    LITTER_PASSES,
    SAVED_BALLOON_MIB,
    boot,
    check_given_back,
    complete,
    given_back,
    kill_and_recover,
    patterned,
    set_balloon,
)
from vm.guests import Guest, Lab, cli, goes_on_from, take_snapshot, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.spec import MemoryKind

pytestmark = [pytest.mark.needs("uffd", "ptrace", "guest"), pytest.mark.timeout(400)]

PAGES_PER_MIB = 256


def block(guest: Guest, name: str) -> dict[str, object]:
    """What `status` says of one of its blocks."""
    (found,) = (entry for entry in guest.status()["blocks"] if entry["name"].endswith(name))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("kind", ["memfd", pytest.param("anonymous", marks=pytest.mark.soak)])
def test_what_a_balloon_and_free_page_reporting_gave_back_is_never_the_images_again(
    kind: MemoryKind, qemu_binary: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    booted = boot(
        lab, guest_image, qemu_binary, kind,
        "-device", "virtio-balloon-pci,id=b0,free-page-reporting=on",
        words=f"qpc.litter={LITTER_MIB} qpc.litter_until={LITTER_PASSES}",
    )  # fmt: skip
    set_balloon(booted, BASE_MIB - SAVED_BALLOON_MIB)
    snapshot = take_snapshot(booted, run_dir / "image", qemu_binary, kind)
    assert booted.console.ticks[-1].passes < LITTER_PASSES, "the litter was freed before"
    booted.kill()

    guest = lab.restore(snapshot, "--no-background", "--chunk", "4K")
    goes_on_from(guest, snapshot)
    assert guest.ask("query-balloon")["actual"] == (BASE_MIB - SAVED_BALLOON_MIB) << 20
    # Free memory that is missing here, and has data in the image, is reported.
    data = patterned(snapshot)
    half = LITTER_MIB // 2 * PAGES_PER_MIB
    wait_until(lambda: guest.console.ticks[-1].passes >= LITTER_PASSES, "there is litter")
    wait_until(lambda: len(given_back(guest) & data.keys()) > half, "free pages are reported")
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    removed = given_back(guest)
    kill_and_recover(guest)
    set_balloon(guest, BASE_MIB)
    guest.console.wait_passes(1)

    # While the background fills.
    cli("fill", guest.name, "--rate", "10M")
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    assert block(guest, "m0")["pages_data_missing"]
    removed |= given_back(guest)
    check_given_back(guest, {page: data[page] for page in removed & data.keys()}, run_dir)
    complete(guest)
    # Nobody is told any more.
    set_balloon(guest, BASE_MIB)
    set_balloon(guest, BASE_MIB - BALLOON_MIB)
    set_balloon(guest, BASE_MIB)
    guest.console.wait_passes(1)
