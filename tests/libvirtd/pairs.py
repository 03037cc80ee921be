"""Two hosts of one libvirt, joined by a network that can be cut and slowed, and a domain that is
too busy for it; what the tests of driven migrations are made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import MIB, Domain, start_domain
from libvirtd.network import Link
from vm.guests import PATIENCE, wait_until

from qemu_postcopy.images.guest_image import GuestImage

if TYPE_CHECKING:
    from libvirtd.conftest import Hosts

SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
#: The guest rewrites its memory faster than this, so pre-copy never ends.
SLOW = 48 * MIB
FILL_MIB = 64
#: QEMU 7.2 under TCG loses writes between two passes of pre-copy, with plain virsh as well: its
#: guests are switched within the first.
POLICY = {"libvirt": ("--after-passes", 0), "libvirt11": ()}

#: With the newer libvirt by default, with both in soak runs.
NEWER_FIRST = pytest.mark.parametrize(
    "pair",
    [
        pytest.param("libvirt", marks=[pytest.mark.needs("libvirt"), pytest.mark.soak]),
        pytest.param("libvirt11", marks=pytest.mark.needs("libvirt11")),
    ],
    indirect=True,
)


@dataclass(frozen=True)
class Pair:
    """Two hosts of one libvirt, joined by a slow network."""

    source: Host
    target: Host
    link: Link

    def command(self, *options: object) -> list[str]:
        tool = (sys.executable, "-m", "qemu_postcopy", "migrate")
        return self.source.command(*tool, *options, "guest", self.target.uri)

    def migrate(self, *options: object, status: int = 0) -> dict[str, Any]:
        """By the tool on the source host; its report."""
        said = self.source.tool(
            "migrate", "--json", *options, "guest", self.target.uri, status=status
        )
        report: dict[str, Any] = json.loads(said.stdout) if said.stdout else {}
        return report

    def begin(self, *options: object) -> Begun:
        return Begun(self.source, self.command("--json", *options))

    def where(self) -> tuple[list[str], list[str]]:
        return self.source.domains(), self.target.domains()

    def wait_postcopy(self) -> None:
        def switched() -> bool:
            done = self.source.virsh("domstate", "--reason", "guest")
            return "post-copy" in done

        wait_until(switched, "the guest runs at the destination")


class Begun:
    """The tool in the middle of its work."""

    def __init__(self, host: Host, command: list[str]) -> None:
        self._host = host
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def wait_said(self, words: str) -> None:
        wait_until(
            lambda: any(words in line for line in self.lines) or self.process.poll() is not None,
            f"it says {words!r}",
        )
        assert any(words in line for line in self.lines), "".join(self.lines)

    def signal(self, number: signal.Signals) -> None:
        """To the tool; what was started from here is nsenter, which keeps signals to itself."""
        (pid,) = self._host.processes(f"{sys.executable}\0-m\0qemu_postcopy\0migrate")
        os.kill(pid, number)

    def report(self, status: int = 0) -> dict[str, Any]:
        assert self.process.wait(PATIENCE) == status, "".join(self.lines)
        assert self.process.stdout is not None
        text = self.process.stdout.read()
        self._reader.join()
        report: dict[str, Any] = json.loads(text) if text else {}
        return report


@contextmanager
def joined(hosts: Hosts, stack: str) -> Iterator[Pair]:
    source, target = hosts.get(stack), hosts.get(stack, "beta")
    link = hosts.link(source, target)
    link.mend()
    link.limit(SLOW)
    before = SYSCTL.read_text()
    if stack == "libvirt":
        SYSCTL.write_text("1")  # QEMU 7.2 knows no other way to a userfaultfd
    try:
        yield Pair(source, target, link)
    finally:
        SYSCTL.write_text(before)
        link.mend()
        link.unlimit()


def busy_domain(pair: Pair, image: GuestImage, directory: Path, **choices: object) -> Domain:
    domain = start_domain(
        pair.source, image, directory, "guest", **{"fill_mib": FILL_MIB, **choices}
    )
    domain.wait_ready()
    return domain


class Gap:
    """The longest silence of a guest that ticks steadily, as its console file shows it."""

    def __init__(self, domain: Domain) -> None:
        self.path = domain.console.path
        self.longest = 0.0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        size, last = self.path.stat().st_size, time.monotonic()
        while not self._ending.wait(0.002):
            now, grown = time.monotonic(), self.path.stat().st_size
            if grown != size:
                self.longest, size, last = max(self.longest, now - last), grown, now

    def __enter__(self) -> Gap:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending.set()
        self._thread.join()


def interrupted_soon(pair: Pair, domain: Domain) -> None:
    """Until the guest runs at the destination, and has what interrupts touch.

    QEMU under TCG delivers interrupts with its lock held: one that waits for a page keeps the
    monitor waiting too, and libvirt's order to recover (it does not use out-of-band commands).
    """
    pair.wait_postcopy()
    domain.console.wait_more_ticks(10)
