"""Huge pages, transparent huge pages, room in memory and in /dev/shm: all read from the kernel."""

from __future__ import annotations

import os
import re
from pathlib import Path

from qemu_postcopy.doctor.report import Finding
from qemu_postcopy.vm.collapse import missing_pages_stay_missing

AREA = "memory"
POOLS = Path("/sys/kernel/mm/hugepages")
TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage")
SHM = Path("/dev/shm")

MIB = 1 << 20
GIB = 1 << 30
#: The demo's guest has 512 MiB of patterned memory, twice at one moment, and the image beside it.
DEMO_BYTES = 2 * GIB


def binary_size(size_bytes: int) -> str:
    """``512 MiB``, ``12.5 GiB``: a size as people read it."""
    if size_bytes >= GIB:
        return f"{round(size_bytes / GIB, 1):g} GiB"
    return f"{size_bytes // MIB} MiB" if size_bytes >= MIB else f"{size_bytes // 1024} KiB"


def meminfo_bytes(key: str) -> int:
    """A line of /proc/meminfo (which counts in KiB); 0 where the kernel has no such line."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return 0


def pool_findings() -> list[Finding]:
    """One finding for each page size of hugetlbfs (Documentation/admin-guide/mm/hugetlbpage)."""
    findings = []
    default_bytes = meminfo_bytes("Hugepagesize")
    for pool in sorted(POOLS.glob("hugepages-*kB")):
        page_bytes = int(pool.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        total = int((pool / "nr_hugepages").read_text())
        free = int((pool / "free_hugepages").read_text())
        idle = page_bytes == default_bytes and free == 0
        findings.append(
            Finding(
                f"memory.hugepages.{page_bytes // 1024}kB",
                AREA,
                f"huge pages of {binary_size(page_bytes)}",
                "warn" if idle else "ok",
                f"{free} free of {total} reserved",
                "Guests on huge pages of this size cannot be started here.",
                f"echo NUMBER > {pool / 'nr_hugepages'}" if idle else "",
                data={"page_bytes": page_bytes, "total": total, "free": free},
            )
        )
    if not findings:
        findings.append(
            Finding(
                "memory.hugepages",
                AREA,
                "huge pages",
                "missing",
                "this kernel has no hugetlbfs",
                "Guests on huge pages cannot be started here.",
                "Use a kernel with CONFIG_HUGETLBFS.",
            )
        )
    return findings


def chosen(setting: Path) -> str:
    """The word in brackets of a line such as ``always [madvise] never``."""
    if not setting.exists():
        return "absent"
    match = re.search(r"\[(\w+)\]", setting.read_text())
    return match.group(1) if match else "unreadable"


def transparent_findings() -> list[Finding]:
    """Transparent huge pages of anonymous memory and of shmem (admin-guide/mm/transhuge)."""
    anonymous = chosen(TRANSPARENT / "enabled")
    shmem = chosen(TRANSPARENT / "shmem_enabled")
    anonymous_usable = anonymous in ("always", "madvise")
    stay_missing = missing_pages_stay_missing()
    shmem_off = shmem in ("never", "deny", "absent")
    return [
        Finding(
            "memory.thp",
            AREA,
            "transparent huge pages, anonymous memory",
            "ok" if anonymous_usable else "warn",
            anonymous,
            "Restored guests stay on 4 KiB pages and run somewhat slower.",
            ""
            if anonymous_usable
            else f"echo madvise > {TRANSPARENT / 'enabled'} (a kernel without it: none)",
            data={"enabled": anonymous},
        ),
        Finding(
            "memory.thp_shmem",
            AREA,
            "transparent huge pages, memfd and /dev/shm",
            "ok" if stay_missing else "warn" if shmem_off else "missing",
            f"{shmem}; khugepaged "
            + ("leaves missing pages alone" if stay_missing else "would fill missing pages"),
            "Guests in memfd or tmpfs are refused where such pages are on: a missing page would"
            " become zeros, and no fault would tell.",
            ""
            if stay_missing
            else f"echo never > {TRANSPARENT / 'shmem_enabled'} (and no tmpfs with huge=)",
            data={"shmem_enabled": shmem, "missing_pages_stay_missing": stay_missing},
        ),
    ]


def free_bytes(directory: Path) -> int:
    """What a process without privileges may still write into this file system."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def room_findings() -> list[Finding]:
    """Room for a guest in memory and in /dev/shm."""
    available = meminfo_bytes("MemAvailable")
    shm = free_bytes(SHM) if SHM.is_dir() else 0
    return [
        Finding(
            "memory.available",
            AREA,
            "memory that is available",
            "ok" if available >= DEMO_BYTES else "warn",
            binary_size(available),
            f"The demo needs about {binary_size(DEMO_BYTES)}.",
            ""
            if available >= DEMO_BYTES
            else "Stop something, or: qemu-postcopy demo --memory 128M",
            data={"bytes": available},
        ),
        Finding(
            "memory.dev_shm",
            AREA,
            "room in /dev/shm",
            "ok" if shm >= DEMO_BYTES else "warn",
            binary_size(shm) if SHM.is_dir() else "not mounted",
            "Guests whose memory is a file in /dev/shm, and images kept there, must fit in.",
            ""
            if shm >= DEMO_BYTES
            else "mount -o remount,size=4G /dev/shm (in a container: --shm-size)",
            data={"bytes": shm},
        ),
    ]


def probe() -> list[Finding]:
    """Reads the settings; changes nothing."""
    return [*pool_findings(), *transparent_findings(), *room_findings()]
