"""A report's page: one HTML file with nothing from elsewhere and no program in it.

Pure; names come from the trace and are escaped.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from html import escape
from itertools import accumulate

from qemu_postcopy.paging.trace import Answer, Trace, TraceBlock
from qemu_postcopy.report import picture
from qemu_postcopy.report.digest import COLUMNS, ROWS, Digest, Origin

BUCKET_HEIGHT = 12
#: Points are drawn so large where there are fewer than so many, to be seen at all.
LARGER = ((3, 2500), (2, 8000))

STYLE = """:root{color-scheme:light dark;--text:#1b1b1b;--page:#fff;--ground:#f3f4f6;--grid:#d5d8dd}
@media(prefers-color-scheme:dark){:root{--text:#e4e4e4;--page:#16181c;--ground:#20242a;--grid:#3a4048}}
body{font:15px/1.45 system-ui,sans-serif;max-width:58rem;margin:2rem auto;padding:0 1rem;
color:var(--text);background:var(--page)}h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem}
svg{width:100%;height:auto;display:block}svg text{font-size:12px;fill:var(--text)}
.ground{fill:var(--ground)}.grid{stroke:var(--grid);fill:none}
.line{fill:none;stroke:#2f80d0;stroke-width:2.5;stroke-linejoin:round}
table{border-collapse:collapse}td,th{padding:.15em .9em;text-align:right}
td:first-child,th:first-child{text-align:left;padding-left:0}tr+tr{border-top:1px solid var(--grid)}
.name{white-space:nowrap}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .4em 0 1.2em;border-radius:2px}
.note{border-left:4px solid #d55e00;padding-left:.8em}"""


def html(trace: Trace, found: Digest, busy: Digest | None = None) -> str:
    """The page; ``busy`` is the beginning of ``found``, if that is to be shown for itself."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Faults</title>'
        f"<style>{STYLE}</style><h1>{found.faults:,} faults</h1>",
        *_notes(trace, found),
    ]
    if not found.faults:
        return "".join(parts) + "<p>No fault was answered.</p></html>\n"
    asked = sum(found.growth_bytes)
    parts.append(
        f"<p>Within {_time(found.span_ns)}, on {found.pages:,} different pages ({_size(asked)}): "
        f"{found.answers[Answer.DATA]:,} got data, {found.answers[Answer.ZERO]:,} zeros"
        + (f", {found.answers[Answer.GONE]} were for memory that is gone" * (found.answers[2] > 0))
        + (f"; {found.put_off:,} were put off at least once" if found.put_off else "")
        + ".</p>"
    )
    parts.append(_origins(found.origins))
    if busy is not None:
        share = f"{100 * busy.faults / found.faults:.0f} % of the faults"
        parts.append(f"<h2>The first {_time(busy.span_ns)}: {share}</h2>")
        parts += _pictures(trace, busy, "h3")
        parts.append(f"<h2>All {_time(found.span_ns)}</h2>")
    parts += _pictures(trace, found, "h2" if busy is None else "h3")
    parts.append(_latencies(found))
    return "".join(parts) + "</html>\n"


def _notes(trace: Trace, found: Digest) -> list[str]:
    notes = []
    if trace.lost:
        notes.append(f"{trace.lost:,} later faults found no room in the trace.")
    if trace.cut:
        notes.append(f"The file was cut short: the last {trace.cut:,} faults are missing.")
    if found.refused:
        notes.append(f"{found.refused:,} records are damaged and left out.")
    return [f'<p class="note">{note}</p>' for note in notes]


def _colour(origin: int) -> int:
    return min(origin, len(picture.COLOURS) - 1)


def _origins(origins: Sequence[Origin]) -> str:
    total = sum(origin.faults for origin in origins)
    rows = []
    for index, origin in enumerate(origins):
        if not origin.faults:
            continue
        ordered = array("I", sorted(origin.latencies_ns))
        p50, p99 = (ordered[int(share * (len(ordered) - 1))] for share in (0.5, 0.99))
        rows.append(
            f'<tr><td><span class="key" style="margin-left:0;background:'
            f'{picture.COLOURS[_colour(index)]}"></span>{escape(origin.name)}<td>{origin.faults:,}'
            f"<td>{100 * origin.faults / total:.1f} %<td>{_time(origin.waited_ns)}"
            f"<td>{_time(origin.waited_ns / origin.faults)}<td>{_time(p50)}<td>{_time(p99)}"
            f"<td>{_time(ordered[-1])}"
        )
    return (
        "<h2>Who waited</h2><table><tr><th>faults of<th>number<th>share<th>waited<th>mean<th>p50"
        f"<th>p99<th>longest{''.join(rows)}</table>"
    )


def _legend(origins: Sequence[Origin]) -> str:
    last = len(picture.COLOURS) - 1
    names = [origin.name for origin in origins[:last]] + ["all others"] * (len(origins) > last)
    keys = "".join(
        f'<span class="name"><span class="key" style="background:{colour}"></span>'
        f"{escape(name)}</span> "
        for name, colour in zip(names, picture.COLOURS, strict=False)
    )
    return f"<p>The stronger, the more faults.{keys}</p>"


def _across(found: Digest) -> list[tuple[float, str]]:
    return [
        (tick / found.span_ns, _time(tick) if tick else "0")
        for tick in picture.ticks(found.span_ns, 9)
    ]


def _pictures(trace: Trace, found: Digest, heading: str) -> list[str]:
    """All that goes over time."""
    maps = [
        f"<{heading}>Block {escape(block.name)}: addresses over time</{heading}>"
        + _map(block, found, index)
        for index, block in enumerate(trace.blocks)
        if found.maps[index]
    ]
    return [
        *maps,
        f"<{heading}>Working set: memory asked for so far</{heading}>",
        _growth(found),
        f"<{heading}>Latency over time</{heading}>",
        _slow(found),
    ]


def _map(block: TraceBlock, found: Digest, index: int) -> str:
    sums: dict[int, int] = {}
    strongest: dict[int, tuple[int, int]] = {}
    for key, count in found.maps[index].items():
        place, origin = divmod(key, len(found.origins))
        row, column = divmod(place, COLUMNS)
        place = (ROWS - 1 - row) * COLUMNS + column  # low addresses at the bottom
        sums[place] = sums.get(place, 0) + count
        if strongest.get(place, (0, 0))[0] < count:
            strongest[place] = (count, origin)
    most = max(sums.values())
    points = {
        place: (_colour(origin), picture.level_of(sums[place], most))
        for place, (_, origin) in strongest.items()
    }
    larger = next((size for size, few in LARGER if len(points) < few), 1)
    for place in list(points):
        row, column = divmod(place, COLUMNS)
        for y in range(row, min(row + larger, ROWS)):
            for x in range(column, min(column + larger, COLUMNS)):
                points.setdefault(y * COLUMNS + x, points[place])
    up = [
        (tick / block.length, _size(tick)) for tick in picture.ticks(block.length, 8, binary=True)
    ]
    return (
        picture.chart(
            picture.picture(COLUMNS, ROWS, points), COLUMNS, ROWS, _across(found), up,
            f"addresses of faults in {block.name} over time", "since the first fault",
        )
        + _legend(found.origins)
    )  # fmt: skip


def _growth(found: Digest) -> str:
    values = [float(value) for value in accumulate(found.growth_bytes)]
    highest = values[-1]
    height = 220
    up = [(tick / highest, _size(tick)) for tick in picture.ticks(highest, 8, binary=True)]
    return picture.chart(
        picture.line(values, COLUMNS, height, highest), COLUMNS, height, _across(found), up,
        "growth of the working set", "since the first fault",
    )  # fmt: skip


def _latencies(found: Digest) -> str:
    buckets: dict[int, list[int]] = {}
    colours = min(len(found.origins), len(picture.COLOURS))
    for index, origin in enumerate(found.origins):
        for latency_ns in origin.latencies_ns:
            bucket = (latency_ns // 1000).bit_length()
            if bucket not in buckets:
                buckets[bucket] = [0] * colours
            buckets[bucket][_colour(index)] += 1
    rows = [
        (f"below {_time(1000 << bucket)}", buckets.get(bucket, [0]))
        for bucket in range(min(buckets), max(buckets) + 1)
    ]
    return (
        "<h2>Latency: from reading a fault to its answer</h2>"
        + picture.bars(rows, COLUMNS, lambda n: f"{n:,} ({100 * n / found.faults:.1f} %)")
        + _legend(found.origins).replace("The stronger, the more faults.", "")
    )


def _slow(found: Digest) -> str:
    most = max(found.slow.values())
    lowest = min(found.slow) // COLUMNS
    highest = max(found.slow) // COLUMNS
    count = highest - lowest + 1
    height = BUCKET_HEIGHT * count
    neutral = len(picture.COLOURS) - 1
    points = {}
    for key, number in found.slow.items():
        bucket, column = divmod(key, COLUMNS)
        level = picture.level_of(number, most)
        for y in range(BUCKET_HEIGHT - 1):
            points[((highest - bucket) * BUCKET_HEIGHT + y) * COLUMNS + column] = (neutral, level)
    up = [
        ((bucket + 1) / count, f"{_time(1000 << (lowest + bucket))}")
        for bucket in range(0, count, 2 if count > 8 else 1)
    ]
    return picture.chart(
        picture.picture(COLUMNS, height, points), COLUMNS, height, _across(found), up,
        "latencies over time", "since the first fault; each row is below the time beside it",
    )  # fmt: skip


def _time(ns: float) -> str:
    for bound, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if ns >= bound:
            return f"{ns / bound:.3g} {unit}"
    return f"{ns:.0f} ns"


def _size(bytes_: float) -> str:
    for bound, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if bytes_ >= bound:
            return f"{bytes_ / bound:.4g} {unit}"
    return f"{bytes_:.0f}"
