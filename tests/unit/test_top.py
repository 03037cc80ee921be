"""Promise: `top` shows all guests on any terminal, heeds its keys, and leaves the terminal clean.

The terminal is a real pseudo-terminal, read by a terminal emulator; the sidecars behind the guests
answer what they are told to.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyte
import pytest
from rich.console import Console

from qemu_postcopy.sidecar.control import ControlServer
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord, boot_id
from qemu_postcopy.top.frame import Choice, Look, Shown, Sort, View, between, frame, in_order
from qemu_postcopy.top.terminal import DOWN, UP, keys

WAIT_SECONDS = 30.0
COUNTERS = (
    "faults", "faults_waiting", "pages_data", "pages_data_missing", "pages_demand",
    "pages_background", "pages_prefetched", "pages_zero", "pages_removed", "bytes_read", "retries",
    "source_errors",
)  # fmt: skip


def told(name: str, faults: int = 100, waiting: int = 0) -> dict[str, Any]:
    """What `status` says of a guest."""
    latency = [0] * 24
    latency[5] = faults
    numbers = {key: 0 for key in COUNTERS}
    return {
        "name": name,
        "state": "running",
        "pid": os.getpid(),
        "image": "/image",
        "trouble": "",
        "chaos": None,
        "statistics": {
            **numbers,
            "faults": faults,
            "faults_waiting": waiting,
            "pages_data": 1000,
            "pages_data_missing": 250,
        },
        "origins": {
            "vCPU 0": {
                "faults": faults,
                "blocked_us": 20 * faults,
                "waiting": waiting,
                "waiting_us": 3_000_000 * waiting,
                "latency_us": latency,
            }
        },
        "vcpus": {
            "count": 1,
            "stopped": waiting,
            "stopped_us": {"vCPU 0": 20 * faults},
            "all_stopped_us": 20 * faults,
            "async_share": 0.0,
        },
        "blocks": [
            {
                "name": "pc.ram",
                "page_size": 4096,
                "pages": 4096,
                "faults": faults,
                "waiting": waiting,
                "pages_data": 1000,
                "pages_data_missing": 250,
                "pages_removed": 7,
            }
        ],
    }


class Guests:
    """Run directories, and an event loop that answers for the sidecars of those in them."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.answers: dict[str, dict[str, Any]] = {}
        self.silent: set[str] = set()
        self.speak = asyncio.Event()
        self.loop = asyncio.new_event_loop()
        self.servers: dict[str, ControlServer] = {}
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def add(self, name: str, **numbers: int) -> None:
        """A guest that runs: this very process, as far as anybody can see."""
        run = RunDirectory.create(name, self.base)
        run.write_record(
            SessionRecord(image="/image", state="running", pid=os.getpid(), boot_id=boot_id())
        )
        self.answers[name] = told(name, **numbers)

        async def status(_: dict[str, Any]) -> dict[str, Any]:
            if name in self.silent:
                await self.speak.wait()
            return self.answers[name]

        self.servers[name] = ControlServer(run.control_socket, {"status": status})
        self.run(self.servers[name].start())
        run.release()

    def end(self, name: str) -> None:
        """It ends; its directory stays."""
        RunDirectory(self.base / name).update_record(state="gone", pid=0)

    def close(self) -> None:
        async def settle() -> None:
            self.speak.set()
            for server in self.servers.values():
                await server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        self.run(settle())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def guests(run_dir: Path) -> Iterator[Guests]:
    started = Guests(run_dir / "run")
    yield started
    started.close()


class Terminal:
    """`qemu-postcopy top` on a terminal of its own."""

    def __init__(self, base: Path, *arguments: str, columns: int = 110, lines: int = 30) -> None:
        self.screen = pyte.Screen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.output = b""
        self.main, self.tty = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self.tty)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qemu_postcopy", "top", "--interval", "0.1", *arguments],
            stdin=self.tty,
            stdout=self.tty,
            stderr=self.tty,
            env={**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(base), "TERM": "xterm"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def resize(self, columns: int, lines: int) -> None:
        self.screen.resize(lines, columns)
        # The kernel sends SIGWINCH to the terminal's foreground processes.
        fcntl.ioctl(self.main, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))

    def press(self, text: str) -> None:
        os.write(self.main, text.encode())

    def read(self, seconds: float) -> None:
        if select.select([self.main], [], [], seconds)[0]:
            data = os.read(self.main, 65536)
            self.output += data
            self.stream.feed(data)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.screen.display)

    def wait_for(self, *words: str, gone: str = "") -> str:
        """Until these words are on the screen, and that one is not."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not all(word in self.text for word in words) or (gone and gone in self.text):
            assert time.monotonic() < deadline, f"{words} (not {gone!r}) in vain:\n{self.text}"
            self.read(0.1)
        return self.text

    def wait_end(self) -> int:
        """Until it has ended; the terminal must be as it was."""
        deadline = time.monotonic() + WAIT_SECONDS
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
            self.read(0.1)
        while select.select([self.main], [], [], 0)[0]:
            self.read(0)
        assert termios.tcgetattr(self.tty) == self.before, "the terminal's modes were changed"
        assert self.output.count(b"\x1b[?1049h") == self.output.count(b"\x1b[?1049l") == 1
        assert self.output.rindex(b"\x1b[?25h") > self.output.rindex(b"\x1b[?25l")
        assert b"Traceback" not in self.output
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.main)
        os.close(self.tty)


def test_keys_select_guests_and_views_and_end_it(guests: Guests) -> None:
    guests.add("one")
    guests.add("two", faults=77, waiting=1)
    with Terminal(guests.base) as top:
        top.wait_for("2 served, 1 faults wait", "one: origins", "vCPU 0", "75.0 %", "< 32 µs")
        top.press("j")
        top.wait_for("two: origins", "3.0 s")
        top.press("b")
        top.wait_for("two: blocks", "pc.ram", "16 MiB", "4 KiB")
        top.press("h")
        top.wait_for("two: histogram", "answered within", "█")
        top.press("\x1b[A")
        top.wait_for("one: histogram")
        top.press("s")
        top.wait_for("by faults/s")
        top.press("o")
        top.wait_for("one: origins")
        top.press("q")
        assert top.wait_end() == 0


def test_what_happens_meanwhile_is_shown_unless_it_is_paused(guests: Guests) -> None:
    guests.add("one")
    with Terminal(guests.base) as top:
        top.wait_for("one: origins", "100")
        guests.answers["one"] = told("one", faults=4321)
        top.wait_for("4321")
        top.press("p")
        top.wait_for("PAUSED")
        guests.answers["one"] = told("one", faults=5678)
        guests.add("late")
        for _ in range(5):
            top.read(0.1)
        assert "4321" in top.text and "late" not in top.text
        top.press(" ")
        top.wait_for("5678", "late", "2 served", gone="PAUSED")
        guests.end("one")
        top.wait_for("1 served", "ended")
        top.press("e")
        top.wait_for("late: origins", gone="one")
        top.press("q")
        assert top.wait_end() == 0


def test_a_sidecar_that_is_silent_holds_up_neither_keys_nor_others(guests: Guests) -> None:
    guests.add("one")
    guests.add("two")
    with Terminal(guests.base) as top:
        top.wait_for("2 served", "one: origins")
        guests.silent.add("two")
        guests.answers["one"] = told("one", faults=4321)
        top.press("j")
        top.wait_for("two: origins")
        top.wait_for("4321", "its sidecar has died")
        top.press("q")
        assert top.wait_end() == 0


def test_it_shows_none_and_waits_for_one(guests: Guests) -> None:
    with Terminal(guests.base) as top:
        top.wait_for("no guest is known")
        guests.add("first")
        top.wait_for("first: origins")
        top.press("q")
        assert top.wait_end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_the_terminal_clean(guests: Guests, number: signal.Signals) -> None:
    guests.add("one")
    with Terminal(guests.base) as top:
        top.wait_for("one: origins")
        if number is signal.SIGINT:
            top.press("\x03")
        else:
            top.process.send_signal(number)
        assert top.wait_end() == 0


def test_it_fits_the_terminal_when_that_is_resized(guests: Guests) -> None:
    for number in range(30):
        guests.add(f"guest{number:02}")
    with Terminal(guests.base) as top:
        top.wait_for("guest00", "guest16", "guest00: origins", "vCPU 0", "of 30", gone="guest17")
        top.resize(60, 16)
        top.wait_for("guest02", "guest00: origins", "1 to 3 of 30", gone="guest03")
        top.press("j" * 40)
        top.wait_for("guest29: origins", "28 to 30 of 30", gone="guest01")
        top.resize(140, 60)
        top.wait_for("guest29: origins", "guest00", "given back")
        top.resize(20, 4)
        for _ in range(3):
            top.read(0.1)
        top.press("q")
        assert top.wait_end() == 0


def test_without_a_terminal_one_frame_is_printed(guests: Guests) -> None:
    guests.add("one")
    environment = {**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(guests.base)}
    command = [sys.executable, "-m", "qemu_postcopy", "top"]
    for words in ([], ["--once"], ["one"]):
        done = subprocess.run(
            [*command, *words], env=environment, capture_output=True, text=True, check=True
        )
        assert "1 served" in done.stdout and "one: origins" in done.stdout
        assert "\x1b" not in done.stdout
    with Terminal(guests.base, "--once") as top:
        top.wait_for("one: origins")
        assert top.process.wait(WAIT_SECONDS) == 0
        assert b"\x1b[?1049h" not in top.output
    done = subprocess.run([*command, "nobody"], env=environment, capture_output=True, text=True)
    assert done.returncode == 11 and "no guest named nobody" in done.stderr


def test_keys_in_pieces_and_unknown_ones() -> None:
    assert keys(b"a\x1b[A\x1bOBq") == ["a", UP, DOWN, "q"]
    assert keys(b"\x1b[5~") == []
    assert keys(b"\xc3\xa4j")[-1] == "j"


def drawn(shown: Shown, choice: Choice, width: int = 120, height: int = 40) -> str:
    console = Console(width=width, height=height, highlight=False)
    with console.capture() as captured:
        console.print(frame(shown, choice, width, height))
    return captured.get()


def test_names_are_no_markup_and_rates_never_negative() -> None:
    before = Look(1.0, [told("[red]a", faults=500)])
    after = Look(3.0, [told("[red]a", faults=700)])
    shown = between(before, after)
    assert shown.rates["[red]a"].faults == 100
    assert "[red]a" in drawn(shown, Choice())
    # Another sidecar has taken over, and counts anew.
    assert between(before, Look(3.0, [told("[red]a", faults=10)])).rates["[red]a"].faults == 5
    assert between(before, Look(1.0, before.guests)).rates == {}


@pytest.mark.parametrize("view", View)
def test_a_guest_that_says_nothing_yet_is_shown(view: View) -> None:
    empty = {**told("new"), "statistics": {}, "origins": {}, "vcpus": {}, "blocks": [], "pid": 0}
    assert "new" in drawn(Shown(Look(1.0, [empty])), Choice(view=view))


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (Sort.NAME, ["a", "b", "c"]),
        (Sort.FAULTS, ["b", "a", "c"]),
        (Sort.WAITING, ["a", "b", "c"]),
        (Sort.MISSING, ["a", "b", "c"]),
    ],
)
def test_guests_are_in_the_chosen_order(sort: Sort, order: list[str]) -> None:
    first = Look(1.0, [told("a"), told("b"), {**told("c"), "state": "ended"}])
    later = Look(2.0, [told("a", waiting=2), told("b", faults=900), first.guests[2]])
    names = [guest["name"] for guest in in_order(between(first, later), Choice(sort=sort))]
    assert names == order
