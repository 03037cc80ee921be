"""The manual page keeps up with the program: it has its commands, options and exit statuses, and no
others.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qemu_postcopy import cli, errors

#: Long options of other programs, and click's own.
OTHERS = {"--help", "--live", "--p2p", "--postcopy", "--warnings"}
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
    # 0: done; 2: also click's.
    assert described == raised | {0, 2}


def all_options(command: click.Command) -> Iterator[list[str]]:
    """Of a command and of those below it: the names of each option, one of which is to be told."""
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield [*parameter.opts, *parameter.secondary_opts]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from all_options(below)


def told_options() -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", PAGE.read_text().replace("\\-", "-")))


def test_every_option_is_described() -> None:
    told = told_options()
    assert [names for names in all_options(cli.commands) if not told & set(names)] == []


def test_every_option_that_is_described_exists() -> None:
    ours = {name for names in all_options(cli.commands) for name in names}
    long = {name for name in told_options() if name.startswith("--")}
    assert long - ours == OTHERS


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
