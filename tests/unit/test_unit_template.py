"""The systemd unit that is shipped can be loaded, and runs a command that exists."""

from __future__ import annotations

import configparser
import subprocess
from pathlib import Path

import click
import pytest

from qemu_postcopy import cli

UNIT = Path(__file__).resolve().parents[2] / "docs" / "qemu-postcopy-supervise@.service"


@pytest.mark.needs("checkers")
def test_systemd_finds_nothing_wrong_with_it() -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(UNIT)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_it_supervises_and_leaves_sidecars_alone_when_it_is_stopped() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    program, name, command, guest = service["ExecStart"].split()
    assert (program, name, guest) == ("/usr/bin/env", "qemu-postcopy", "%i")
    assert command in cli.commands.list_commands(click.Context(cli.commands))
    assert service["Restart"] == "on-failure"
    assert service["KillMode"] == "process"
