"""Which host this is, and whether its disk suits images: room, and holes that cost nothing."""

from __future__ import annotations

import getpass
import os
import platform
import tempfile
from pathlib import Path

from qemu_postcopy import __version__
from qemu_postcopy.doctor.memory import DEMO_BYTES, binary_size, free_bytes
from qemu_postcopy.doctor.report import Finding

AREA = "disk"
MIB = 1 << 20


def distribution() -> str:
    """As os-release(5) puts it for people."""
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown"


def user_name() -> str:
    """The name of the effective user, or the number where it has none (in a container)."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.geteuid())


def describe() -> dict[str, str]:
    """What a reader of the report must know to place it."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "distribution": distribution(),
        "python": platform.python_version(),
        "qemu_postcopy": __version__,
        "user": user_name(),
    }


def keeps_holes(directory: Path) -> bool:
    """Whether a file of 2 MiB with data in its second half only has a hole before that."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.seek(MIB)
        file.write(b"q" * MIB)
        file.flush()
        return os.lseek(file.fileno(), 0, os.SEEK_DATA) == MIB


def holes_finding(directory: Path) -> Finding:
    try:
        holes, found = keeps_holes(directory), ""
    except OSError as error:
        holes, found = False, f"{directory}: {error.strerror}"
    return Finding(
        "disk.holes",
        AREA,
        "sparse files where temporary files go",
        "ok" if holes else "warn",
        found or (f"{directory} keeps holes" if holes else f"{directory} fills them"),
        "Zero pages of a guest take up disk space and are read instead of being known as zero.",
        "" if holes else "Keep images on ext4, XFS, Btrfs or tmpfs.",
    )


def room_finding(directory: Path) -> Finding:
    room = free_bytes(directory)
    return Finding(
        "disk.room",
        AREA,
        "room where temporary files go",
        "ok" if room >= DEMO_BYTES else "warn",
        f"{binary_size(room)} in {directory}",
        f"The demo needs about {binary_size(DEMO_BYTES)}; an image as much as the guest uses.",
        "" if room >= DEMO_BYTES else "Make room, or name another place by TMPDIR.",
        data={"bytes": room, "directory": str(directory)},
    )


def probe() -> list[Finding]:
    """Looks at the directory for temporary files, TMPDIR or /tmp."""
    directory = Path(tempfile.gettempdir())
    return [room_finding(directory), holes_finding(directory)]
