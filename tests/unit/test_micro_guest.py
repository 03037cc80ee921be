"""The micro guest's ROM is the same bytes every time; its reports are read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.images.micro_guest import (
    ROM_BYTES,
    Filled,
    Machine,
    MicroError,
    Pass,
    Tasks,
    build_micro_guest,
    parse_lines,
)


@pytest.mark.needs("cc")
@pytest.mark.parametrize("machine", ["pc", "microvm"])
def test_two_builds_give_the_same_bytes(tmp_path: Path, machine: Machine) -> None:
    first, second = (build_micro_guest(tmp_path / name, machine=machine) for name in ("a", "bb"))
    content = first.program.read_bytes()
    assert content == second.program.read_bytes()
    assert build_micro_guest(tmp_path / "a", machine=machine).program.samefile(first.program)
    if machine == "pc":
        assert len(content) == ROM_BYTES
    else:
        assert content.startswith(b"\x7fELF") and b"\x12\0\0\0Xen\0" in content


@pytest.mark.parametrize(
    "sizes",
    [
        {"area_bytes": 4097},
        {"area_bytes": 4 << 30},
        {"ring0_bytes": 4 << 20},
        {"workers": 3},
        {"workers": 81, "area_bytes": 81 * 4096},
        {"workers": 2, "cpus": 2},
        {"cpus": 3},
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        build_micro_guest(tmp_path, **sizes)  # type: ignore[arg-type]


def test_reports_of_workers_are_read() -> None:
    text = (
        "micro ready 8 0\n"
        "micro tasks 1 async 1 waiting 2 most 3 waits 4 bad 0 passes 0 5 6\n"
        "micro tasks 2 async 1 waiting 0 most 3 waits 4 bad 1 passes 1 5 6\n"
    )
    assert parse_lines(text) == [
        Filled(8, 0),
        Tasks(1, True, 2, 3, 4, 0, (0, 5, 6)),
        Tasks(2, True, 0, 3, 4, 1, (1, 5, 6)),
    ]


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
        "micro pass 1 bad 0 0\nmicro tasks 2 async 0 waiting 0 most 0 waits 0 bad 0 passes 1\n",
        "micro tasks 1 async 0 waiting 0 most 0 waits 0 bad 0 passes\n",
        "micro trouble 0000000000400000 0000000000000000 00000000ffff0000\n",
    ],
)
def test_anything_else_is_an_error(text: str) -> None:
    with pytest.raises(MicroError):
        parse_lines(text, starts_midway=True)
