"""``qemu-postcopy report``: a trace as one HTML page with nothing from elsewhere.

After the flow; trusts nothing but what :mod:`qemu_postcopy.paging.trace` has checked.
"""

from __future__ import annotations

from pathlib import Path

import click

from qemu_postcopy.errors import HostError
from qemu_postcopy.paging.trace import Trace
from qemu_postcopy.report.digest import busy_part, digest
from qemu_postcopy.report.page import html


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Instead of TRACE with .html added."
)
def report_command(trace_file: Path, output: Path | None) -> None:
    """Show a trace of faults as an HTML page of its own.

    Addresses over time, the growth of the working set, latencies, and who waited how long. Of a
    trace that was cut short, or has damaged records, the rest is shown and the lack is told.

    \b
    Example:
      qemu-postcopy restore --trace vm.trace --wait complete vm.qpc
      qemu-postcopy report vm.trace -o vm.html
    """
    output = output or trace_file.with_name(trace_file.name + ".html")
    try:
        with Trace(trace_file, cut_allowed=True) as traced:
            found = digest(traced)
            output.write_text(html(traced, found, busy_part(traced, found)), encoding="utf-8")
            lost, cut = traced.lost, traced.cut
    except OSError as error:
        raise HostError(
            f"{output} cannot be written: {error.strerror}", hint="choose another file with -o"
        ) from error
    if cut:
        click.echo(f"{trace_file} was cut short: {cut} faults are missing", err=True)
    if found.refused:
        click.echo(f"{found.refused} records are damaged and left out", err=True)
    click.echo(f"{found.faults} faults, {lost} lost: {output}")
