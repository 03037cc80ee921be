"""Building for real: the same bytes twice, one build for several builders, another QEMU version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qemu_postcopy.images import builder
from qemu_postcopy.images.builder import check
from qemu_postcopy.images.cache import default_cache_dir
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.images.initramfs import regular_file, write_cpio
from qemu_postcopy.images.qemu_versions import fetch_qemu

pytestmark = pytest.mark.needs("guest")


def session_cache() -> Path:
    configured = os.environ.get("QPC_CACHE")
    return Path(configured) if configured else default_cache_dir()


@pytest.fixture
def fresh_cache(guest_image: GuestImage, tmp_path: Path) -> Path:
    """A cache without an image, with the packages that were downloaded already."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "packages").symlink_to(session_cache() / "packages")
    return cache


def test_two_builds_give_the_same_bytes(fresh_cache: Path, guest_image: GuestImage) -> None:
    report = check(fresh_cache)
    assert report.reproducible, report.differing_files
    assert not list(fresh_cache.glob(".*")), "nothing is left of the two builds"


def test_a_difference_between_builds_is_reported(
    fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serial = iter(range(1000))
    monkeypatch.setattr(
        builder,
        "write_cpio",
        lambda entries: write_cpio({**entries, "id": regular_file(b"%d" % next(serial))}),
    )
    report = check(fresh_cache)
    assert report.differing_files == ("initramfs.cpio", "image.json")


def test_builders_at_the_same_time_share_one_build(fresh_cache: Path) -> None:
    command = [sys.executable, "-m", "qemu_postcopy.images", "build", "--json"]
    running = [
        subprocess.Popen(
            [*command, "--cache", str(fresh_cache)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    first, second = (json.loads(output) for output, _ in ended)
    assert first == second
    compiled = [log for _, log in ended if "compiling init" in log]
    assert len(compiled) == 1, ended
    assert Path(first["kernel"]).is_file() and Path(first["initramfs"]).is_file()


def test_the_image_says_what_it_was_made_of(guest_image: GuestImage) -> None:
    assert any(name.startswith("linux-image-") for name in guest_image.packages)
    assert "busybox-static" in guest_image.packages
    assert all(len(used.sha256) == 64 and used.version for used in guest_image.packages.values())
    assert guest_image.compiler


@pytest.mark.needs("qemu10")
def test_another_qemu_runs_beside_the_hosts_own() -> None:
    install = fetch_qemu("bookworm-backports", session_cache())
    assert install.version.startswith("10.")
    for command in ([str(install.binary)], install.argv_prefix()):
        said = subprocess.run(
            [*command, "--version"],
            env={**os.environ, **install.environment},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"version {install.version}" in said.stdout
    # Machine types and ROMs are its own: -L is searched before what the host has.
    listed = subprocess.run(
        [install.binary, "-L", "help"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert listed[0] == str(install.data_dir)
