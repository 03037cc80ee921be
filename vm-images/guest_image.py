"""The test guest as it was built, and the kernel command line that says what it is to do.

Any thread.  A cached image is trusted only as far as its files match the hashes in ``image.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images.packages import file_sha256

Mode = Literal["check", "walk", "io", "talk", "idle", "shell"]

RECORD_NAME = "image.json"
KERNEL_NAME = "vmlinuz"
INITRAMFS_NAME = "initramfs.cpio"


@dataclass(frozen=True)
class PackageUsed:
    """Version and SHA-256 (of the .deb) of a package that the image was made of."""

    version: str
    sha256: str


@dataclass(frozen=True)
class GuestImage:
    """A kernel and an initramfs that boot by QEMU's -kernel and -initrd.

    `digest` is the SHA-256 over both files' SHA-256: equal digests, equal guests.
    """

    architecture: str
    console: str
    kernel: Path
    initramfs: Path
    packages: Mapping[str, PackageUsed]
    compiler: str
    digest: str

    def kernel_command_line(
        self,
        mode: Mode = "check",
        *,
        fill_mib: int = 64,
        zero_percent: int = 0,
        tick_ms: int = 50,
        rewrite: bool | None = None,
        walk: str = "sequential",
        pages_per_second: int = 0,
        modules: Sequence[str] = (),
        extra: str = "",
    ) -> str:
        """The value of QEMU's -append.

        Args:
            mode: "check" verifies memory for ever, "walk" visits it in an order and at a rate,
                "io" reads from and writes to its disk (guest/memio.c), "talk" sends and receives
                by network and serial port (guest/memtalk.c),
                "idle" only ticks, "shell" is an interactive shell on the console.
            fill_mib: patterned memory in MiB, at least 1; see :meth:`ram_mib`.
            zero_percent: share of its pages that are zero, 0 to 100.
            tick_ms: interval of the reports in guest time, 1 to 60000 ms.
            rewrite: whether a verified page is rewritten with the next generation;
                by default in "check" only.
            walk: "sequential", "random" or "stride:N" (pages); "walk" only.
            pages_per_second: rate in guest time, 0 for as fast as possible; "walk" only.
            modules: kernel modules that are loaded first, with all that they need; those that
                vm-images/manifest.toml lists.
            extra: further words for the kernel.

        Raises:
            UsageError: a value is out of range.
        """
        if fill_mib < 1 or not 0 <= zero_percent <= 100 or not 1 <= tick_ms <= 60000:
            raise UsageError("fill_mib, zero_percent or tick_ms is out of range")
        if pages_per_second < 0 or len(walk.split()) != 1:
            raise UsageError("pages_per_second or walk is out of range")
        # panic=-1: reboot at once, which -no-reboot turns into the end of QEMU.
        # tsc=reliable: the clock does not change its source when the guest was stopped for long.
        # transparent_hugepage=never: no khugepaged that walks memory behind the test's back, and
        # 66 MiB less that the kernel wants to keep free (set_recommended_min_free_kbytes).
        words = [f"console={self.console}", "quiet", "panic=-1", "transparent_hugepage=never"]
        if self.architecture == "x86_64":
            words += ["tsc=reliable", "no_timer_check"]
        words += [f"qpc.mode={mode}", f"qpc.tick_ms={tick_ms}", f"qpc.zero={zero_percent}"]
        if mode == "check":
            words += [f"qpc.fill={fill_mib}", f"qpc.rewrite={int(rewrite is not False)}"]
        elif mode == "walk":
            words += [f"qpc.size={fill_mib}", f"qpc.write={int(rewrite is True)}"]
            words += [f"qpc.walk={walk}", f"qpc.rate={pages_per_second}"]
        elif mode in ("io", "talk"):
            words += [f"qpc.fill={fill_mib}"]
        if modules:
            words += [f"qpc.modules={','.join(modules)}"]
        return " ".join([*words, extra]).strip()

    @staticmethod
    def ram_mib(fill_mib: int) -> int:
        """Guest RAM in MiB in which `fill_mib` of pattern fits beside the kernel.

        A multiple of 64.  The kernel takes about 60 MiB, 64 bytes for each page of RAM and, above
        4 GiB, 64 MiB of bounce buffers; fills of 16 MiB to 8 GiB were tried.
        """
        needed = fill_mib * 105 // 100 + 112
        return -(-needed // 64) * 64


def load_guest_image(directory: Path) -> GuestImage:
    """The image that was built into `directory`, verified against its record.

    Raises HostError if a file is missing, damaged or altered.
    """
    try:
        record = json.loads((directory / RECORD_NAME).read_text())
        altered = [
            n for n, sha256 in record["files"].items() if file_sha256(directory / n) != sha256
        ]
        image = GuestImage(
            architecture=record["architecture"],
            console=record["console"],
            kernel=directory / KERNEL_NAME,
            initramfs=directory / INITRAMFS_NAME,
            packages={name: PackageUsed(**used) for name, used in record["packages"].items()},
            compiler=record["compiler"],
            digest=record["digest"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HostError(
            f"the cached test guest in {directory} is damaged: {error}",
            hint=f"delete {directory} and build again",
        ) from error
    if altered:
        raise HostError(
            f"the cached test guest in {directory} was altered: {', '.join(altered)}",
            hint=f"delete {directory} and build again",
        )
    return image
