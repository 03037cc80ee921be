"""The micro guest's ROM is the same bytes every time; its reports are read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_postcopy.images.micro_guest import (
    ROM_BYTES,
    Filled,
    MicroError,
    Pass,
    build_micro_guest,
    parse_lines,
)


@pytest.mark.needs("cc")
def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build_micro_guest(tmp_path / name) for name in ("a", "bb"))
    assert len(first.rom.read_bytes()) == ROM_BYTES
    assert first.rom.read_bytes() == second.rom.read_bytes()
    assert build_micro_guest(tmp_path / "a").rom.samefile(first.rom)


def test_reports_are_read() -> None:
    text = "micro ready 8 4\r\nmicro pass 1 bad 0 0\r\nmicro pass 2 bad 3 1\r\nmicro pass 3"
    assert parse_lines(text) == [Filled(8, 4), Pass(1, 0, 0), Pass(2, 3, 1)]


def test_first_line_of_a_restored_guest_may_lack_its_begin() -> None:
    text = " bad 0 0\nmicro pass 8 bad 0 0\n"
    assert parse_lines(text, starts_midway=True) == [Pass(8, 0, 0)]
    with pytest.raises(MicroError):
        parse_lines(text)


@pytest.mark.parametrize(
    "text",
    [
        "micro pass 1 bad 0 0\nmicro pass 3 bad 0 0\n",
        "micro pass 1 bad 0 0\nmicro ready 8 4\n",
        "micro pass 1 bad 0 0\n\n",
        "micro pass 1 bad -1 0\n",
        "micro trouble 0000000000400000 0000000000000000 00000000ffff0000\n",
    ],
)
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(MicroError):
        parse_lines(text, starts_midway=True)
