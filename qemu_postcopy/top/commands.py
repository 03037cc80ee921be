"""``qemu-postcopy top``: looks at all guests now and then, draws, and heeds keys.

A thread asks the sidecars, so that one that does not answer holds up neither keys nor the others'
figures for longer than its own; the main thread draws.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Self

import click
from rich.console import Console
from rich.live import Live

from qemu_postcopy.errors import PostcopyError
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.status import collect
from qemu_postcopy.top import terminal
from qemu_postcopy.top.frame import Choice, Look, Shown, Sort, View, between, frame, in_order, move

VIEWS = {"o": View.ORIGINS, "b": View.BLOCKS, "h": View.HISTOGRAM}
#: A sidecar that takes longer has been stopped, or has no processor: the others are not to wait.
ANSWER_SECONDS = 2.0
#: A file or pipe has no size.
ONCE_LINES = 60


def look(names: tuple[str, ...] = ()) -> Look:
    """The guests of this moment: those of these names, or all."""
    try:
        guests = [
            guest
            for guest in collect(timeout=ANSWER_SECONDS)
            if not names or guest["name"] in names
        ]
    except (PostcopyError, OSError) as error:
        return Look(time.monotonic(), error=str(error))
    return Look(time.monotonic(), guests)


class Looker:
    """Looks again every so many seconds, in a thread; leaving its context ends that.

    Threads that are started while the interpreter shuts down are an error: it must have ended
    before.
    """

    def __init__(self, names: tuple[str, ...], seconds: float) -> None:
        self._names = names
        self._seconds = seconds
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self.latest = Shown(Look(time.monotonic(), error="asking the guests"))

    def start(self, keyboard: terminal.Keyboard) -> None:
        """Wakes ``keyboard`` whenever it has seen something new."""
        self._thread = threading.Thread(target=self._run, args=(keyboard,), name="look")
        self._thread.start()

    def _run(self, keyboard: terminal.Keyboard) -> None:
        before = self.latest.look
        while not self._over.is_set():
            now = look(self._names)
            self.latest = between(before, now)
            before = now
            keyboard.wake()
            self._over.wait(self._seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()  # at most ANSWER_SECONDS


def heed(event: str, shown: Shown, choice: Choice) -> bool:
    """Does what a key stands for; returns whether that is to end."""
    if event in VIEWS:
        choice.view = VIEWS[event]
    elif event == "s":
        sorts = list(Sort)
        choice.sort = sorts[(sorts.index(choice.sort) + 1) % len(sorts)]
    elif event in ("p", " "):
        choice.paused = not choice.paused
    elif event == "e":
        choice.hide_over = not choice.hide_over
    elif event in (terminal.UP, "k"):
        move(in_order(shown, choice), choice, -1)
    elif event in (terminal.DOWN, "j"):
        move(in_order(shown, choice), choice, 1)
    return event in ("q", terminal.QUIT)


def watch(console: Console, names: tuple[str, ...], seconds: float) -> None:
    """Until the user has seen enough."""
    choice = Choice()
    with (
        Looker(names, seconds) as looker,  # left last: the terminal is the user's by then
        terminal.Keyboard(sys.stdin.fileno()) as keyboard,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        looker.start(keyboard)
        shown = looker.latest
        while True:
            live.update(frame(shown, choice, *console.size), refresh=True)
            for event in keyboard.wait():
                if heed(event, shown, choice):
                    return
            if not choice.paused:
                shown = looker.latest


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often the guests are asked.",
)
@click.option("--once", is_flag=True, help="Print one frame, as without a terminal.")
def top_command(names: tuple[str, ...], interval: float, once: bool) -> None:
    """Watch all guests of yours, or those named.

    Who faults, how long it waits and for what, which blocks are how far. Keys: q ends; the cursor
    keys, or j and k, select a guest; s sorts by another column; o, b and h show its faults by
    origin, by RAM block, or as a histogram of latencies; p or the space bar pauses; e hides and
    shows guests that are served no more.

    \b
    Examples:
      qemu-postcopy top
      qemu-postcopy top --interval 0.2 vm
      qemu-postcopy top --once
    """
    for name in names:
        RunDirectory.find(name)
    console = Console(highlight=False)
    if once or not console.is_terminal or console.is_dumb_terminal or not sys.stdin.isatty():
        if not console.is_terminal:
            console = Console(highlight=False, width=120)
        console.print(frame(Shown(look(names)), Choice(), console.width, ONCE_LINES))
        return
    watch(console, names, interval)
