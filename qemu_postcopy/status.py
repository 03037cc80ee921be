"""``qemu-postcopy status``: what the run directories and the sidecars behind them tell."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qemu_postcopy.errors import PostcopyError, SidecarError
from qemu_postcopy.sidecar.control import ANSWER_TIMEOUT, ask
from qemu_postcopy.sidecar.rundir import (
    LISTENING,
    RunDirectory,
    SessionRecord,
    boot_id,
    list_directories,
)

WATCH_SECONDS = 0.5
ASKED_AT_ONCE = 16
#: States in which a guest depends on its sidecar.
DEPENDENT = ("serving", "loaded", "running", "complete")
#: States in which a restore has a QEMU but no guest.
UNBORN = ("new", "found", "attached")


def collect(name: str | None = None, timeout: float = ANSWER_TIMEOUT) -> list[dict[str, Any]]:
    """One entry per guest of this user; a sidecar has ``timeout`` seconds to answer.

    Keys: ``name``, ``state`` (of the session; `waiting` where the sidecar is gone and the guest
    needs it; `ended` where QEMU is gone; `damaged` where its record cannot be read), ``pid``,
    ``image``, ``trouble`` (a sentence, or empty), ``chaos`` (None, or which page data fails on
    purpose and how often it did), ``statistics`` (as
    :class:`qemu_postcopy.paging.pager.Statistics`), ``origins`` (by who faulted: ``faults``,
    ``blocked_us``, ``waiting`` now and for ``waiting_us``, ``latency_us``; see
    :mod:`qemu_postcopy.vm.origin`), ``vcpus`` (``count`` of their threads, how many are ``stopped``
    by a missing page now, for how long each was in all, ``stopped_us``, and all at the same time,
    ``all_stopped_us``; ``async_share`` of all faults, 0 to 1, that the kernel made on their
    behalf; ``async_page_faults``: `on` where the guest takes part, `offered` where it had not asked
    for them when it was saved, `off` where its CPU does not offer them, else `unknown`), ``blocks``
    (each with ``name``, ``page_size``, ``pages``, ``faults``, ``waiting``, ``pages_data``,
    ``pages_data_missing``, ``pages_removed``, ``pages_unmapped``; ``taken_away``: QEMU has it no
    more, as far as is known), ``plugged_in`` (``name`` and ``bytes`` of memory that came later and
    is not paged: there is nothing missing).  What was taken away or plugged in is known at once of
    a guest that was launched here, else when QEMU has opened something since.  Counts begin anew
    when another sidecar takes over.

    Raises:
        SidecarError: no guest of that name is known, or its record is damaged.
    """
    if name:
        return [_entry(RunDirectory.find(name), timeout)]
    # All at the same time: one that does not answer must not keep the others from being seen.
    with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
        found = executor.map(lambda one: _entry_if_there(one, timeout), list_directories())
        return [entry for entry in found if entry is not None]


def _entry_if_there(directory: RunDirectory, timeout: float) -> dict[str, Any] | None:
    try:
        return _entry(directory, timeout)
    except (PostcopyError, OSError, ValueError, TypeError, KeyError) as error:
        if not (directory.path / "session.json").exists():
            return None  # it went away meanwhile
        # Its guest may wait for somebody to notice: it is not left out.
        words = error.message if isinstance(error, PostcopyError) else repr(error)
        return {**_blank(directory), "state": "damaged", "trouble": words}


def _blank(directory: RunDirectory) -> dict[str, Any]:
    return {
        "name": directory.name,
        "state": "",
        "pid": 0,
        "image": "",
        "trouble": "",
        "chaos": None,
        "statistics": {},
        "origins": {},
        "vcpus": {},
        "blocks": [],
        "plugged_in": [],
    }


def _entry(directory: RunDirectory, timeout: float) -> dict[str, Any]:
    record = directory.read_record()
    assert record is not None
    require_types(record)
    entry: dict[str, Any] = {
        **_blank(directory),
        "pid": record.pid,
        "image": record.shown or record.image,
        "statistics": record.statistics,
        "origins": record.origins,
        "vcpus": record.vcpus,
        "blocks": record.block_counts,
    }
    state, trouble = standing(directory, record)
    entry.update(state=state, trouble=trouble or record.damage)
    if state not in DEPENDENT and not (
        record.attached_by == "handshake" and state in UNBORN  # then there is a guest at once
    ):
        return entry
    try:
        answer = ask(directory.control_socket, "status", timeout=timeout)
    except SidecarError:
        why, what = directory.silent_sidecar(record)
        trouble = f"{why}: {what}"
        if failed := directory.supervisor_trouble():
            trouble += f"; {failed}"
        return {**entry, "state": "waiting", "trouble": trouble}
    return {key: answer.get(key, entry[key]) for key in entry}


def require_types(record: SessionRecord) -> None:
    """Raises SidecarError where a record that could be read says what none of ours would."""
    wanted = {
        "image": str,
        "shown": str,
        "state": str,
        "qmp": str,
        "boot_id": str,
        "attached_by": str,
        "pid": int,
        "start_time": int,
        "sidecar_pid": int,
        "statistics": dict,
        "origins": dict,
        "vcpus": dict,
        "blocks": list,
        "block_counts": list,
    }
    for name, kind in wanted.items():
        if not isinstance(getattr(record, name), kind):
            raise SidecarError(
                f"session.json is damaged: {name}",
                hint="nothing of it can be believed; is its guest's QEMU still there (ps)?",
            )


def standing(directory: RunDirectory, record: SessionRecord) -> tuple[str, str]:
    """State and trouble (a sentence, or empty) as far as the run directory and the kernel say."""
    if record.boot_id and record.boot_id != boot_id():
        return "ended", "the host was started again since"
    if record.state == LISTENING:
        if directory.is_served():
            return record.state, ""
        return "ended", "it was killed before a VMM had come: serve it again"
    if not directory.guest_alive(record):
        return ("ended" if record.pid else record.state), ""
    if record.state in UNBORN and record.attached_by != "handshake" and not directory.is_served():
        return "waiting", (
            f"its restore died before there was a guest: qemu-postcopy recover {directory.name}"
        )
    return record.state, ""


def _table(guests: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("guest", "state", "PID", "present", "faults", "waiting", "filled"):
        table.add_column(column, justify="left" if column in ("guest", "state") else "right")
    for guest in guests:
        numbers = guest["statistics"]
        data, missing = numbers.get("pages_data", 0), numbers.get("pages_data_missing", 0)
        present = f"{100 * (1 - missing / data):.1f} %" if data else ""
        table.add_row(
            Text(guest["name"]),
            Text(guest["state"], style="red" if guest["trouble"] else ""),
            str(guest["pid"] or ""),
            present,
            str(numbers.get("faults", "")),
            str(numbers.get("faults_waiting", "")),
            f"{numbers.get('bytes_read', 0) >> 20} MiB",
        )
    return table


def _lines(guests: list[dict[str, Any]]) -> list[Text]:
    """What is to be said of each guest beside the table."""
    lines = []
    for guest in guests:
        if guest["trouble"]:
            lines.append(Text(f"{guest['name']}: {guest['trouble']}", style="red"))
        if guest["chaos"]:
            lines.append(Text(f"{guest['name']}: {_chaos_line(guest['chaos'])}", style="yellow"))
        if guest["origins"]:
            lines.append(Text(f"{guest['name']}: {_origins_line(guest['origins'])}", style="dim"))
        for text in _memory_lines(guest):
            lines.append(Text(f"{guest['name']}: {text}", style="dim"))
        if guest["vcpus"].get("count"):
            lines.append(Text(f"{guest['name']}: {vcpus_line(guest['vcpus'])}", style="dim"))
    return lines


def _memory_lines(guest: dict[str, Any]) -> list[str]:
    """Memory that came or went since."""
    came = [f"{one['name']} ({one['bytes'] >> 20} MiB)" for one in guest["plugged_in"]]
    gone = [block["name"] for block in guest["blocks"] if block.get("taken_away")]
    lines = []
    if came:
        lines.append(f"plugged in since, nothing of it missing: {', '.join(came)}")
    if gone:
        lines.append(f"taken away since: {', '.join(gone)}")
    return lines


def _origins_line(origins: dict[str, Any]) -> str:
    """Who faulted, most of it first."""
    total = sum(entry["faults"] for entry in origins.values()) or 1
    parts = [
        f"{name} {entry['faults']} ({100 * entry['faults'] / total:.0f} %, "
        f"{entry['blocked_us'] / 1000:.1f} ms)"
        for name, entry in sorted(origins.items(), key=lambda item: -item[1]["faults"])
    ]
    return "faults of " + ", ".join(parts)


def vcpus_line(vcpus: dict[str, Any]) -> str:
    """How long virtual CPUs were stopped, in words."""
    now = f", {vcpus['stopped']} now" if vcpus["stopped"] else ""
    each = sum(vcpus["stopped_us"].values()) / 1000
    return (
        f"vCPUs ({vcpus['count']}) stopped for {each:.1f} ms together{now}, all at once for "
        f"{vcpus['all_stopped_us'] / 1000:.1f} ms; {async_words(vcpus)}"
    )


def async_words(vcpus: dict[str, Any]) -> str:
    """Whether the guest uses asynchronous page faults, and how many there were."""
    use = {
        "on": " (the guest takes part)",
        "offered": " (offered; the guest had not asked for them)",
        "off": " (not offered to the guest: kvm-asyncpf-int)",
    }.get(vcpus.get("async_page_faults", ""), "")
    return f"asynchronous: {100 * vcpus['async_share']:.0f} % of faults{use}"


def _chaos_line(chaos: dict[str, Any]) -> str:
    done = ", ".join(
        f"{chaos.get(key, 0)} {word}"
        for key, word in (
            ("failed", "failed"),
            ("truncated", "cut short"),
            ("delayed", "delayed"),
            ("stalled", "stalled"),
        )
    )
    held = f"; {chaos['stalled_now']} held up now" if chaos.get("stalled_now") else ""
    return f"chaos ({chaos['schedule']}): of {chaos.get('reads', 0)} reads {done}{held}"


def show(guests: list[dict[str, Any]]) -> None:
    """Prints them as a table."""
    console = Console(highlight=False)
    if not guests:
        console.print("no guest is known; `qemu-postcopy restore IMAGE` starts one")
        return
    console.print(_table(guests))
    for line in _lines(guests):
        # A file or pipe has no width, and who searches it wants whole lines.
        console.print(line, soft_wrap=not console.is_terminal)


def watch(name: str | None) -> None:
    """Shows them until interrupted."""

    def look() -> RenderableType:
        guests = collect(name)
        return Group(_table(guests), *_lines(guests))

    with Live(look(), auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_SECONDS)
            live.update(look(), refresh=True)
