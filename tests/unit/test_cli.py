"""The command line: sizes, help, exit statuses, logs; what needs no guest."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qemu_postcopy import __version__, errors
from qemu_postcopy.cli import JsonLog, commands, parse_size

#: Modules that cost time, and that no command needs in order to say what it can do.
SLOW_MODULES = ("asyncio", "rich", "qemu.qmp", "qemu_postcopy.session", "qemu_postcopy._native")


def run(*arguments: str, run_base: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(run_base or "/nonexistent")}
    command = [sys.executable, "-m", "qemu_postcopy", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("0", 0),
        ("65536", 65536),
        ("64K", 65536),
        ("64KiB", 65536),
        ("64kb", 65536),
        ("2M", 2 << 20),
        (" 1G ", 1 << 30),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, bytes_: int) -> None:
    assert parse_size(text) == bytes_


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "1X", "64KK", "²", "٣", "1 2"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; examples"):
        parse_size(text)


def test_version() -> None:
    assert __version__ in run("--version").stdout


def all_commands(
    group: click.Group, *above: str
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group below a group, with the words that call it."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from all_commands(command, *above, name)


COMMANDS = {" ".join(words): command for words, command in all_commands(commands)}


def test_help_lists_every_command_and_examples() -> None:
    said = run("--help").stdout
    for name in commands.list_commands(click.Context(commands)):
        assert f"  {name} " in said
    assert "Examples:" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_an_example(name: str) -> None:
    command = COMMANDS[name]
    said = command.get_help(click.Context(command, info_name=name))
    if not isinstance(command, click.Group):
        assert re.search(rf"Examples?:(.|\n)* qemu-postcopy {name}\b", said), said


def test_importing_the_command_line_imports_nothing_slow() -> None:
    code = "import sys, qemu_postcopy.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not set(SLOW_MODULES) & set(loaded)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("restore",),
        ("restore", "--chunk", "many", "image"),
        ("restore", "--wait", "forever", "image"),
        ("snapshot", "--then", "explode", "a", "b"),
        ("snapshot", "--max-downtime", "0", "a", "b"),
        ("fill",),
    ],
)
def test_wrong_usage_is_exit_status_2(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Error" in done.stderr
    assert done.stdout == ""


def test_unknown_guest_is_exit_status_11_with_a_hint(run_dir: Path) -> None:
    for arguments in (("status", "nobody"), ("fill", "nobody")):
        done = run(*arguments, run_base=run_dir)
        assert done.returncode == errors.SidecarError.exit_code
        assert done.stderr.splitlines()[0] == "error: no guest named nobody is known"
        assert "known in" in done.stderr.splitlines()[1]


def test_status_without_guests(run_dir: Path) -> None:
    assert json.loads(run("status", "--json", run_base=run_dir).stdout) == []
    assert "no guest is known" in run("status", run_base=run_dir).stdout


def test_image_that_is_none_is_exit_status_4_and_leaves_no_run_directory_behind(
    run_dir: Path,
) -> None:
    done = run("restore", str(run_dir / "none"), run_base=run_dir / "base")
    assert done.returncode == errors.ImageError.exit_code
    assert "is no image" in done.stderr
    assert run("status", "--json", run_base=run_dir / "base").stdout.strip() == "[]"


def test_exit_statuses_are_different() -> None:
    """What a caller tells apart by class, a script tells apart by exit status."""
    codes = [kind.exit_code for kind in errors.PostcopyError.__subclasses__()]
    assert len(set(codes)) == len(codes)
    assert not {0, 1} & set(codes)


def test_json_log_is_one_object_a_line() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        record = logging.LogRecord(
            "a.b", logging.ERROR, "file", 1, "two\nlines: %s", ("x",), sys.exc_info()
        )
    line = JsonLog().format(record)
    assert "\n" not in line
    entry = json.loads(line)
    assert entry["message"] == "two\nlines: x"
    assert entry["level"] == "error"
    assert "ValueError: why" in entry["exception"]
