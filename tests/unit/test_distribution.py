"""What is installed: all that it needs at run time, nothing of the tree besides."""

from __future__ import annotations

import os
from importlib import metadata, resources
from pathlib import PurePosixPath

import pytest


@pytest.fixture(scope="module")
def files() -> set[str]:
    try:
        listed = metadata.files("qemu-postcopy") or []
    except metadata.PackageNotFoundError:
        listed = []
    names = {str(path) for path in listed}
    if "qemu_postcopy/__init__.py" not in names:
        assert "TOX_ENV_NAME" not in os.environ, "tox tests the wheel"
        pytest.skip("qemu_postcopy is not installed from a wheel here")
    return names


@pytest.mark.parametrize(
    "name",
    [
        "qemu_postcopy/py.typed",
        "qemu_postcopy/_native/_core.abi3.so",
        "qemu_postcopy/_native/qemu-postcopy-preload.so",
        "qemu_postcopy/images/manifest.toml",
        "qemu_postcopy/images/guest/memcheck.c",
        "qemu_postcopy/images/micro/start.S",
        "qemu_postcopy/images/micro/micro.h",
        "qemu_postcopy/images/micro/rom.ld",
        "qemu_postcopy/baseline/bare_handler.c",
    ],
)
def test_the_wheel_has_what_it_needs_at_run_time(files: set[str], name: str) -> None:
    assert name in files


def test_the_manual_page_is_installed(files: set[str]) -> None:
    assert any(name.endswith("share/man/man1/qemu-postcopy.1") for name in files)


def test_the_wheel_has_neither_tests_nor_sources_of_the_core(files: set[str]) -> None:
    unwanted = [
        name
        for name in files
        if PurePosixPath(name).parts[0] in ("tests", "docs", "vm-images")
        or PurePosixPath(name).name.startswith(("test_", "conftest"))
        or (name.startswith("qemu_postcopy/_native/") and name.endswith((".c", ".h", ".o")))
    ]
    assert unwanted == []


def test_the_guest_s_sources_can_be_read_as_resources(files: set[str]) -> None:
    guest = resources.files("qemu_postcopy.images") / "guest"
    assert (guest / "pattern.h").read_text()
