"""Domains move between two real libvirtds, driven by the tool, over a network that fails."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from libvirtd.domains import MIB, domain_xml
from libvirtd.pairs import FILL_MIB, POLICY, Gap, Pair, busy_domain, interrupted_soon
from vm.guests import PATIENCE, wait_until

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")


def test_a_guest_that_never_converges_is_switched_by_the_policy_and_arrives_whole(
    pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(pair, shared_guest, shared_dir)
    report = pair.migrate(*POLICY[pair.source.stack.name])
    assert pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
    assert report["mode"] == "post-copy" and report["switch_reason"]
    assert report["postcopy_requests"] > 0 and report["downtime_ms"] is not None
    assert report["transferred_bytes"] > FILL_MIB * MIB
    assert report["interruptions"] == []


def test_checks_refuse_before_anything_is_begun(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    disk = shared_dir / "disk"
    disk.write_bytes(bytes(MIB))
    disk.chmod(0o666)
    busy_domain(
        new_pair, shared_guest, shared_dir, fill_mib=8,
        extra_devices=f"<disk type='file'><source file='{disk}'/><target dev='vda'/></disk>",
    )  # fmt: skip
    said = new_pair.source.tool(
        "migrate", "--dry-run", "guest", new_pair.target.uri, status=5
    ).stderr
    assert str(disk) in said and "shared storage" in said
    said = new_pair.source.tool(
        "migrate", "--dry-run", "--unsafe", "--multifd", 2, "guest", new_pair.target.uri, status=5
    ).stderr
    assert "multifd: not with post-copy" in said
    assert new_pair.where() == (["guest"], [])
    # The operator knows better here: both hosts see this file.
    new_pair.migrate("--unsafe", "--after-passes", 0)
    assert new_pair.where() == ([], ["guest"])
    # A guest of the same name is in the way now.
    said = new_pair.target.tool(
        "migrate", "--dry-run", "guest", new_pair.target.uri, status=5
    ).stderr
    assert "active at the destination already" in said


def test_ctrl_c_in_pre_copy_leaves_the_guest_running_at_the_source(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(new_pair, shared_guest, shared_dir)
    begun = new_pair.begin("--after-passes", 1000, "--no-on-stall")
    begun.wait_said("pre-copy, pass")
    begun.signal(signal.SIGINT)
    begun.report(status=130)
    assert new_pair.where() == (["guest"], [])
    domain.console.wait_passes(1)


def test_a_cut_link_is_recovered_without_a_hand_on_it(
    old_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(old_pair, shared_guest, shared_dir)
    old_pair.link.limit(8 * MIB)
    begun = old_pair.begin(*POLICY["libvirt"], "--supervise", "--stall", 2)
    interrupted_soon(old_pair, domain)
    old_pair.link.cut()
    begun.wait_said("post-copy is interrupted")
    old_pair.link.limit(200 * MIB)
    old_pair.link.mend()
    report = begun.report()
    assert old_pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
    (interruption,) = report["interruptions"]
    assert interruption["seconds"] > 0 and interruption["attempts"] >= 1
    assert report["mode"] == "post-copy"


def test_an_interrupted_post_copy_is_resumed_by_another_run(
    old_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(old_pair, shared_guest, shared_dir)
    old_pair.link.limit(8 * MIB)
    begun = old_pair.begin(*POLICY["libvirt"])
    interrupted_soon(old_pair, domain)
    old_pair.source.virsh("domjobabort", "--postcopy", "guest")
    begun.report(status=15)
    assert any("--resume" in line for line in begun.lines)
    assert old_pair.where() == (["guest"], ["guest"])
    old_pair.link.limit(200 * MIB)
    report = old_pair.migrate("--resume", "--postcopy-bandwidth", "512M")
    assert old_pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
    assert len(report["interruptions"]) == 1


def test_where_a_resume_would_crash_libvirt_the_guest_is_left_waiting(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(new_pair, shared_guest, shared_dir)
    new_pair.link.limit(16 * MIB)
    begun = new_pair.begin("--after-passes", 0)
    # One that is interrupted before the guest has begun there ends the QEMU there.
    interrupted_soon(new_pair, domain)
    new_pair.source.virsh("domjobabort", "--postcopy", "guest")
    begun.report(status=15)
    said = new_pair.source.tool("migrate", "--resume", "guest", new_pair.target.uri, status=5)
    assert "nothing is lost" in said.stderr
    assert new_pair.where() == (["guest"], ["guest"])


def test_a_domain_that_is_off_at_both_hosts_is_not_said_to_have_moved(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    file = shared_dir / "guest.xml"
    file.write_text(domain_xml("guest", shared_guest, shared_dir / "guest.console"))
    new_pair.source.virsh("define", file)
    file.write_text(new_pair.source.virsh("dumpxml", "guest"))  # with its UUID
    new_pair.target.virsh("define", file)
    said = new_pair.source.tool("migrate", "--watch", "guest", new_pair.target.uri, status=13)
    assert "shut off at both hosts" in said.stderr
    said = new_pair.source.tool("migrate", "--watch", "guest", status=14)
    assert "without DESTURI" in said.stderr
    # And what becomes of its two definitions is told before a migration.
    said = new_pair.source.tool("migrate", "--dry-run", "guest", new_pair.target.uri, status=5)
    assert "--persistent" in said.stdout and "--undefinesource" in said.stdout


def test_a_migration_that_virsh_began_is_watched_and_switched(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(new_pair, shared_guest, shared_dir)
    virsh = new_pair.source.popen(
        "virsh", "migrate", "--live", "--postcopy", "guest", new_pair.target.uri
    )
    wait_until(lambda: "Outgoing migration" in new_pair.source.virsh("domjobinfo", "guest"),
               "virsh has begun")  # fmt: skip
    report = new_pair.migrate("--watch", "--after-passes", 1)
    assert virsh.wait(PATIENCE) == 0
    assert new_pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
    assert report["mode"] == "post-copy" and report["switch_reason"]


@pytest.mark.soak
def test_a_migration_that_virsh_began_is_recovered(
    old_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = busy_domain(old_pair, shared_guest, shared_dir)
    old_pair.link.limit(8 * MIB)
    virsh = old_pair.source.popen(
        "virsh", "migrate", "--live", "--p2p", "--postcopy", "guest", old_pair.target.uri
    )
    wait_until(
        lambda: "Outgoing migration" in old_pair.source.virsh("domjobinfo", "guest"),
        "virsh has begun",
    )
    begun = old_pair.begin("--watch", "--after-passes", 0, "--supervise")
    interrupted_soon(old_pair, domain)
    old_pair.source.virsh("domjobabort", "--postcopy", "guest")
    begun.wait_said("post-copy is interrupted")
    old_pair.link.limit(200 * MIB)
    begun.report()
    assert virsh.wait(PATIENCE) != 0
    assert old_pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["pre-copy", "post-copy"])
def test_the_tool_is_killed_and_another_run_sees_the_migration_through(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path, stage: str
) -> None:
    domain = busy_domain(new_pair, shared_guest, shared_dir)
    new_pair.link.limit(24 * MIB)
    policy = (
        ("--after-passes", 0) if stage == "post-copy" else ("--after-passes", 9, "--no-on-stall")
    )
    begun = new_pair.begin(*policy)
    if stage == "post-copy":
        interrupted_soon(new_pair, domain)
    else:
        begun.wait_said("pre-copy, pass 1")
    begun.signal(signal.SIGKILL)
    begun.process.wait(PATIENCE)
    new_pair.migrate("--watch", "--after-passes", 0)
    assert new_pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)


def moved_by_tool(way: Pair) -> dict[str, float]:
    report = way.migrate()
    return {
        "downtime_ms": report["downtime_ms"],
        "seconds": report["total_seconds"],
        "requests": report["postcopy_requests"],
    }


def moved_by_virsh(way: Pair) -> dict[str, float]:
    """Switched by virsh when the first pass is complete."""
    # At the destination libvirt keeps no figures of it; at the source its last event has them.
    event = ("event", "--domain", "guest", "--event", "job-completed", "--timeout", int(PATIENCE))
    telling = way.source.popen("virsh", *event, stdout=subprocess.PIPE, text=True)
    words = ("--live", "--p2p", "--postcopy", "--postcopy-after-precopy", "guest", way.target.uri)
    way.source.virsh("migrate", *words)
    said = telling.communicate(timeout=PATIENCE)[0]
    raw = dict(line.strip().split(": ", 1) for line in said.splitlines() if ": " in line)
    return {
        "downtime_ms": float(raw["downtime"]),
        "seconds": float(raw["time_elapsed"]) / 1000,
        "requests": float(raw["memory_postcopy_requests"]),
    }


@pytest.mark.soak
def test_gap_and_downtime_beside_plain_virsh(
    new_pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    """Prints them; asserts no time.  Both move the same guest, in turns, in both directions."""
    domain = busy_domain(new_pair, shared_guest, shared_dir)
    ways = (new_pair, Pair(new_pair.target, new_pair.source, new_pair.link))
    movers = {"driven": moved_by_tool, "virsh": moved_by_virsh}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in movers}
    for number, name in enumerate(("driven", "virsh", "virsh", "driven", "driven", "virsh")):
        way = ways[number % 2]
        with Gap(domain) as gap:
            figures = movers[name](way)
            domain.console.wait_passes(1)
        assert way.where() == ([], ["guest"])
        seen[name].append({"gap_ms": gap.longest * 1000, **figures})
    with Gap(domain) as gap:
        domain.console.wait_passes(1)
    print(f"\nwithout a migration: gap {gap.longest * 1000:.0f} ms")
    for name, moves in seen.items():
        for what in moves[0]:
            values = sorted(move[what] for move in moves)
            print(f"{name:7} {what:12} " + " ".join(f"{value:8.1f}" for value in values))
