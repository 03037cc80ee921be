"""What is fuzzed: each function takes bytes that anybody may have sent, and may only refuse them.

A refusal is a PostcopyError.  Whatever else comes out, and whatever a target asserts of an input
that was accepted, is a finding.  Used by run.py, which searches, and by test_corpus.py, which
replays what was found worth keeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from qemu_postcopy.errors import HandshakeError, ImageError, PostcopyError
from qemu_postcopy.image.manifest import parse_manifest
from qemu_postcopy.image.stream import Demultiplexer, read_summary
from qemu_postcopy.paging.ledger import Ledger
from qemu_postcopy.restore import handlers
from qemu_postcopy.sidecar.control import LONGEST_LINE, ControlServer
from qemu_postcopy.vm.handshake import HandshakeReader, Region

PIECE_BYTES = 7
#: One pair for all: it only tells the server who asks.
_PEER, _OTHER_END = socket.socketpair()


def handshake(data: bytes) -> None:
    """In one piece or in many, a message says the same."""

    def read(size: int) -> list[Region] | None:
        reader = HandshakeReader()
        with contextlib.suppress(HandshakeError):
            for at in range(0, len(data), size):
                reader.feed(data[at : at + size], int(at == 0))
            return reader.regions()
        return None

    regions = read(len(data) or 1)
    assert read(PIECE_BYTES) == regions
    reached = 0
    for region in regions or []:
        page = region.page_size_bytes
        assert page >= 4096 and page & (page - 1) == 0
        assert region.size_bytes > 0 and region.offset_bytes >= 0
        assert not (region.address | region.size_bytes | region.offset_bytes) & (page - 1)
        assert region.address >= max(reached, 1)
        reached = region.address + region.size_bytes
        assert reached < 1 << 63


class _Session:
    """Stands where the arguments of a request end."""

    def set_background(self, enabled: bool, rate: int) -> None:
        assert type(enabled) is bool
        assert 0 <= rate < 1 << 64


class _Writer:
    """Collects the answers."""

    def __init__(self) -> None:
        self.answers = b""

    def get_extra_info(self, name: str) -> socket.socket:
        return _PEER

    def write(self, data: bytes) -> None:
        self.answers += data

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def control(data: bytes) -> None:
    """Each line that is not too long gets one line of JSON for an answer."""
    session = _Session()
    background = handlers(cast(Any, session))["background"]
    server = ControlServer(Path("unused"), {"background": background})
    writer = _Writer()

    async def serve() -> None:
        reader = asyncio.StreamReader(limit=LONGEST_LINE)
        reader.feed_data(data)
        reader.feed_eof()
        await server._serve(reader, cast(asyncio.StreamWriter, writer))

    asyncio.run(serve())
    answers = writer.answers.splitlines()
    for answer in answers:
        said = json.loads(answer)
        assert isinstance(said["ok"], bool)
        assert said["ok"] or said["message"]
    lines = data.splitlines(keepends=True) if b"\r" not in data else []
    if lines and max(map(len, data.split(b"\n"))) < LONGEST_LINE:
        assert len(answers) == data.count(b"\n") + (not data.endswith(b"\n"))


def ledger(data: bytes) -> None:
    """One that opens has its states inside of the file, each in a place of its own."""
    descriptor = os.memfd_create("ledger")
    try:
        os.write(descriptor, data)
        try:
            opened = Ledger.open(Path(f"/proc/self/fd/{descriptor}"))
        except ImageError:
            return
        with opened:
            reached = opened.journal_offset
            for block in sorted(opened.blocks, key=lambda block: block.offset):
                assert len(opened.states(block.name)) == opened.block(block.name).page_count
                assert block.offset >= reached
                reached = block.offset + block.page_count
            assert reached <= len(data)
    finally:
        os.close(descriptor)


def manifest(data: bytes) -> None:
    """One that is accepted says the same once it was written again."""
    try:
        parsed = parse_manifest(data)
    except ImageError:
        return
    assert parse_manifest(parsed.to_json()) == parsed


def stream(data: bytes) -> None:
    """Looked at, and taken apart into files."""
    descriptor = os.memfd_create("stream")
    directory = Path(tempfile.mkdtemp(prefix="qpc-fuzz-", dir="/dev/shm"))
    try:
        os.write(descriptor, data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with contextlib.suppress(PostcopyError):
            read_summary(descriptor)
        os.lseek(descriptor, 0, os.SEEK_SET)
        with contextlib.suppress(PostcopyError):
            Demultiplexer(descriptor, directory).run()
    finally:
        os.close(descriptor)
        shutil.rmtree(directory)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "handshake": handshake,
    "control": control,
    "ledger": ledger,
    "manifest": manifest,
    "stream": stream,
}
