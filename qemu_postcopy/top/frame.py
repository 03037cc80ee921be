"""What ``top`` shows: from two looks at the guests and what the user has chosen, one frame.

Pure: no terminal, no clock, no sidecar.  Trusts what :func:`qemu_postcopy.status.collect` returns,
but for names and texts, which are shown as they are and never taken for markup.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qemu_postcopy.status import vcpus_line

Guest = Mapping[str, Any]
#: States in which nothing is served any more.
OVER = ("detached", "ended", "gone", "failed")
HELP = "q quit  ↑↓ guest  s sort  o origins  b blocks  h histogram  p pause  e ended"
#: What is told of the selected guest takes so many lines at least.
LEAST_DETAIL_LINES = 8
#: The lines that are always there: two of the header, the table's, its caption, the rule.
FIXED_LINES = 5
#: Blanks between columns.
GAP = 2
#: Buckets of a histogram; see ThreadFaults.
BUCKETS = 24


class View(StrEnum):
    """What is told of the selected guest."""

    ORIGINS = "origins"
    BLOCKS = "blocks"
    HISTOGRAM = "histogram"


class Sort(StrEnum):
    """What guests are put in order by."""

    NAME = "name"
    FAULTS = "faults/s"
    WAITING = "waiting"
    MISSING = "missing"


@dataclass
class Choice:
    """What the user has chosen; changed by keys."""

    view: View = View.ORIGINS
    sort: Sort = Sort.NAME
    selected: str = ""
    paused: bool = False
    hide_over: bool = False


@dataclass(frozen=True)
class Look:
    """The guests as they were at one moment (CLOCK_MONOTONIC, seconds)."""

    seconds: float
    guests: Sequence[Guest] = ()
    #: why there is nothing to be seen, if so
    error: str = ""


@dataclass(frozen=True)
class Rates:
    """Of one guest, between two looks."""

    faults: float = 0.0
    bytes_read: float = 0.0


@dataclass(frozen=True)
class Shown:
    """What a frame is made of."""

    look: Look
    rates: Mapping[str, Rates] = field(default_factory=dict)


def between(before: Look, after: Look) -> Shown:
    """The later look, with what has happened since the earlier one."""
    seconds = after.seconds - before.seconds
    earlier = {guest["name"]: guest for guest in before.guests}
    rates = {}
    for guest in after.guests:
        old = earlier.get(guest["name"])
        if old is None or old["pid"] != guest["pid"] or seconds <= 0:
            continue
        # Another sidecar begins to count anew: what it has counted is all of it.
        changes = [
            now if (now := guest["statistics"].get(key, 0)) < old["statistics"].get(key, 0)
            else now - old["statistics"].get(key, 0)
            for key in ("faults", "bytes_read")
        ]  # fmt: skip
        rates[guest["name"]] = Rates(*(change / seconds for change in changes))
    return Shown(after, rates)


def in_order(shown: Shown, choice: Choice) -> list[Guest]:
    """The guests that are shown; those of which nothing is served any more come last."""
    keys: dict[Sort, Callable[[Guest], float]] = {
        Sort.NAME: lambda guest: 0.0,
        Sort.FAULTS: lambda guest: -shown.rates.get(guest["name"], Rates()).faults,
        Sort.WAITING: lambda guest: -guest["statistics"].get("faults_waiting", 0),
        Sort.MISSING: lambda guest: -guest["statistics"].get("pages_data_missing", 0),
    }
    key = keys[choice.sort]
    guests = [
        guest for guest in shown.look.guests if not (choice.hide_over and guest["state"] in OVER)
    ]
    return sorted(guests, key=lambda guest: (guest["state"] in OVER, key(guest), guest["name"]))


def move(guests: Sequence[Guest], choice: Choice, steps: int) -> None:
    """Selects the guest so many lines further down; the first where the selected one is gone."""
    names = [guest["name"] for guest in guests]
    if not names:
        choice.selected = ""
    elif choice.selected not in names:
        choice.selected = names[0]
    else:
        place = names.index(choice.selected) + steps
        choice.selected = names[min(max(place, 0), len(names) - 1)]


def frame(shown: Shown, choice: Choice, width: int, height: int) -> RenderableType:
    """The whole screen, so many columns wide and lines high."""
    guests = in_order(shown, choice)
    move(guests, choice, 0)
    parts: list[RenderableType] = [_header(guests, choice), Text(HELP, "dim", no_wrap=True)]
    if shown.look.error:
        parts.append(Text(shown.look.error, style="red"))
    elif not guests:
        parts.append(Text("no guest is known; `qemu-postcopy restore IMAGE` starts one"))
    if guests:
        most = max(2, min(len(guests), height - LEAST_DETAIL_LINES - FIXED_LINES))
        parts.append(_guests(guests, shown.rates, choice, width, most))
        (selected,) = (guest for guest in guests if guest["name"] == choice.selected)
        parts += _detail(selected, choice, width, height - most - FIXED_LINES)
    return Group(*parts)


def _header(guests: Sequence[Guest], choice: Choice) -> Text:
    served = sum(guest["state"] not in OVER for guest in guests)
    waiting = sum(guest["statistics"].get("faults_waiting", 0) for guest in guests)
    text = Text("qemu-postcopy top", style="bold", no_wrap=True, overflow="ellipsis")
    text.append(f"  {served} served, {waiting} faults wait, by {choice.sort}", style="not bold")
    if choice.paused:
        text.append("  PAUSED", style="yellow")
    return text


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text | str]],
    width: int,
    *,
    expendable: Sequence[str] = (),
    selected: int = -1,
) -> Table:
    """Columns as wide as they need; where that is too much, the expendable ones are left out in
    their order."""
    cells = [[Text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]
    widths = {
        column: max(len(column), *(row[place].cell_len for row in cells))
        for place, column in enumerate(columns)
    }
    for column in expendable:
        if sum(widths.values()) + GAP * (len(widths) - 1) <= width:
            break
        del widths[column]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for number, column in enumerate(widths):
        table.add_column(
            column,
            justify="right" if number and column else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for number, row in enumerate(cells):
        kept = [cell for column, cell in zip(columns, row, strict=True) if column in widths]
        table.add_row(*kept, style="reverse" if number == selected else "")
    table.caption_justify = "left"
    return table


def _guests(
    guests: Sequence[Guest], rates: Mapping[str, Rates], choice: Choice, width: int, most: int
) -> Table:
    place = [guest["name"] for guest in guests].index(choice.selected)
    first = min(max(0, place - most + 1), max(0, len(guests) - most))
    rows: list[list[Text | str]] = []
    for guest in guests[first : first + most]:
        numbers = guest["statistics"]
        rate = rates.get(guest["name"], Rates())
        waiting = numbers.get("faults_waiting", 0)
        vcpus = guest["vcpus"]
        rows.append(
            [
                guest["name"],
                Text(guest["state"], style="red" if guest["trouble"] else ""),
                str(guest["pid"] or ""),
                _share_present(numbers),
                _count(numbers.get("faults")),
                _count(rate.faults),
                Text(_count(waiting), style="red" if waiting else ""),
                f"{numbers.get('bytes_read', 0) >> 20} MiB",
                f"{rate.bytes_read / (1 << 20):.1f}",
                _time(vcpus["all_stopped_us"]) if vcpus.get("count") else "",
            ]
        )
    table = _table(
        ("guest", "state", "PID", "present", "faults", "faults/s", "waiting", "filled", "MiB/s",
         "all stopped"),
        rows,
        width,
        expendable=("PID", "filled", "all stopped", "MiB/s", "faults", "waiting", "state"),
        selected=place - first,
    )  # fmt: skip
    if len(guests) > most:
        table.caption = f"{first + 1} to {first + most} of {len(guests)}"
    return table


def _detail(guest: Guest, choice: Choice, width: int, lines: int) -> list[RenderableType]:
    title = Text(f"{guest['name']}: {choice.view}")
    parts: list[RenderableType] = [Rule(title, style="dim", align="left")]
    if guest["trouble"]:
        parts.append(Text(guest["trouble"], style="red"))
    if guest["chaos"]:
        parts.append(Text(f"page data fails on purpose: {guest['chaos']['schedule']}", "yellow"))
    if guest["vcpus"].get("count"):
        parts.append(Text(vcpus_line(guest["vcpus"]), style="dim", no_wrap=True))
    numbers = guest["statistics"]
    if numbers:
        parts.append(
            Text(
                f"pages: {_count(numbers['pages_demand'])} on demand, "
                f"{_count(numbers['pages_background'])} in the background, "
                f"{_count(numbers['pages_prefetched'])} ahead, {_count(numbers['pages_zero'])} "
                f"zero, {_count(numbers['pages_removed'])} given back; "
                f"{_count(numbers['retries'])} retries, {_count(numbers['source_errors'])} errors",
                style="dim",
                no_wrap=True,
                overflow="ellipsis",
            )
        )
    views = {View.ORIGINS: _origins, View.BLOCKS: _blocks, View.HISTOGRAM: _histogram}
    parts.append(views[choice.view](guest, width, max(3, lines - len(parts) - 1)))
    return parts


def _origins(guest: Guest, width: int, lines: int) -> RenderableType:
    origins: Mapping[str, Any] = guest["origins"]
    if not origins:
        return Text("no fault has been told apart yet", style="dim")
    total = sum(entry["faults"] for entry in origins.values()) or 1
    rows: list[list[Text | str]] = []
    ordered = sorted(origins.items(), key=lambda item: -item[1]["faults"])
    for name, entry in ordered[:lines]:
        faults = entry["faults"]
        row: list[Text | str] = [
            name,
            _count(faults),
            f"{100 * faults / total:.1f} %",
            _time(entry["blocked_us"]),
            _time(entry["blocked_us"] / faults) if faults else "",
            _below(entry["latency_us"], 0.5),
            _below(entry["latency_us"], 0.99),
            Text(
                f"{entry['waiting']}, {_time(entry['waiting_us'])}" if entry["waiting"] else "",
                style="red",
            ),
        ]
        rows.append(row)
    table = _table(
        ("faults of", "number", "share", "blocked", "mean", "p50", "p99", "waiting now"),
        rows,
        width,
        expendable=("share", "mean", "p50", "number", "p99"),
    )
    if len(ordered) > lines:
        table.caption = f"and {len(ordered) - lines} more"
    return table


def _blocks(guest: Guest, width: int, lines: int) -> RenderableType:
    blocks: Sequence[Mapping[str, Any]] = guest["blocks"]
    if not blocks:
        return Text("no block is served yet", style="dim")
    rows = [
        [
            block["name"],
            f"{block['page_size'] >> 10} KiB",
            f"{block['pages'] * block['page_size'] >> 20} MiB",
            f"{block['pages_data'] * block['page_size'] >> 20} MiB",
            _share_present(block),
            _count(block["faults"]),
            _count(block["waiting"]),
            _count(block["pages_removed"]),
        ]
        for block in blocks[:lines]
    ]
    table = _table(
        ("block", "page", "size", "data", "present", "faults", "waiting", "given back"),
        rows,
        width,
        expendable=("page", "size", "given back", "data", "waiting"),
    )
    if len(blocks) > lines:
        table.caption = f"and {len(blocks) - lines} more"
    return table


def _histogram(guest: Guest, width: int, lines: int) -> RenderableType:
    counts = sums(guest)
    if not any(counts):
        return Text("no fault has been answered yet", style="dim")
    used = [index for index, count in enumerate(counts) if count]
    shown = range(used[0], used[-1] + 1)[:lines]
    most = max(counts)
    rows: list[list[Text | str]] = []
    for index in shown:
        label = f"{1 << index} µs" if index < BUCKETS - 1 else "longer"
        bar = "█" * round(max(8, width - 30) * counts[index] / most) or (
            "▏" if counts[index] else ""
        )
        rows.append([label, _count(counts[index]), Text(bar, style="cyan")])
    return _table(("answered within", "faults", ""), rows, width)


def sums(guest: Guest) -> list[int]:
    """The guest's latencies, all origins together."""
    counts = [0] * BUCKETS
    for entry in guest["origins"].values():
        for index, count in enumerate(entry["latency_us"][:BUCKETS]):
            counts[index] += count
    return counts


def _share_present(numbers: Mapping[str, Any]) -> str:
    data = numbers.get("pages_data", 0)
    return f"{100 * (1 - numbers.get('pages_data_missing', 0) / data):.1f} %" if data else ""


def _below(latency_us: Sequence[int], share: float) -> str:
    """The bound that this share of the faults stayed below."""
    wanted, seen = share * sum(latency_us), 0
    for index, count in enumerate(latency_us):
        seen += count
        if count and seen >= wanted:
            return f"< {_time(1 << index)}"
    return ""


def _count(number: float | None) -> str:
    if number is None:
        return ""
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if number >= bound:
            return f"{number / (1000 if unit == 'k' else bound):.1f}{unit}"
    return f"{number:.0f}"


def _time(microseconds: float) -> str:
    for bound, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= bound:
            return f"{microseconds / bound:.1f} {unit}"
    return f"{microseconds:.0f} µs"
