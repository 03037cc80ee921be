"""The support table of libvirt, from what its programs name; they are asked for real in
tests/libvirtd/test_support.py."""

from __future__ import annotations

import pytest

from qemu_postcopy.doctor.libvirt_support import (
    DEVICE,
    Programs,
    allowed_devices,
    findings,
    version_number,
)

ALL = f"{DEVICE} postcopy-preempt mapped-ram".encode()


def here(asked: Programs) -> dict[str, bool]:
    return {one.id.removeprefix("libvirt."): bool(one.data["here"]) for one in findings(asked)}


def test_what_the_programs_name_is_there_and_what_they_do_not_is_not() -> None:
    assert all(here(Programs(9_000_000, ALL, ALL)).values())
    assert here(Programs(9_000_000, b"", ALL)) == {
        "private_dev": False, "postcopy_destination": False, "postcopy_resume": True,
        "postcopy_preempt": False, "sparse_save": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("version", "resumes"),
    [(9_000_000, True), (11_001_000, True), (11_003_000, False), (11_004_000, True)],
)
def test_only_the_versions_with_the_fault_cannot_resume(version: int, resumes: bool) -> None:
    assert here(Programs(version, ALL, ALL))["postcopy_resume"] is resumes


def test_the_sysctl_or_the_list_of_devices_opens_the_way_to_post_copy() -> None:
    assert here(Programs(9_000_000, b"", b"", unprivileged=True))["postcopy_destination"]
    asked = Programs(9_000_000, b"", ALL, acl=("/dev/null", DEVICE))
    assert here(asked)["private_dev"] and here(asked)["postcopy_destination"]
    assert not here(Programs(9_000_000, ALL, ALL, acl=("/dev/null",)))["private_dev"]
    # A QEMU that does not know of the device does not open it.
    assert not here(Programs(9_000_000, ALL, b""))["postcopy_destination"]


def test_a_qemu_conf_says_which_devices_only_where_it_is_not_a_comment() -> None:
    text = 'x = 1\ncgroup_device_acl = [\n  "/dev/null", "/dev/full",\n  "/dev/userfaultfd"\n]\n'
    assert allowed_devices(text) == ("/dev/null", "/dev/full", DEVICE)
    assert allowed_devices(text.replace("cgroup_", "#cgroup_")) is None


def test_versions_are_counted_as_libvirt_counts_them() -> None:
    assert version_number("libvirtd (libvirt) 11.3.0\n") == 11_003_000
    assert version_number("nothing") == 0
