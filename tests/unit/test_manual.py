"""The manual page keeps up with the program: every command and every exit status is in it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import click
import pytest

from qemu_postcopy import cli, errors

PAGE = Path(__file__).resolve().parents[2] / "docs" / "qemu-postcopy.1"


def exception_classes(base: type[errors.PostcopyError]) -> set[type[errors.PostcopyError]]:
    return {base}.union(*(exception_classes(child) for child in base.__subclasses__()))


def section(title: str) -> str:
    match = re.search(rf"^\.SH {title}\n(.*?)(?=^\.SH |\Z)", PAGE.read_text(), re.M | re.S)
    assert match, f"no section {title}"
    return match.group(1)


def command_names() -> list[str]:
    group = cli.commands
    return group.list_commands(click.Context(group))


@pytest.mark.parametrize("name", command_names())
def test_every_command_is_described(name: str) -> None:
    assert re.search(rf'^\.(B|BR)\s+"?{name}\b', section("COMMANDS"), re.M)


def test_every_exit_status_is_described() -> None:
    described = {int(number) for number in re.findall(r"^\.B (\d+)$", section("EXIT STATUS"), re.M)}
    raised = {cls.exit_code for cls in exception_classes(errors.PostcopyError)}
    assert raised <= described


@pytest.mark.needs("checkers")
def test_man_formats_it_without_a_warning() -> None:
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(PAGE)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stderr == ""
