"""What the image builder decides without a package or a compiler."""

from __future__ import annotations

import json
import platform
import stat
from pathlib import Path

import pytest

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images import builder
from qemu_postcopy.images.guest_image import GuestImage, PackageUsed, load_guest_image
from qemu_postcopy.images.initramfs import (
    Entry,
    console_device,
    directory,
    regular_file,
    write_cpio,
)
from qemu_postcopy.images.packages import file_sha256


@pytest.fixture
def image() -> GuestImage:
    return GuestImage(
        architecture="x86_64",
        console="ttyS0",
        kernel=Path("vmlinuz"),
        initramfs=Path("initramfs.cpio"),
        packages={"linux-image": PackageUsed("6.1", "00")},
        compiler="cc",
        digest="00",
    )


def test_check_mode_rewrites_unless_told_not_to(image: GuestImage) -> None:
    words = image.kernel_command_line("check", fill_mib=512, zero_percent=10, tick_ms=10).split()
    assert {"console=ttyS0", "panic=-1", "qpc.mode=check", "qpc.fill=512"} <= set(words)
    assert {"qpc.zero=10", "qpc.tick_ms=10", "qpc.rewrite=1"} <= set(words)
    assert "qpc.rewrite=0" in image.kernel_command_line("check", rewrite=False).split()


def test_walk_mode_only_reads_unless_told_to_write(image: GuestImage) -> None:
    line = image.kernel_command_line("walk", fill_mib=64, walk="stride:7", pages_per_second=1000)
    assert {"qpc.size=64", "qpc.walk=stride:7", "qpc.rate=1000", "qpc.write=0"} <= set(line.split())
    assert "qpc.write=1" in image.kernel_command_line("walk", rewrite=True).split()


@pytest.mark.parametrize(
    "options",
    [
        {"fill_mib": 0},
        {"zero_percent": 101},
        {"tick_ms": 0},
        {"pages_per_second": -1},
        {"walk": "random init=/bin/sh"},
    ],
)
def test_options_out_of_range_are_refused(image: GuestImage, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        image.kernel_command_line("walk", **options)  # type: ignore[arg-type]


def test_archive_holds_what_was_put_in(tmp_path: Path) -> None:
    entries = {
        "dev": directory(),
        "dev/console": console_device(),
        "etc": directory(),
        "etc/odd": regular_file(b"12345"),
        "init": regular_file(b"#!", executable=True),
    }
    listing = read_cpio(write_cpio(entries))
    assert listing["etc/odd"] == (stat.S_IFREG | 0o644, b"12345", (0, 0))
    assert listing["init"] == (stat.S_IFREG | 0o755, b"#!", (0, 0))
    assert listing["dev/console"] == (stat.S_IFCHR | 0o600, b"", (5, 1))
    assert list(listing) == ["dev", "dev/console", "etc", "etc/odd", "init"]


def test_archive_does_not_depend_on_the_order_of_its_entries() -> None:
    entries = {"b": regular_file(b"b"), "a": directory(), "a/c": regular_file(b"c")}
    assert write_cpio(entries) == write_cpio(dict(reversed(entries.items())))


@pytest.mark.parametrize("path", ["/init", "bin/init"])
def test_archive_refuses_a_path_without_its_directory(path: str) -> None:
    with pytest.raises(ValueError, match="relative path"):
        write_cpio({path: regular_file(b"")})


def read_cpio(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Mode, data and device of each path; a reader of its own, straight from the format."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    offset = 0
    while True:
        header = archive[offset : offset + 110]
        assert header[:6] == b"070701"
        fields = [int(header[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[offset + 110 : offset + 110 + name_size - 1].decode()
        offset += -(-(110 + name_size) // 4) * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (mode, archive[offset : offset + size], (fields[9], fields[10]))
        assert fields[2:4] == [0, 0] and fields[5] == 0, "owner and time must leave no trace"
        offset += -(-size // 4) * 4


def test_an_unknown_architecture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "pdp11")
    with pytest.raises(HostError, match="pdp11") as caught:
        builder.host_architecture()
    assert "x86_64" in caught.value.hint


def test_a_host_without_apt_is_told_where_to_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="apt-get is not installed") as caught:
        builder.build(tmp_path / "cache")
    assert "Debian or Ubuntu" in caught.value.hint


@pytest.mark.needs("guest")
def test_empty_package_lists_are_told_with_the_command_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lists/partial").mkdir(parents=True)
    (tmp_path / "status").touch()
    configuration = tmp_path / "apt.conf"
    configuration.write_text(
        f'Dir::State::lists "{tmp_path}/lists";\nDir::State::status "{tmp_path}/status";\n'
        'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(configuration))
    with pytest.raises(HostError, match="kernel packages") as caught:
        builder.build(tmp_path / "cache")
    assert "apt-get update" in caught.value.hint
    assert not list((tmp_path / "cache").glob("guest-*"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered", "no record", "odd record"])
def test_a_damaged_cached_image_is_refused(tmp_path: Path, damage: str) -> None:
    files = {"vmlinuz": b"kernel", "initramfs.cpio": write_cpio({"init": Entry(0o100755)})}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    record = {
        "architecture": "x86_64",
        "console": "ttyS0",
        "packages": {"busybox-static": {"version": "1", "sha256": "00"}},
        "compiler": "cc",
        "files": {name: file_sha256(tmp_path / name) for name in files},
        "digest": "00",
    }
    (tmp_path / "image.json").write_text(json.dumps(record))
    assert load_guest_image(tmp_path).packages["busybox-static"].version == "1"
    match damage:
        case "missing":
            (tmp_path / "vmlinuz").unlink()
        case "truncated":
            (tmp_path / "initramfs.cpio").write_bytes(files["initramfs.cpio"][:-1])
        case "altered":
            (tmp_path / "vmlinuz").write_bytes(b"kernem")
        case "no record":
            (tmp_path / "image.json").unlink()
        case "odd record":
            (tmp_path / "image.json").write_text("[]")
    with pytest.raises(HostError) as caught:
        load_guest_image(tmp_path)
    assert str(tmp_path) in caught.value.hint
