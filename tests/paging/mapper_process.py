"""The other side of the pager in tests: a process whose memory is paged, driven by commands.

``mapper.c`` does the touching; nothing here ever touches paged memory itself.  Every wait has a
limit, and ends on an event: a reply, a counter, a thread of the mapper that stands in
handle_userfault().
"""

from __future__ import annotations

import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from qemu_postcopy.paging import registration

HERE = Path(__file__).parent
WAIT_SECONDS = 30.0


def compile_mapper(folder: Path) -> Path:
    """Builds mapper.c with the system's compiler."""
    binary = folder / "mapper"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
    include = HERE.parent / "bench"
    command = ["cc", *flags, f"-I{include}", str(HERE / "mapper.c"), "-o", str(binary)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return binary


def wait_until(condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
    """Looks until it is so; fails with ``what`` when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain until {what}"
        time.sleep(0.001)


class Mapper:
    """One mapper process; its userfaultfd is negotiated and registered here."""

    def __init__(self, binary: Path, memory: str, pages: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [str(binary), memory, str(pages)], stdin=theirs.fileno()
            )
        self.socket = ours
        message, descriptors, _, _ = socket.recv_fds(ours, 24, 1)
        self.address, self.length, self.page_size = struct.unpack("<QQQ", message)
        self.pages = pages
        (self.userfaultfd,) = descriptors
        registration.negotiate(self.userfaultfd)
        registration.register(self.userfaultfd, self.address, self.length)
        self.replies: dict[int, str] = {}
        self._received = b""
        self._last_id = 0

    def send(self, *words: object) -> int:
        """Starts a command in a thread of its own; returns its number."""
        self._last_id += 1
        self.socket.sendall((" ".join(map(str, (self._last_id, *words))) + "\n").encode())
        return self._last_id

    def receive(self, seconds: float) -> bool:
        """Takes in what the mapper says within this time; whether it said anything."""
        if not select.select([self.socket], [], [], seconds)[0]:
            return False
        data = self.socket.recv(4096)
        assert data, f"the mapper ended with {self.process.wait()}"
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            number, _, reply = line.decode().partition(" ")
            self.replies[int(number)] = reply
        return True

    def is_waiting(self, command: int) -> bool:
        """Whether a command has not been answered so far."""
        while self.receive(0):
            pass
        return command not in self.replies

    def result(self, command: int, seconds: float = WAIT_SECONDS) -> int:
        """What came of a command."""
        deadline = time.monotonic() + seconds
        while command not in self.replies:
            left = deadline - time.monotonic()
            assert left > 0, f"no answer to command {command} within {seconds} s"
            self.receive(left)
        reply = self.replies.pop(command)
        assert not reply.startswith("error"), reply
        return int(reply, 16)

    def do(self, *words: object) -> int:
        """Runs a command to its end."""
        return self.result(self.send(*words))

    def first_word(self, page: int) -> bytes:
        """Reads the first 8 bytes of a page, which may fault."""
        return self.do("read", page).to_bytes(8, "little")

    def blocked_tids(self, function: str = "handle_userfault") -> list[int]:
        """Those of its threads that wait for a page, or elsewhere in the kernel."""
        tids = []
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            try:
                if (task / "wchan").read_text() == function:
                    tids.append(int(task.name))
            except OSError:
                continue
        return tids

    def blocked_threads(self) -> int:
        """How many of its threads wait for a page."""
        return len(self.blocked_tids())

    def wait_blocked(self, threads: int) -> None:
        """Until that many threads wait for a page."""
        wait_until(lambda: self.blocked_threads() >= threads, f"{threads} threads are blocked")

    def wait_removing(self) -> None:
        """Until one of its threads waits for its removal to be read of."""
        function = "userfaultfd_event_wait_completion"
        wait_until(lambda: self.blocked_tids(function) != [], "a thread removes memory")

    def close(self) -> None:
        """Kills the process."""
        self.process.kill()
        self.process.wait()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
