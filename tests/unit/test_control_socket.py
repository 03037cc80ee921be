"""The control socket: who may ask, what may be asked, and what nonsense gets for an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_postcopy.errors import SidecarError, StateError
from qemu_postcopy.sidecar.control import LONGEST_LINE, ControlServer, ask

NOBODY = 65534


class Served:
    """A server in a thread and event loop of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.server = ControlServer(path, {"echo": self._echo, "refuse": self._refuse})
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.run(self.server.start())

    async def _echo(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"heard": request.get("word")}

    async def _refuse(self, request: dict[str, Any]) -> dict[str, Any]:
        raise StateError("not now", hint="later")

    def run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def close(self) -> None:
        self.run(self.server.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def say(self, *pieces: bytes) -> bytes:
        """Everything that is answered until the server hangs up or we do."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(self.path))
            for piece in pieces:
                client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            while part := client.recv(65536):
                answer += part
            return answer


@pytest.fixture
def served(run_dir: Path) -> Iterator[Served]:
    made = Served(run_dir / "control.sock")
    yield made
    made.close()


def test_question_is_answered(served: Served) -> None:
    assert ask(served.path, "echo", word="hello") == {"ok": True, "heard": "hello"}
    answers = served.say(b'{"command":"echo","word":1}\n', b'{"command":"echo","word":2}\n')
    assert [json.loads(line)["heard"] for line in answers.splitlines()] == [1, 2]


def test_socket_is_for_its_owner_alone_from_the_start(served: Served) -> None:
    assert stat.S_IMODE(served.path.stat().st_mode) == 0o600


def test_refusal_comes_with_its_reason_and_hint(served: Served) -> None:
    with pytest.raises(SidecarError, match="not now") as caught:
        ask(served.path, "refuse")
    assert caught.value.hint == "later"


def test_unknown_command_names_those_that_are_known(served: Served) -> None:
    with pytest.raises(SidecarError, match="known are: echo, refuse"):
        ask(served.path, "shutdown")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"hello\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"7\n",
        b'{"command": 7}\n',
        b'{"command": ["echo"]}\n',
        b'{"word": "echo"}\n',
        b"[" * 5000 + b"\n",
    ],
)
def test_garbage_is_refused_and_the_next_question_answered(line: bytes, served: Served) -> None:
    first, second = served.say(line, b'{"command":"echo","word":"still here"}\n').splitlines()
    assert json.loads(first)["ok"] is False
    assert json.loads(second)["heard"] == "still here"


def test_endless_line_ends_the_connection_and_nothing_else(served: Served) -> None:
    try:
        answer = served.say(b"x" * (4 * LONGEST_LINE))
    except (BrokenPipeError, ConnectionResetError):
        answer = b""
    assert answer == b""
    assert ask(served.path, "echo", word=1)["heard"] == 1


def test_line_without_an_end_is_no_question(served: Served) -> None:
    answer = served.say(b'{"command":"echo","word":"half')
    assert b"half" not in answer
    assert ask(served.path, "echo", word=1)["heard"] == 1


def test_clients_that_say_nothing_keep_nobody_waiting(served: Served) -> None:
    silent = []
    try:
        for _ in range(20):
            silent.append(socket.socket(socket.AF_UNIX))
            silent[-1].connect(str(served.path))
        assert ask(served.path, "echo", word=1)["heard"] == 1
    finally:
        for client in silent:
            client.close()


@pytest.mark.needs("root")
def test_another_user_gets_no_answer_though_the_socket_was_opened_to_all(served: Served) -> None:
    served.path.parent.chmod(0o755)
    served.path.chmod(0o666)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(str(served.path))
                answer = b""
                # The server may have hung up before the question is out.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    client.sendall(b'{"command":"echo","word":1}\n')
                    answer = client.recv(4096)
            os.write(writer, b"answer: " + answer)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        assert stream.read() == b"answer: "
    os.waitpid(child, 0)
    assert ask(served.path, "echo", word=1)["heard"] == 1


@pytest.mark.needs("root")
def test_server_of_another_user_is_not_believed(run_dir: Path) -> None:
    run_dir.chmod(0o777)
    path = run_dir / "theirs.sock"
    ready_reader, ready_writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
                server.listen()
                os.write(ready_writer, b"!")
                connection, _ = server.accept()
                connection.recv(4096)
                connection.close()
        finally:
            os._exit(0)
    os.close(ready_writer)
    with os.fdopen(ready_reader, "rb") as ready:
        ready.read(1)
    with pytest.raises(SidecarError, match=f"served by user {NOBODY}"):
        ask(path, "status")
    os.waitpid(child, 0)


def test_nobody_there_is_said_with_what_to_do(run_dir: Path) -> None:
    with pytest.raises(SidecarError, match="no sidecar answers") as caught:
        ask(run_dir / "no.sock", "status")
    assert "status" in caught.value.hint


@pytest.mark.parametrize("answer", [b"", b"nonsense\n", b"[]\n", b'{"half": '])
def test_answer_that_is_none_is_not_believed(answer: bytes, run_dir: Path) -> None:
    path = run_dir / "odd.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def reply() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(SidecarError):
            ask(path, "status")
        thread.join()


def test_socket_is_removed_at_the_end(run_dir: Path) -> None:
    made = Served(run_dir / "control.sock")
    made.close()
    assert not made.path.exists()
