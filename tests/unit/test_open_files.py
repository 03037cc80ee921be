"""What a process opens is seen, but for connections to its monitor."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_postcopy.vm.open_files import OpenFiles

#: Does what it reads, a line at a time, and says so.
CHILD = """
import os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[1])
server.listen()
for line in sys.stdin:
    exec(line)
    print(flush=True)
"""


class Watched:
    """A process with a monitor, as QEMU has one."""

    def __init__(self, monitor: Path) -> None:
        self.monitor = str(monitor)
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, self.monitor],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.does("pass")
        self.files = OpenFiles(self.process.pid, self.monitor)

    def does(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "\n"

    def close(self) -> None:
        self.files.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def watched(run_dir: Path) -> Iterator[Watched]:
    process = Watched(run_dir / "qmp.sock")
    yield process
    process.close()


def test_a_file_that_is_opened_is_seen_once(watched: Watched) -> None:
    assert not watched.files.opened()
    watched.does("a = os.open('/dev/null', 0)")
    assert watched.files.opened()
    assert not watched.files.opened()
    watched.does("os.close(a)")
    assert not watched.files.opened(), "closing is no opening"


def test_a_file_is_seen_though_another_one_was_closed(watched: Watched) -> None:
    watched.does("a = os.open('/dev/null', 0)")
    assert watched.files.opened()
    watched.does("b = os.open('/dev/null', 0); os.close(a)")
    assert watched.files.opened()


def test_a_client_of_the_monitor_comes_and_goes_unnoticed_and_hides_nothing(
    watched: Watched,
) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(watched.monitor)
        watched.does("c = server.accept()[0]")
        assert not watched.files.opened()
        watched.does("a = os.open('/dev/null', 0)")
        assert watched.files.opened()
        watched.does("b = os.open('/dev/null', 0); c.close()")
        assert watched.files.opened()
    assert not watched.files.opened()


def test_a_process_that_is_no_more_opens_nothing(watched: Watched) -> None:
    watched.process.kill()
    watched.process.wait()
    assert not watched.files.opened()
    with pytest.raises(OSError, match="No such"):
        OpenFiles(watched.process.pid, "")


def test_whoever_watches_is_told(watched: Watched) -> None:
    async def watch() -> None:
        told = asyncio.Event()
        watched.files.watch(told.set, 0.001)
        watched.does("a = os.open('/dev/null', 0)")
        await asyncio.wait_for(told.wait(), 60)
        assert watched.files.opened()

    asyncio.run(watch())


def test_whoever_watches_is_told_also_where_the_number_of_files_is_the_same(
    watched: Watched,
) -> None:
    watched.does("a = os.open('/dev/null', 0)")
    watched.does("b = os.open('/dev/null', 0)")
    watched.does("os.close(a)")
    watched.files.close()
    watched.files = OpenFiles(watched.process.pid, watched.monitor)

    async def watch() -> None:
        told = asyncio.Event()
        watched.does("a = os.open('/dev/null', 0); c = os.dup(a); os.close(a); os.close(b)")
        watched.files.watch(told.set, 0.001)
        await asyncio.wait_for(told.wait(), 60)
        assert watched.files.opened()

    asyncio.run(watch())
