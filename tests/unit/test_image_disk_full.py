"""A disk that fills up while an image is made: said so, and nothing left."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_postcopy.errors import HostError
from qemu_postcopy.image.convert import import_image
from qemu_postcopy.image.records import (
    BlockHeader,
    Configuration,
    SectionHeader,
    SectionType,
    pack_block_list,
    pack_end_of_records,
)

DISK_BYTES = 4 << 20
RAM_BYTES = 16 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)]
    subprocess.run(["mount", *options], check=True)
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.needs("root", "mount")
@pytest.mark.parametrize("lazy", [["m0"], ["small"]], ids=["page data", "device state"])
def test_full_disk_is_named_and_leaves_nothing(
    lazy: list[str], small_disk: Path, tmp_path: Path
) -> None:
    ram = SectionHeader(SectionType.START, 2, "ram", 0, 4)
    pages = b"".join(
        (page * 4096 | 0x28).to_bytes(8, "big") + b"\7" * 4096 for page in range(1, 4096)
    )
    first = (8).to_bytes(8, "big") + b"\2m0" + b"\7" * 4096
    small = (8).to_bytes(8, "big") + b"\5small" + b"\7" * 4096
    source = tmp_path / "source"
    source.write_bytes(
        b"QEVM\0\0\0\3"
        + Configuration("pc-i440fx-7.2").pack()
        + ram.pack()
        + pack_block_list([BlockHeader("m0", RAM_BYTES), BlockHeader("small", 4096)])
        + small
        + first
        + pages
        + pack_end_of_records()
    )
    with pytest.raises(HostError) as caught:
        import_image(source, small_disk / "image", lazy_block_names=lazy)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert "free disk space" in caught.value.hint
    assert list(small_disk.iterdir()) == []
