"""A vhost-user back-end that is in a hurry: it reads all guest memory as soon as it is given it.

As much of the protocol (docs/interop/vhost-user.rst of QEMU) as a vhost-user-blk device needs to
start; requests of the guest are not answered, they wait.  A real back-end touches less, and later.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PAGE_BYTES = 4096
HEADER = struct.Struct("<III")  # request, flags, size
VERSION, REPLY = 1, 1 << 2
REGION = struct.Struct("<QQQQ")  # guest address, size, address in QEMU, offset in the file
FEATURES = 1 << 30 | 1 << 32  # VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1
PROTOCOL_FEATURES = 1 << 9  # VHOST_USER_PROTOCOL_F_CONFIG
SECTORS = 2048


@dataclass(frozen=True)
class Look:
    """What it saw when it was given the memory: the first word of each page, and when."""

    seconds: float
    words: bytes

    def word(self, page: int) -> bytes:
        """Of a page of the memory file."""
        return self.words[8 * page : 8 * page + 8]


class BackEnd:
    """Serves one QEMU at a time, in a thread, until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.looks: list[Look] = []
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(str(path))
        self._server.listen()
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; QEMU sees a back-end that died."""
        for end in (self._server, self._connection):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        with suppress(OSError, EOFError):
            while True:
                self._connection, _ = self._server.accept()
                with self._connection as connection, suppress(EOFError, ConnectionError):
                    while True:
                        self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head, descriptors = _receive(connection, HEADER.size)
        request, _, size = HEADER.unpack(head)
        payload = _receive(connection, size)[0] if size else b""
        try:
            answer = self._do(request, payload, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        if answer:
            connection.sendall(HEADER.pack(request, VERSION | REPLY, len(answer)) + answer)

    def _do(self, request: int, payload: bytes, descriptors: list[int]) -> bytes:
        match request:
            case 1:  # GET_FEATURES
                return struct.pack("<Q", FEATURES)
            case 15:  # GET_PROTOCOL_FEATURES
                return struct.pack("<Q", PROTOCOL_FEATURES)
            case 17:  # GET_QUEUE_NUM
                return struct.pack("<Q", 1)
            case 24:  # GET_CONFIG: struct virtio_blk_config begins with the capacity
                return payload[:12] + struct.pack("<Q", SECTORS) + bytes(len(payload) - 20)
            case 11:  # GET_VRING_BASE
                return payload
            case 5:  # SET_MEM_TABLE
                self._look(payload, descriptors)
        return b""

    def _look(self, payload: bytes, descriptors: list[int]) -> None:
        ends: dict[tuple[int, int], tuple[int, int]] = {}
        for number, descriptor in enumerate(descriptors):
            _, size, _, offset = REGION.unpack_from(payload, 8 + number * REGION.size)
            status = os.fstat(descriptor)
            _, end = ends.get((status.st_dev, status.st_ino), (0, 0))
            ends[status.st_dev, status.st_ino] = descriptor, max(end, offset + size)
        words = array.array("B")
        for descriptor, end in ends.values():
            with mmap.mmap(descriptor, end, prot=mmap.PROT_READ) as memory:
                for page in range(end // PAGE_BYTES):
                    words.frombytes(memory[page * PAGE_BYTES : page * PAGE_BYTES + 8])
        self.looks.append(Look(time.monotonic(), words.tobytes()))


def _receive(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """So many bytes, and the descriptors that came with the first of them."""
    data, descriptors, _, _ = socket.recv_fds(connection, size, 16)
    while len(data) < size:
        more = connection.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data, descriptors
