"""Which new guests get asynchronous page faults, and what is said of a guest's use of them."""

from __future__ import annotations

import pytest

from qemu_postcopy.vm.async_page_faults import use_of, with_offer

QEMU = "/usr/bin/qemu-system-x86_64"


@pytest.mark.parametrize(
    "words",
    [
        ["-accel", "kvm", "-cpu", "host"],
        ["--accel", "kvm,dirty-ring-size=4096", "-cpu", "host"],
        ["-cpu", "host", "-enable-kvm"],
        ["-machine", "q35,accel=kvm:tcg", "-cpu", "host"],
        ["-M", "accel=kvm,type=pc", "-cpu", "qemu64", "-cpu", "host"],
    ],
)
def test_a_new_guest_under_kvm_is_offered_them(words: list[str]) -> None:
    changed = with_offer([QEMU, *words])
    at = next(i for i, word in enumerate(words) if word == "host") + 1
    assert changed[at] == "host,kvm-asyncpf-int=on"
    changed[at] = "host"
    assert changed == [QEMU, *words]


@pytest.mark.parametrize(
    "argv",
    [
        [],
        [QEMU],
        [QEMU, "-accel", "kvm"],
        [QEMU, "-accel", "kvm", "-cpu"],
        [QEMU, "-accel", "tcg", "-cpu", "max"],
        [QEMU, "-machine", "pc,accel=tcg:kvm", "-cpu", "max"],
        [QEMU, "-cpu", "max"],
        [QEMU, "-accel", "kvm", "-cpu", "host,kvm-asyncpf-int=off"],
        [QEMU, "-accel", "kvm", "-cpu", "host,-kvm-asyncpf-int"],
        [QEMU, "-accel", "kvm", "-cpu", "host,kvm=off"],
        ["/usr/bin/qemu-system-aarch64", "-accel", "kvm", "-cpu", "host"],
        [QEMU, "-name", "kvm", "-append", "accel=kvm", "-cpu", "max"],
    ],
)
def test_any_other_command_line_is_left_as_it_is(argv: list[str]) -> None:
    assert with_offer(argv) == argv


@pytest.mark.parametrize(
    ("asked", "has", "word"),
    [
        (True, True, "on"),
        (False, True, "offered"),
        (None, True, "offered"),
        (False, False, "off"),
        (True, False, "off"),
        (True, None, "unknown"),
    ],
)
def test_use_in_a_word(asked: bool | None, has: bool | None, word: str) -> None:
    assert use_of(asked, has) == word
