"""Questions written before QEMU can answer: answers are told apart, and nonsense is refused."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator

import pytest

from qemu_postcopy.errors import QmpError
from qemu_postcopy.vm.opening import (
    LONGEST_OPENING_BYTES,
    Opening,
    OpeningReader,
    ask_ahead,
    key_of,
)

QUESTIONS = (("query-status", None), ("qom-get", {"path": "/machine", "property": "type"}))
GREETING = {"QMP": {"version": {"qemu": {"major": 9, "minor": 1, "micro": 0}, "package": ""}}}
EVENT = {"event": "RESUME", "timestamp": {}}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def answers_to(pair: tuple[socket.socket, socket.socket], *said: object) -> Opening:
    ours, theirs = pair
    lines = [word if isinstance(word, bytes) else json.dumps(word).encode() for word in said]
    theirs.sendall(b"".join(line + b"\r\n" for line in lines))
    theirs.shutdown(socket.SHUT_WR)

    async def read() -> Opening:
        async with asyncio.timeout(10):
            return await OpeningReader(ours, QUESTIONS).answers()

    return asyncio.run(read())


def test_negotiation_comes_before_the_questions(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    ask_ahead(ours, QUESTIONS)
    text = theirs.recv(65536).decode()
    assert not set(text) & {" ", "\n"}, "each byte costs QEMU 4 us"
    asked = json.loads("[" + text.replace("}{", "},{") + "]")
    assert [entry["execute"] for entry in asked] == ["qmp_capabilities", "query-status", "qom-get"]
    assert asked[2]["arguments"] == {"path": "/machine", "property": "type"}


def test_answers_are_filed_under_their_questions_and_events_passed_over(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    refused = {"error": {"class": "GenericError", "desc": "no such property"}}
    opening = answers_to(
        pair,
        GREETING,
        {"return": {}},
        EVENT,
        {"return": {"a": 1}},
        refused,
    )
    assert opening.answers[key_of("query-status", {})]["return"] == {"a": 1}
    assert opening.answers[key_of(*QUESTIONS[1])] == refused


@pytest.mark.parametrize(
    "said",
    [
        [],
        [GREETING],
        [GREETING, {"return": {}}, {"return": {}}],
        [GREETING, {"error": {}}, {"return": {}}, {"return": {}}],
        [{"return": {}}, {"return": {}}, {"return": {}}],
        [GREETING, {"return": {}}, {"return": {}}, {"return": {}}, {"return": {}}],
        [GREETING, b"SSH-2.0-OpenSSH"],
        [GREETING, b"[" * 100_000],
        [GREETING, b'["id", 1]'],
    ],
    ids=[
        "nothing",
        "greeting-only",
        "an-answer-short",
        "refuses-to-negotiate",
        "no-greeting",
        "more-answers-than-questions",
        "another-protocol",
        "nested-too-deeply",
        "not-an-object",
    ],
)
def test_whatever_is_no_opening_is_refused(
    said: list[object], pair: tuple[socket.socket, socket.socket]
) -> None:
    with pytest.raises(QmpError, match="cannot talk to the QEMU that was started"):
        answers_to(pair, *said)


def test_endless_answers_are_refused(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair

    async def flood() -> None:
        theirs.setblocking(False)
        loop = asyncio.get_running_loop()
        for _ in range(LONGEST_OPENING_BYTES // 65536 + 2):
            await loop.sock_sendall(theirs, b" " * 65536)

    async def read() -> None:
        flooding = asyncio.create_task(flood())
        try:
            async with asyncio.timeout(30):
                await OpeningReader(ours, QUESTIONS).answers()
        finally:
            flooding.cancel()

    with pytest.raises(QmpError, match="no end"):
        asyncio.run(read())
