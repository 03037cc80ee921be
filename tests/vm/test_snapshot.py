"""A running guest becomes an image, and goes on as it was told to."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from vm.guests import (
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    goes_on_from,
    refused,
    take_snapshot,
    wait_until,
)

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.spec import MemoryKind

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


#: What a fault brings at least.
SMALLEST: dict[MemoryKind, str] = {
    "memfd": "4K", "anonymous": "4K", "file": "4K", "hugetlb": "2M",
}  # fmt: skip
HUGETLB = pytest.mark.needs("hugetlb")


@pytest.mark.parametrize("kind", ["memfd", "anonymous"])
def test_restored_guest_can_be_snapshotted_and_restored_again(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    first = snapshots.checker(lab, guest_image, qemu_binary, kind)
    again = lab.restore(first, "--wait", "complete", name="again")
    again.console.wait_passes(1)
    second = take_snapshot(again, run_dir / "second", qemu_binary, kind)
    again.kill()

    guest = lab.restore(second, name="third")
    goes_on_from(guest, second)
    guest.console.wait_passes(2)


@pytest.mark.parametrize(
    "kind",
    [
        "memfd",
        "anonymous",
        pytest.param("file", marks=pytest.mark.soak),
        pytest.param("hugetlb", marks=[pytest.mark.soak, HUGETLB]),
    ],
)
def test_guest_snapshotted_while_most_of_it_is_missing_is_whole_in_the_image(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    first = snapshots.checker(lab, guest_image, qemu_binary, kind)
    lazy = lab.restore(first, "--no-background", "--paused", "--chunk", SMALLEST[kind], name="lazy")
    before = lazy.status()["statistics"]
    assert before["pages_data_missing"] > 0.9 * before["pages_data"]
    lazy.ask("cont")
    lazy.console.wait_more_ticks(1)
    require_whole(lab, lazy, first, run_dir / "second")


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("memfd", marks=pytest.mark.soak),
        pytest.param("anonymous", marks=pytest.mark.soak),
        "file",
        pytest.param("hugetlb", marks=HUGETLB),
    ],
)
def test_guest_snapshotted_while_the_background_fills_it_is_whole_in_the_image(
    kind: MemoryKind,
    qemu: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    run_dir: Path,
) -> None:
    """It stands, so that nothing but the background and the snapshot takes pages from the image."""
    first = snapshots.checker(lab, guest_image, qemu, kind)
    # So slow that most of it is still to be done, for half a minute.
    lazy = lab.restore(first, "--rate", "2M", "--paused", name="lazy")

    def filling() -> bool:
        numbers = lazy.status()["statistics"]
        assert numbers["pages_data_missing"] > 0.5 * numbers["pages_data"]
        return bool(numbers["pages_background"])

    wait_until(filling, "the background fills")
    require_whole(lab, lazy, first, run_dir / "second")


def require_whole(lab: Lab, lazy: Guest, first: Snapshot, image: Path) -> None:
    """Snapshots a guest that is being filled from an image, ends it, and restores the new image."""
    second = take_snapshot(lazy, image, first.qemu, first.kind)
    if not lazy.console.ticks:
        second = replace(second, last_tick=first.last_tick)
    lazy.kill()
    guest = lab.restore(second, name="third")
    goes_on_from(guest, second)
    guest.console.wait_passes(2)
    guest.kill()
    # Nor has the first image changed.
    cli("image", "verify", first.image)


def test_guest_does_afterwards_what_it_was_told(
    qemu: Path, lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    """Each way in turn; what the guest's memory holds is checked by itself all the while."""
    guest = lab.boot(guest_image, qemu)
    settings = migration_settings(guest)

    def snapshot(name: str, *options: str) -> dict[str, int]:
        image = run_dir / name
        result = json.loads(cli("snapshot", "--json", *options, guest.qmp_path, image).stdout)
        assert isinstance(result, dict)
        cli("image", "verify", image)
        return result

    result = snapshot("as-before")
    assert result["ram_bytes"] == guest_image.ram_mib(64) << 20
    assert 64 << 20 <= result["data_bytes"] + (7 << 20) <= result["ram_bytes"]
    assert guest.run_state() == "running"
    guest.console.wait_passes(1)

    guest.ask("stop")
    snapshot("paused")
    assert guest.run_state() != "running"
    assert guest.console.stands_still()
    # QEMU does not save such a guest a second time: said so, and nothing happens to it.
    refused("snapshot", guest.qmp_path, run_dir / "no", status=10, words=["postmigrate", "cont"])
    guest.ask("cont")
    guest.console.wait_passes(1)

    guest.ask("stop")
    snapshot("run", "--then", "run")
    assert guest.run_state() == "running"
    guest.console.wait_passes(1)

    # A QEMU older than 9.0, which loses writes of a guest that is saved while it runs.
    said = refused(
        "snapshot", "--max-downtime", "300", guest.qmp_path, run_dir / "live", status=5,
        words=["loses writes", "--accept-lost-writes"],
    )  # fmt: skip
    assert "--max-downtime" in said and not (run_dir / "live").exists()
    snapshot("live", "--max-downtime", "300", "--accept-lost-writes")
    assert guest.run_state() == "running"
    guest.console.wait_passes(1)
    assert migration_settings(guest) == settings

    snapshot("stop", "--then", "stop")
    assert guest.run_state() != "running"
    guest.ask("cont")
    guest.console.wait_passes(1)

    snapshot("quit", "--then", "quit")
    assert guest.process is not None
    assert guest.process.kill() == 0, "it was to end by itself"


@pytest.mark.needs("qemu10")
def test_image_made_while_the_guest_ran_is_intact(
    lab: Lab, guest_image: GuestImage, run_dir: Path
) -> None:
    """Of a QEMU that loses no write then; some pages are sent again, as they were rewritten."""
    qemu = Path(os.environ["QPC_QEMU10"])
    guest = lab.boot(guest_image, qemu)
    live = take_snapshot(guest, run_dir / "live", qemu, "memfd", "--max-downtime", "100")
    # One when all of it is sent, one when the guest stands; the others while it ran.
    assert guest.ask("query-migrate")["ram"]["dirty-sync-count"] >= 3
    guest.kill()
    restored = lab.restore(live)
    goes_on_from(restored, live)
    restored.console.wait_passes(2)


def migration_settings(guest: Guest) -> tuple[object, object]:
    parameters = guest.ask("query-migrate-parameters")
    return guest.ask("query-migrate-capabilities"), parameters


def test_image_that_exists_is_not_overwritten(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    kept: Snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(kept)
    refused("snapshot", waiting.qmp_path, kept.image, status=2, words=["is there already", "name"])
    cli("image", "verify", kept.image)


def test_monitor_that_is_not_there_is_named(run_dir: Path) -> None:
    missing = run_dir / "no.sock"
    refused("snapshot", missing, run_dir / "image", status=8, words=[str(missing), "QMP"])
    assert not (run_dir / "image").exists()
