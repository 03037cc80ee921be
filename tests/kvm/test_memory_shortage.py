"""Memory that the host cannot give: the guest waits, and goes on when there is some.

Without us QEMU would be ended by SIGBUS at its first touch.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from kvm.memory import FILE, MEMFD, ONE, Case, Mount, Start, backend
from kvm.micro import RAM_BYTES, RESTORE, save, stands_still, wait_whole_passes
from vm.guests import MIB, Guest, Lab, wait_until

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "cc", "root")

#: Less than what the guest verifies.
ROOM_BYTES = 6 * MIB


def check_waits(guest: Guest, give: Callable[[], None]) -> None:
    """The guest stops for want of a page, its status says why, and with memory it goes on."""
    wait_until(lambda: guest.status()["trouble"], "the guest wants a page that cannot be had")
    assert "memory" in guest.status()["trouble"]
    assert stands_still(guest)
    assert guest.alive()
    give()
    wait_whole_passes(guest, 1)
    assert not guest.status()["trouble"]


def restored_into(lab: Lab, start: Start, qemu: Path, run_dir: Path, case: Case) -> Guest:
    """A guest of this memory that was saved elsewhere."""
    snapshot = save(start(qemu, (*ONE, *backend(MEMFD, "share=on"))), run_dir / "image", qemu)
    return lab.attach(start(qemu, case, waiting=True), snapshot.image, *RESTORE)


def test_a_full_tmpfs_makes_the_guest_wait(
    qemu_binary: Path, lab: Lab, run_dir: Path, start: Start, mount: Mount
) -> None:
    folder = mount("tmpfs", f"size={ROOM_BYTES}")
    case = (*ONE, *backend(FILE, "share=on", f"mem-path={folder / 'ram'}"))
    guest = restored_into(lab, start, qemu_binary, run_dir, case)

    def give() -> None:
        subprocess.run(["mount", "-o", f"remount,size={2 * RAM_BYTES}", folder], check=True)

    check_waits(guest, give)
    guest.kill()


@pytest.mark.needs("hugetlb")
def test_huge_pages_that_are_used_up_make_the_guest_wait(
    qemu: Path, lab: Lab, run_dir: Path, start: Start, mount: Mount
) -> None:
    """With reserve=off nothing is promised to QEMU."""
    lab.need_huge_pages(2 * RAM_BYTES)
    folder = mount("hugetlbfs", f"pagesize=2M,size={RAM_BYTES + ROOM_BYTES}")
    other = folder / "other"
    subprocess.run(["fallocate", "-l", str(RAM_BYTES), other], check=True)
    case = (*ONE, *backend(FILE, "share=on", "reserve=off", f"mem-path={folder / 'ram'}"))
    guest = restored_into(lab, start, qemu, run_dir, case)
    check_waits(guest, other.unlink)
    guest.kill()
