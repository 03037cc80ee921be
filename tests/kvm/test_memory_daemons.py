"""What the kernel does to memory by itself must not fill a missing page: huge pages are made of
small ones and the holes between them, equal pages are merged.

Each test has the daemon work on a guest of which one page in 2 MiB is there, and checks that it
does work where nothing is missing.
"""

from __future__ import annotations

import ctypes
import fcntl
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from kvm.memory import FILE, MEMFD, ONE, RAM, Case, Mount, Start, backend
from kvm.micro import RESTORE, passes, save, wait_whole_passes
from vm.guests import MIB, Guest, Lab, cli, wait_until

from qemu_postcopy.images.micro_guest import AREA_START

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "cc", "root")

SETTINGS_LOCK = Path(tempfile.gettempdir(), "qpc-memory-settings.lock")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
KSM = Path("/sys/kernel/mm/ksm")
SYS_PROCESS_MADVISE = 440
MADV_COLLAPSE = 25
HUGE_BYTES = 2 * MIB
KINDS: dict[str, Case] = {
    # QEMU maps files at any multiple of 4 KiB, unless told otherwise; then there is no huge page.
    "file": (*ONE, *backend(FILE, "share=on", "mem-path=@", "align=2M")),
    "anonymous": (*ONE, *backend(RAM)),
}


@contextmanager
def settings(folder: Path, values: Mapping[str, object]) -> Iterator[None]:
    """Changes settings of the kernel for a while; alone in doing so."""
    with SETTINGS_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = {}
        try:
            for name, value in values.items():
                path = folder / name
                text = path.read_text()
                chosen = re.search(r"\[(\w+)\]", text)
                before[path] = chosen[1] if chosen else text
                path.write_text(str(value))
            yield
        finally:
            for path, text in before.items():
                path.write_text(text)


class IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def ram_mapping(guest: Guest) -> tuple[int, int]:
    """Begin and end of the mapping under control."""
    text = Path(f"/proc/{guest.pid}/smaps").read_text()
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw.*?^VmFlags:([^\n]*)$", text, re.M | re.S)
    ranges = [(int(a, 16), int(b, 16)) for a, b, flags in found if "um" in flags.split()]
    assert len(ranges) == 1
    return ranges[0]


def mapping_kib(guest: Guest, begin: int, *names: str) -> int:
    """The sum of these lines of the mapping in smaps, in KiB."""
    text = Path(f"/proc/{guest.pid}/smaps").read_text()
    part = text[text.index(f"{begin:x}-") :]
    part = part[: part.index("VmFlags")]
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", part, re.MULTILINE))
    return sum(int(lines[name]) for name in names)


def collapse(guest: Guest, begin: int, end: int) -> int:
    """Asks for a huge page everywhere; returns how many there were."""
    libc = ctypes.CDLL(None, use_errno=True)
    made = 0
    for address in range(-(-begin // HUGE_BYTES) * HUGE_BYTES, end - HUGE_BYTES + 1, HUGE_BYTES):
        vector = IoVector(address, HUGE_BYTES)
        done = libc.syscall(
            SYS_PROCESS_MADVISE, guest.identity.pidfd, ctypes.byref(vector), 1, MADV_COLLAPSE, 0
        )
        made += done == HUGE_BYTES
    return made


def touch_one_page_of_each(guest: Guest) -> None:
    """By QEMU itself, so that each 2 MiB of the guest's data have a page and many missing ones."""
    for address in range(AREA_START, AREA_START + 8 * MIB, HUGE_BYTES):
        guest.ask("human-monitor-command", **{"command-line": f"xp /1xg {address + 4096:#x}"})


def full_scans(folder: Path) -> int:
    return int((folder / "full_scans").read_text())


def wait_full_scans(folder: Path, count: int) -> None:
    """Until the daemon has looked at everything so many times from begin to end."""
    wanted = full_scans(folder) + 1 + count
    wait_until(lambda: full_scans(folder) >= wanted, f"{count} scans of {folder}")


@pytest.mark.parametrize("kind", KINDS)
def test_no_missing_page_becomes_part_of_a_huge_page(
    kind: str, qemu_binary: Path, lab: Lab, run_dir: Path, start: Start
) -> None:
    """Asked for by process_madvise(MADV_COLLAPSE), which looks at no setting of the host's."""
    snapshot = save(start(qemu_binary, KINDS[kind]), run_dir / "image", qemu_binary)
    guest = lab.restore(snapshot, *RESTORE, "--paused")
    touch_one_page_of_each(guest)
    begin, end = ram_mapping(guest)
    before = guest.status()["statistics"]
    assert collapse(guest, begin, end) == 0
    guest.ask("cont")
    while len(passes(guest)) < 2:
        collapse(guest, begin, end)
    after = guest.status()["statistics"]
    assert after["faults"] - before["faults"] >= 8 * MIB // 4096 - 100
    cli("fill", guest.name)
    guest.wait_sidecar_gone()
    made = collapse(guest, begin, end)
    wait_whole_passes(guest, 1)
    print(f"{made} huge pages when nothing is missing")
    assert made > 0


#: How huge pages are turned on: a mount option of tmpfs, or the kernel's setting for memfds and,
#: with `force`, for everything; for anonymous memory another one.
TURNED_ON = {
    "anonymous": ("", {"enabled": "always"}),
    "tmpfs always": ("huge=always", {}),
    "tmpfs within_size": ("huge=within_size", {}),
    "tmpfs advise": ("huge=advise", {}),
    "memfd always": ("", {"shmem_enabled": "always"}),
    "memfd within_size": ("", {"shmem_enabled": "within_size"}),
    "memfd advise": ("", {"shmem_enabled": "advise"}),
    "tmpfs force": ("huge=never", {"shmem_enabled": "force"}),
}


@pytest.mark.parametrize(
    "turned_on",
    [
        pytest.param(name, marks=() if name in ("anonymous", "tmpfs always") else pytest.mark.soak)
        for name in TURNED_ON
    ],
)
def test_khugepaged_leaves_missing_pages_alone(
    turned_on: str, qemu: Path, lab: Lab, run_dir: Path, start: Start, mount: Mount
) -> None:
    """Scanning without a pause; QEMU has advised huge pages for all of the guest's memory."""
    option, values = TURNED_ON[turned_on]
    case = KINDS["anonymous"]
    if option:
        path = mount("tmpfs", f"size=64M,{option}") / "ram"
        case = (*ONE, *backend(FILE, "share=on", f"mem-path={path}", "align=2M"))
    elif turned_on.startswith("memfd"):
        case = (*ONE, *backend(MEMFD, "share=on"))
    snapshot = save(start(qemu, case), run_dir / "image", qemu)
    wanted = {
        **values,
        "khugepaged/scan_sleep_millisecs": 0,
        "khugepaged/alloc_sleep_millisecs": 0,
        "khugepaged/pages_to_scan": 100000,
    }
    with settings(HUGE_PAGES, wanted):
        guest = lab.restore(snapshot, *RESTORE, "--paused")
        touch_one_page_of_each(guest)
        begin, _ = ram_mapping(guest)
        wait_full_scans(HUGE_PAGES / "khugepaged", 2)
        assert mapping_kib(guest, begin, "Rss") < HUGE_BYTES >> 10
        guest.ask("cont")
        wait_whole_passes(guest, 1)
        cli("fill", guest.name)
        guest.wait_sidecar_gone()
        if begin % HUGE_BYTES == 0:  # always where it could be asked for, see KINDS
            wait_until(
                lambda: mapping_kib(guest, begin, "AnonHugePages", "ShmemPmdMapped"), "a huge page"
            )
        wait_whole_passes(guest, 1)
        guest.kill()


def test_merged_pages_are_no_missing_pages(
    qemu_binary: Path, lab: Lab, run_dir: Path, start: Start
) -> None:
    """Two guests from one image have the same pages; zero pages become the kernel's own."""
    case = (*ONE, *backend(RAM, "merge=on"))
    snapshot = save(start(qemu_binary, case), run_dir / "image", qemu_binary)
    wanted = {"use_zero_pages": 1, "sleep_millisecs": 0, "pages_to_scan": 20000, "run": 1}
    with settings(KSM, wanted):
        guests = [lab.restore(snapshot, *RESTORE, "--paused", name=name) for name in "ab"]
        for guest in guests:
            touch_one_page_of_each(guest)
        wait_full_scans(KSM, 2)
        for guest in guests:
            begin, _ = ram_mapping(guest)
            assert mapping_kib(guest, begin, "Rss") < 2048
            guest.ask("cont")
            wait_whole_passes(guest, 1)

        def merged() -> int:
            text = Path(f"/proc/{guests[0].pid}/ksm_stat").read_text()
            found = re.search(r"^ksm_merging_pages (\d+)", text, re.M)
            return int(found[1]) if found else 0

        wait_until(merged, "merged pages")
        for guest in guests:
            cli("fill", guest.name)
            guest.wait_sidecar_gone()
        wait_full_scans(KSM, 2)
        print(f"{merged()} pages of one guest are merged")
        for guest in guests:
            wait_whole_passes(guest, 1)
