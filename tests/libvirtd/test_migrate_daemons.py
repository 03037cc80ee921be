"""A libvirtd that is killed and started again loses nothing of a migration, whichever host and
phase it was."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from libvirtd.domains import MIB
from libvirtd.pairs import NEWER_FIRST, SLOW, Pair, busy_domain, interrupted_soon
from vm.guests import wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")


#: Nothing is switched, or only by something else, within the first pass: there QEMU 7.2, which is
#: refused whole passes, loses nothing.
FIRST_PASS = ("--after-passes", 1000, "--no-on-stall", "--accept-lost-writes")
#: What the tool calls the two hosts.
OTHER_WORD = {"source": "source", "target": "destination"}
SIDES = [pytest.param("source", marks=pytest.mark.soak), "target"]


@pytest.mark.parametrize("side", [pytest.param("source", marks=pytest.mark.soak), "target"])
def test_a_post_copy_is_seen_through_while_a_libvirtd_is_killed_and_started_again(
    pair: Pair, shared_guest: GuestImage, shared_dir: Path, side: str
) -> None:
    domain = busy_domain(pair, shared_guest, shared_dir)
    pair.link.limit(16 * MIB)
    begun = pair.begin("--after-passes", 0)
    interrupted_soon(pair, domain)
    host = pair.source if side == "source" else pair.target
    host.restart_daemon("libvirtd", signal.SIGKILL)
    report = begun.report()
    assert pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
    assert report["mode"] == "post-copy" and report["interruptions"] == []


@NEWER_FIRST
@pytest.mark.parametrize("side", SIDES)
def test_a_libvirtd_killed_in_pre_copy_leaves_the_guest_at_the_source_and_is_named(
    pair: Pair, shared_guest: GuestImage, shared_dir: Path, side: str
) -> None:
    domain = busy_domain(pair, shared_guest, shared_dir)
    pair.link.limit(4 * MIB)  # the first pass outlasts what is done to it
    begun = pair.begin(*FIRST_PASS)
    begun.wait_said("pre-copy, pass 1")
    host = pair.source if side == "source" else pair.target
    host.restart_daemon("libvirtd", signal.SIGKILL)
    begun.report(status=14)
    assert any(f"{OTHER_WORD[side]}'s libvirtd went away" in line for line in begun.lines)
    assert any("--supervise" in line for line in begun.lines)
    wait_until(lambda: pair.where() == (["guest"], []), "nothing is left at the destination")
    assert domain.state() == "running"
    domain.console.wait_passes(1)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_supervised_migration_starts_over_after_a_libvirtd_was_restarted_in_pre_copy(
    pair: Pair, shared_guest: GuestImage, shared_dir: Path, side: str, number: signal.Signals
) -> None:
    domain = busy_domain(pair, shared_guest, shared_dir)
    pair.link.limit(4 * MIB)
    begun = pair.begin("--supervise", "--switch-after", 8, *FIRST_PASS)
    begun.wait_said("pre-copy, pass 1")
    host = pair.source if side == "source" else pair.target
    host.restart_daemon("libvirtd", number)
    begun.wait_said("Starting over")
    pair.wait_postcopy()
    pair.link.limit(SLOW)
    report = begun.report()
    assert report["started_over"] == 1 and report["mode"] == "post-copy"
    assert pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
