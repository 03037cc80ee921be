"""``qemu-postcopy list``: every guest of this host that is, or was, paged; for root of all users.

Run directories of others are looked at with suspicion: nothing in them is followed or waited for,
and what they say is checked before it is shown.  Any thread.
"""

from __future__ import annotations

import itertools
import os
import pwd
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qemu_postcopy.errors import PostcopyError, SidecarError, StateError
from qemu_postcopy.sidecar.control import ask
from qemu_postcopy.sidecar.rundir import NAME, RunDirectory, base_directory
from qemu_postcopy.status import ASKED_AT_ONCE, DEPENDENT, require_types, standing

ADDRESS_SCHEME = "libvirt:"
#: One that does not answer must not keep the others from being seen for long.
ANSWER_SECONDS = 2.0


def collect(*, everybody: bool = True) -> list[dict[str, Any]]:
    """One entry per run directory, by user and name.

    Keys: ``name`` (of the run directory), ``domain`` (as QEMU is called, by libvirt or its command
    line; the name where that is not known), ``uri`` and ``uuid`` (of a libvirt domain, else empty),
    ``user``, ``state`` (as `status` has it; `unused` where nothing was restored), ``stale`` (nobody
    needs the directory any more), ``filled`` (percent of the memory's data that is there, or None),
    ``pid``, ``sidecar_pid`` (0: nobody serves), ``image``, ``run_directory``, ``trouble``.

    Args:
        everybody: root sees the guests of all users.
    """
    with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
        found = executor.map(_entry_if_there, list(_directories(everybody)))
        return [entry for entry in found if entry is not None]


def prune() -> list[str]:
    """Removes the caller's stale run directories; returns their names."""
    removed = []
    for entry in collect(everybody=False):
        if not entry["stale"]:
            continue
        run = RunDirectory(Path(entry["run_directory"]))
        with suppress(StateError, OSError):
            run.lock()  # a restore that has just begun has it
            # What has been made for its guest goes too.
            run.remove()
            removed.append(run.name)
        run.release()
    return removed


def _directories(everybody: bool) -> Iterator[Path]:
    bases = [base_directory()]
    if everybody and os.geteuid() == 0 and "QEMU_POSTCOPY_RUN_DIR" not in os.environ:
        bases += sorted(Path("/run/user").glob("*/qemu-postcopy"))
        bases += sorted(Path("/tmp").glob("qemu-postcopy-[0-9]*"))
    for base in bases:
        with suppress(OSError):
            for path in sorted(base.iterdir()):
                if NAME.fullmatch(path.name) and _is_run_directory(path):
                    yield path


def _is_run_directory(path: Path) -> bool:
    with suppress(OSError):
        return not path.is_symlink() and path.is_dir() and RunDirectory(path).is_run_directory()
    return False


def _entry_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return _entry(path)
    except FileNotFoundError:
        return None  # it went away meanwhile
    except (PostcopyError, OSError, ValueError, TypeError, KeyError) as error:
        words = error.message if isinstance(error, PostcopyError) else repr(error)
        return {**_blank(path), "state": "damaged", "trouble": words}


def _blank(path: Path) -> dict[str, Any]:
    uid = path.lstat().st_uid
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return {
        "name": path.name,
        "domain": path.name,
        "uri": "",
        "uuid": "",
        "user": user,
        "state": "unused",
        "stale": False,
        "filled": None,
        "pid": 0,
        "sidecar_pid": 0,
        "image": "",
        "run_directory": str(path),
        "trouble": "",
    }


def _entry(path: Path) -> dict[str, Any]:
    directory = RunDirectory(path)
    entry = _blank(path)
    served = directory.is_served()
    record = directory.read_record(missing_ok=True)
    if record is None:
        return {**entry, "stale": not served}
    require_types(record)
    state, trouble = standing(directory, record)
    statistics = record.statistics
    if state in DEPENDENT:
        try:
            answer = ask(
                directory.control_socket, "status", timeout=ANSWER_SECONDS, owner=path.stat().st_uid
            )
            state, trouble = str(answer["state"]), str(answer["trouble"])
            statistics = dict(answer["statistics"])
        except SidecarError as error:
            state = "waiting"
            trouble = f"its sidecar does not answer, so the guest waits: {error.message}"
    uri, _, uuid = record.qmp.removeprefix(ADDRESS_SCHEME).rpartition("#")
    of_libvirt = record.qmp.startswith(ADDRESS_SCHEME)
    alive = record.pid and directory.guest_alive(record)
    return {
        **entry,
        "domain": (guest_name(record.pid) if alive else "") or path.name,
        "uri": uri if of_libvirt else "",
        "uuid": uuid if of_libvirt else "",
        "state": state,
        "stale": not served and not alive,
        "filled": _filled(statistics, state),
        "pid": record.pid,
        "sidecar_pid": record.sidecar_pid if served else 0,
        "image": record.shown or record.image,
        "trouble": trouble,
    }


def _filled(statistics: dict[str, Any], state: str) -> float | None:
    if state == "detached":
        return 100.0
    data, missing = statistics.get("pages_data"), statistics.get("pages_data_missing")
    if not isinstance(data, int) or not isinstance(missing, int):
        return None
    return 100 * (1 - missing / data) if data > 0 else 100.0


def guest_name(pid: int) -> str:
    """What a QEMU's guest is called on its command line (``-name``); empty if it is not."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    for option, value in itertools.pairwise(words):
        if option == "-name":
            # A comma in a value is written twice (QemuOpts).
            parts = value.replace(",,", "\0").split(",")
            named = [part for part in parts if part.startswith("guest=") or "=" not in part]
            return named[0].removeprefix("guest=").replace("\0", ",") if named else ""
    return ""


def show(entries: list[dict[str, Any]]) -> None:
    """Prints them as a table."""
    console = Console(highlight=False)
    if not entries:
        console.print("no guest is known; `qemu-postcopy restore IMAGE` starts one")
        return
    users = len({entry["user"] for entry in entries}) > 1
    table = Table(box=None, pad_edge=False)
    for column in ("guest", *(["user"] if users else []), "state"):
        table.add_column(column)
    for column in ("filled", "PID", "sidecar"):
        table.add_column(column, justify="right")
    table.add_column("image", overflow="fold")
    for entry in entries:
        name = entry["domain"]
        if entry["name"] != name:
            name += f" ({entry['name']})"
        state = f"{entry['state']}, stale" if entry["stale"] else entry["state"]
        table.add_row(
            Text(name),
            *([Text(entry["user"])] if users else []),
            Text(state, style="red" if entry["trouble"] else "dim" if entry["stale"] else ""),
            "" if entry["filled"] is None else f"{entry['filled']:.1f} %",
            str(entry["pid"] or ""),
            str(entry["sidecar_pid"] or ""),
            Text(entry["image"]),
        )
    console.print(table)
    for entry in entries:
        if entry["trouble"]:
            line = Text(f"{entry['name']}: {entry['trouble']}", style="red")
            console.print(line, soft_wrap=not console.is_terminal)
