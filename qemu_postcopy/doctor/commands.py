"""``qemu-postcopy doctor``: the report as a table or as JSON, and the installation of packages.

Only click is imported before the command runs; probing, rich and the C core come when needed.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qemu_postcopy.doctor.report import Finding, HostReport

STYLES = {"ok": "green", "warn": "yellow", "missing": "red"}


def say(line: str) -> None:
    """Progress goes to standard error; standard output is for the report."""
    click.echo(line, err=True)


def verdict(report: HostReport) -> str:
    """One sentence: can guests be snapshotted and restored here?"""
    if report.can_restore:
        return "Guests can be snapshotted and restored on this host."
    blockers = ", ".join(finding.title for finding in report.blockers)
    return f"Guests cannot be snapshotted and restored on this host. Missing: {blockers}."


def what_it_means(finding: Finding) -> str:
    """Cost and advice of a lack; nothing for what is in order."""
    return "" if finding.status == "ok" else f"{finding.cost}\n-> {finding.advice}"


def print_table(report: HostReport) -> None:
    """One table, the findings under the headings of their areas."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or pipe has no width: long lines are better there than columns cut to 80.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    host = report.host
    console.print(
        f"{host['distribution']}, Linux {host['kernel']} ({host['architecture']}), "
        f"user {host['user']}",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("status", no_wrap=True)
    for heading in ("what", "found", "what its lack costs, what to do"):
        table.add_column(heading, overflow="fold")
    area = ""
    for finding in report.findings:
        if finding.area != area:
            area = finding.area
            table.add_row("", Text(area, style="bold"), "", "")
        table.add_row(
            Text(finding.status, style=STYLES[finding.status]),
            Text(finding.title),
            Text(finding.found),
            Text(what_it_means(finding)),
        )
    console.print(table)
    console.print(verdict(report), markup=False)


def install_missing(report: HostReport, dry_run: bool) -> bool:
    """Shows the plan and, unless it is a dry run, carries it out. True if anything was changed."""
    from qemu_postcopy.doctor import install

    steps = install.plan_for(report)
    if not steps:
        say("Nothing to install.")
        return False
    say("To be run as root:" if dry_run else "This will run as root:")
    for step in steps:
        say(f"  {step.shell()}")
    if dry_run:
        return False
    install.run(steps, say)
    return True


@click.command(
    "doctor",
    epilog="Exit status: 0 if guests can be snapshotted and restored on this host, 3 if not, or if"
    " packages could not be installed.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("--install", is_flag=True, help="Install missing system packages (apt or dnf).")
@click.option("--dry-run", is_flag=True, help="With --install: only show what would be run.")
def doctor_command(as_json: bool, install: bool, dry_run: bool) -> None:
    """What this host can do, what each lack costs, and what to do about it.

    Everything is probed by doing it, with the rights of the caller: run it as the user who runs
    QEMU, or as root.

    \b
    Examples:
      qemu-postcopy doctor
      qemu-postcopy doctor --install --dry-run
    """
    from qemu_postcopy.doctor import probe_host
    from qemu_postcopy.errors import HostError, UsageError

    if dry_run and not install:
        raise UsageError(
            "--dry-run needs --install.", hint="qemu-postcopy doctor --install --dry-run"
        )
    report = probe_host()
    if install:
        changed = install_missing(report, dry_run)
        if dry_run:
            return
        if changed:
            report = probe_host()
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_table(report)
    if not report.can_restore:
        sys.exit(HostError.exit_code)
