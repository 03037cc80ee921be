"""A QEMU that loses writes between two passes of pre-copy is not asked for such passes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from libvirtd.conftest import Hosts
from libvirtd.domains import start_domain
from vm.guests import PATIENCE

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "root")


@pytest.mark.parametrize(
    "stack",
    [
        pytest.param("libvirt", marks=pytest.mark.needs("libvirt")),
        pytest.param("libvirt11", marks=[pytest.mark.needs("libvirt11"), pytest.mark.soak]),
    ],
)
def test_whole_passes_are_refused_where_they_lose_writes(
    hosts: Hosts, shared_guest: GuestImage, shared_dir: Path, stack: str
) -> None:
    source, target = hosts.get(stack), hosts.get(stack, "beta")
    hosts.link(source, target)
    start_domain(source, shared_guest, shared_dir, fill_mib=8)

    def verdict(*options: object) -> str:
        """Of the checks of both hosts; what other checks say does not matter here."""
        tool = (sys.executable, "-m", "qemu_postcopy", "migrate", "--dry-run")
        done = subprocess.run(
            source.command(*tool, *options, "guest", target.uri),
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        lines = (done.stdout + done.stderr).splitlines()
        found = [line.split()[0] for line in lines if "pre-copy: under TCG" in line]
        return found[0] if found else "none"

    old = stack == "libvirt"
    assert verdict() == ("refused" if old else "none")
    assert verdict("--precopy-only") == ("refused" if old else "none")
    assert verdict("--accept-lost-writes") == ("hint" if old else "none")
    assert verdict("--after-passes", 0) == "none"
    # Nothing is lost of a guest that does not run.
    source.virsh("suspend", "guest")
    assert verdict("--precopy-only") == "none"
