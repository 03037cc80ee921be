"""``qemu-postcopy report``: a trace as one HTML page with nothing from elsewhere.

After the flow; trusts nothing but what :mod:`qemu_postcopy.paging.trace` has checked.
"""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

import click

from qemu_postcopy.errors import HostError
from qemu_postcopy.paging.trace import Fault, Trace

COLUMNS, ROWS = 160, 64
WIDTH, HEIGHT = 800, 256

STYLE = """body{font:14px sans-serif;max-width:60em;margin:2em auto}svg{background:#f4f4f4}
td,th{padding:.1em 1em;text-align:right}td:first-child,th:first-child{text-align:left}"""


def _svg(content: str, height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">{content}</svg>'


def _map(records: list[Fault], pages: int, begin: int, span: int) -> str:
    bins = Counter(((r.read_ns - begin) * COLUMNS // span, r.page * ROWS // pages) for r in records)
    most = max(bins.values())
    w, h = WIDTH / COLUMNS, HEIGHT / ROWS
    return _svg(
        "".join(
            f'<rect x="{x * w:g}" y="{HEIGHT - (y + 1) * h:g}" width="{w:g}" height="{h:g}" '
            f'fill="#c00" fill-opacity="{0.2 + 0.8 * n / most:.2f}"/>'
            for (x, y), n in sorted(bins.items())
        )
    )


def _growth(records: list[Fault], begin: int, span: int) -> tuple[str, int]:
    seen: set[tuple[int, int]] = set()
    columns = [0] * COLUMNS
    for record in sorted(records):
        seen.add((record.block, record.page))
        columns[(record.read_ns - begin) * COLUMNS // span] = len(seen)
    points, last = ["0," + str(HEIGHT)], 0
    for x, n in enumerate(columns):
        last = n or last
        points.append(
            f"{(x + 1) * WIDTH / COLUMNS:g},{HEIGHT - last * (HEIGHT - 8) / len(seen):.1f}"
        )
    line = f'<polyline fill="none" stroke="#06c" stroke-width="2" points="{" ".join(points)}"/>'
    return _svg(line), len(seen)


def _latencies(records: list[Fault]) -> str:
    buckets = Counter((record.latency_ns // 1000).bit_length() for record in records)
    most = max(buckets.values())
    rows = [
        f'<text x="110" y="{20 * i + 15}" text-anchor="end">below {2**bucket} µs</text>'
        f'<rect x="120" y="{20 * i + 3}" width="{600 * buckets[bucket] / most:.1f}" height="14" '
        f'fill="#06c"/><text x="{125 + 600 * buckets[bucket] / most:.1f}" y="{20 * i + 15}">'
        f"{buckets[bucket]}</text>"
        for i, bucket in enumerate(range(min(buckets), max(buckets) + 1))
    ]
    return _svg("".join(rows), 20 * len(rows) + 6)


def html(traced: Trace) -> str:
    """The page; raises ImageError at a record that cannot be."""
    records = list(traced)
    origins = {thread.tid: thread.origin for thread in traced.threads}
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Faults</title>'
        f"<style>{STYLE}</style><h1>{len(records)} faults</h1>"
    ]
    if traced.lost:
        parts.append(f"<p>{traced.lost} later faults found no room in the trace.</p>")
    if not records:
        return "".join(parts) + "<p>No fault was answered.</p></html>\n"
    begin = min(record.read_ns for record in records)
    span = max(record.read_ns for record in records) - begin + 1
    growth, pages = _growth(records, begin, span)
    parts.append(f"<p>Within {span / 1e9:.3f} s, on {pages} different pages.</p>")
    for index, block in enumerate(traced.blocks):
        own = [record for record in records if record.block == index]
        if own:
            parts.append(
                f"<h2>Block {escape(block.name)}: addresses (up) over time</h2>"
                + _map(own, block.length // block.page_size, begin, span)
            )
    parts.append(f"<h2>Working set: pages asked for over time</h2>{growth}")
    parts.append(f"<h2>Latency</h2>{_latencies(records)}")
    faults, blocked = Counter[str](), Counter[str]()
    for record in records:
        name = origins.get(record.tid, "other" if record.tid else "unknown")
        faults[name] += 1
        blocked[name] += record.latency_ns // 1000
    parts.append("<h2>Origins</h2><table><tr><th>who<th>faults<th>share<th>waited, ms<th>mean, µs")
    for name, count in faults.most_common():
        parts.append(
            f"<tr><td>{escape(name)}<td>{count}<td>{100 * count / len(records):.1f} %"
            f"<td>{blocked[name] / 1000:.1f}<td>{blocked[name] / count:.0f}"
        )
    return "".join(parts) + "</table></html>\n"


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Instead of TRACE with .html added."
)
def report_command(trace_file: Path, output: Path | None) -> None:
    """Show a trace of faults as an HTML page of its own.

    \b
    Example:
      qemu-postcopy restore --trace vm.trace --wait complete vm.qpc
      qemu-postcopy report vm.trace -o vm.html
    """
    output = output or trace_file.with_name(trace_file.name + ".html")
    try:
        with Trace(trace_file) as traced:
            page = html(traced)
            output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise HostError(
            f"{output} cannot be written: {error.strerror}", hint="choose another file with -o"
        ) from error
    click.echo(f"{len(traced)} faults, {traced.lost} lost: {output}")
