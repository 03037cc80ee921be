"""Whoever is killed while a domain is restored lazily, at whatever stage: nothing is lost.

Afterwards either there is no domain and the save file is as it was, so that it can be restored
again; or there is one, which is served on by another sidecar and has every word of its memory.
The stages are held, so that a kill comes in the middle of each: libvirtd is stopped, an emulator
waits before it becomes QEMU, page data stalls while the device state is loaded.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import Domain
from libvirtd.saved import (
    MEMFD,
    left_beside,
    run_directories,
    saved_domain,
    sidecars,
    wait_detached,
)
from vm.guests import wait_until
from vm.kills import SEED

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")

EMULATOR = "/usr/bin/qemu-system-x86_64"
STALL = '[stall]\nprobability = 1.0\nms = "until told"\n'
#: Of the long test.
KILLS = int(os.environ.get("QPC_LIBVIRT_KILLS", "40"))


@dataclass
class Restore:
    """One restore under way: the command, and the sidecar that it has started."""

    host: Host
    domain: Domain
    path: Path
    content: bytes
    command: subprocess.Popen[bytes]

    @classmethod
    def begin(
        cls, host: Host, domain: Domain, path: Path, content: bytes, *options: object
    ) -> Restore:
        words = [sys.executable, "-m", "qemu_postcopy", "restore", "--connect", "qemu:///system"]
        command = host.popen(
            *words, "--no-background", *options, path,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return cls(host, domain, path, content, command)

    def record(self) -> dict[str, object]:
        path = self.host.directory / "run/qemu-postcopy/guest/session.json"
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        assert isinstance(found, dict)
        return found

    def fifo(self) -> bool:
        return (self.host.directory / "run/qemu-postcopy/guest/stream").exists()

    def kill(self, victim: str) -> None:
        if victim == "command":
            # Also the sidecar where it has not led a session of its own yet: there is none then.
            for pid in self.host.processes(f"{sys.executable}\0-m\0qemu_postcopy"):
                if os.getsid(pid) != pid:
                    os.kill(pid, signal.SIGKILL)
        elif victim == "sidecar":
            for pid in sidecars(self.host):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        else:
            self.host.restart_daemon("libvirtd", signal.SIGKILL)
        self.command.wait(60)

    def require_nothing_lost(self) -> str:
        """Brings about what is to be; returns what there was: a `guest` or `none`."""
        if sidecars(self.host) == []:
            # By the operator; a restore that had not come so far as a guest is told of so.
            subprocess.run(
                self.host.command(sys.executable, "-m", "qemu_postcopy", "recover", "guest"),
                capture_output=True, timeout=120, check=False,
            )  # fmt: skip
        wait_until(self._settled, "a guest that runs, or none and no sidecar", 60)
        assert self.path.read_bytes() == self.content
        if "guest" not in self.host.domains():
            assert self.host.qemus() == []
            return "none"
        if self.domain.state() == "paused":
            self.host.virsh("resume", "guest")
        self.domain.console.wait_passes(1)
        if sidecars(self.host):
            self.host.tool("fill", "guest")
            wait_detached(self.host, "guest")
        self.domain.console.wait_passes(1)
        self.host.virsh("destroy", "guest")
        return "guest"

    def _settled(self) -> bool:
        names = self.host.domains()
        if "guest" not in names:
            return not sidecars(self.host) and not self.host.qemus()
        return self.record().get("state") in ("running", "complete", "detached")


def waiting_emulator(directory: Path) -> tuple[Path, Path]:
    """A program that becomes QEMU when a file is gone, and that file."""
    hold, program = directory / "hold", directory / "qemu-system-x86_64"
    wait = f"while [ -e {hold} ]; do sleep 0.05; done"
    program.write_text(f'#!/bin/sh\n{wait}\nexec {EMULATOR} "$@"\n')
    program.chmod(0o755)
    return program, hold


@pytest.mark.parametrize(
    "stage",
    [
        "loading",
        *(
            pytest.param(stage, marks=pytest.mark.soak)
            for stage in ("connecting", "starting", "filling", "complete")
        ),
    ],
)
def test_nothing_is_lost_when_somebody_is_killed(
    host: Host, shared_guest: GuestImage, shared_dir: Path, stage: str
) -> None:
    program, hold = waiting_emulator(shared_dir)
    domain, path = saved_domain(
        host, shared_guest, shared_dir, fill_mib=16, memory_backing=MEMFD,
        emulator=str(program) if stage == "starting" else EMULATOR,
    )  # fmt: skip
    content = path.read_bytes()
    stalled = shared_dir / "stall.toml"
    stalled.write_text(STALL)
    daemon = host.daemon("libvirtd")
    for victim in ("sidecar", "command", "libvirtd"):
        if stage == "connecting":
            if victim == "libvirtd":
                continue  # it is the one that is held
            os.kill(daemon, signal.SIGSTOP)
            restore = Restore.begin(host, domain, path, content)
            wait_until(lambda: left_beside(shared_dir) and sidecars(host)[1:], "it connects")
            restore.kill(victim)
            # nsenter stops with its child, and then does not see it end.
            for pid in (daemon, host.daemon_parent("libvirtd")):
                os.kill(pid, signal.SIGCONT)
        elif stage == "starting":
            hold.touch()
            restore = Restore.begin(host, domain, path, content)
            wait_until(lambda: host.processes(f"/bin/sh\0{program}"), "the emulator waits")
            restore.kill(victim)
            hold.unlink()
        elif stage == "loading":
            restore = Restore.begin(host, domain, path, content, "--chaos", stalled)
            wait_until(partial(serves, restore), "its state is loaded")
            wait_for_faults(host)
            restore.kill(victim)
            if sidecars(host):
                host.tool("chaos", "guest", "--off")
                host.tool("chaos", "guest", "--release")
        else:
            restore = Restore.begin(host, domain, path, content)
            restore.command.wait(60)
            if stage == "complete":
                host.tool("fill", "guest")
                wait_detached(host, "guest")
            restore.kill(victim)
        found = restore.require_nothing_lost()
        print(f"{host.stack.name}, {stage}, {victim}: {found}")
        if stage in ("filling", "complete"):
            assert found == "guest"
        # Whatever was left over, the next restore has no use for it and takes it away.
        host.tool("restore", "--connect", "qemu:///system", "--wait", "complete", path)
        domain.console.wait_passes(1)
        host.virsh("destroy", "guest")
        assert left_beside(shared_dir) == []
        assert sidecars(host) == []
    assert run_directories(host) in ([], ["guest"])


def serves(restore: Restore) -> bool:
    return restore.record().get("state") == "serving"


def wait_for_faults(host: Host) -> None:
    """Until QEMU's load waits for a page."""

    def waits() -> bool:
        done = host.run(sys.executable, "-m", "qemu_postcopy", "status", "--json", "guest")
        (entry,) = json.loads(done.stdout)
        return bool(entry["statistics"].get("faults_waiting"))

    wait_until(waits, "QEMU waits for a page of its state")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_is_lost_by_kills_at_random_moments(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir, fill_mib=16, memory_backing=MEMFD)
    content = path.read_bytes()
    moments = random.Random(SEED)
    found: dict[str, int] = {}
    for number in range(KILLS):
        victim = moments.choice(("sidecar", "command", "libvirtd"))
        restore = Restore.begin(host, domain, path, content)
        # The time is the input here, not readiness.
        time.sleep(moments.uniform(0.0, 1.5))
        restore.kill(victim)
        outcome = restore.require_nothing_lost()
        found[f"{victim}: {outcome}"] = found.get(f"{victim}: {outcome}", 0) + 1
        assert sidecars(host) == [], f"kill {number}"
    print(f"QPC_SEED={SEED}, {host.stack.name}: {found}")
    host.tool("restore", "--connect", "qemu:///system", "--wait", "complete", path)
    domain.console.wait_passes(1)
    host.virsh("destroy", "guest")
    assert left_beside(shared_dir) == []
