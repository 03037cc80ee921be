"""What an operator sees while a migration is driven: one line that lives on a terminal, a line for
each change and every ten seconds elsewhere; all of it on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from qemu_postcopy.migrate.drive import News, Stage

#: Between lines where nobody looks at a terminal, in seconds.
LINE_SECONDS = 10.0


def line_of(news: News) -> str:
    """One line: stage and figures."""
    seen = news.observation.statistics
    if not seen.total:
        return f"{news.stage}"
    parts = [
        f"{news.stage}",
        f"{max(0, seen.total - seen.remaining) * 100 // seen.total} %",
        f"{seen.remaining >> 20} MiB left",
        f"{seen.rate / (1 << 20):.0f} MiB/s",
    ]
    if news.stage in (Stage.PRECOPY, Stage.SWITCHING):
        parts.insert(1, f"pass {news.observation.passes}")
        if seen.dirty_rate:
            parts.append(f"guest writes {seen.dirty_rate / (1 << 20):.0f} MiB/s")
    elif seen.requests:
        parts.append(f"{seen.requests} pages asked for")
    return ", ".join(parts)


@contextmanager
def shown() -> Iterator[Callable[[News], None]]:
    """A listener for the driver, for as long as the block runs."""
    if sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True, highlight=False)
        with console.status("setup") as status:

            def live(news: News) -> None:
                if news.text:
                    console.print(news.text, markup=False)
                status.update(line_of(news))

            yield live
        return
    last: tuple[Stage | None, float] = (None, 0.0)

    def lines(news: News) -> None:
        nonlocal last
        now = time.monotonic()
        if news.text:
            click.echo(f"{news.stage}: {news.text}", err=True)
        elif news.stage is not last[0] or now - last[1] >= LINE_SECONDS:
            click.echo(line_of(news), err=True)
            last = (news.stage, now)

    yield lines
