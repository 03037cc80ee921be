"""libvirt's save files: a header, the domain XML, and a migration stream, perhaps compressed.

Read when a file that ``virsh save`` or managed save wrote is imported; nothing in it is trusted.
Source: libvirt, ``src/qemu/qemu_saveimage.{h,c}`` (header in the byte order of the host).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from qemu_postcopy.errors import HostError, PostcopyError
from qemu_postcopy.image.records import fail

MAGIC = b"LibvirtQemudSave"
PARTIAL_MAGIC = b"LibvirtQemudPart"
HEADER_BYTES = 92
#: XML, cookie and 64 KiB of room to edit; the largest real ones are some 100 KiB.
_DATA_BYTES_MAX = 64 << 20
#: Formats that Python's own library does not know: these are unpacked by the program of that name.
TOOLS = ("lzop", "zstd")
FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")


@dataclass(frozen=True)
class SaveHeader:
    """What stands before the stream."""

    format: str
    domain_xml: str
    was_running: bool
    #: of the stream in the file; in the sparse format offsets in it count from the file's begin
    stream_offset_bytes: int
    #: what libvirt notes of the domain beside its XML (the CPU as it was), XML too; may be empty
    cookie: str = ""


def pack_save_head(domain_xml: str, cookie: str, *, was_running: bool) -> bytes:
    """All that stands before the stream of a save file in the raw format."""
    data = domain_xml.encode() + b"\0"
    cookie_offset = 0
    if cookie:
        cookie_offset = len(data)
        data += cookie.encode() + b"\0"
    numbers = struct.pack("=5I", 2, len(data), int(was_running), 0, cookie_offset)
    return (MAGIC + numbers).ljust(HEADER_BYTES, b"\0") + data


def read_save_header(fd: int) -> SaveHeader:
    """Reads the header of a save file; the descriptor's own offset does not matter.

    Raises:
        ImageError: incomplete, newer than known, or malformed.
    """
    head = os.pread(fd, HEADER_BYTES, 0)
    if head[:16] == PARTIAL_MAGIC:
        fail("libvirt did not finish this save file", "save the domain again")
    if len(head) < HEADER_BYTES or head[:16] != MAGIC:
        fail("not a libvirt save file")
    order = "<"
    if struct.unpack_from("<I", head, 16)[0] > 0xFFFF:
        order = ">"
    version, data_bytes, was_running, number, cookie = struct.unpack_from(f"{order}5I", head, 16)
    if version not in (1, 2):
        fail(f"libvirt save format version {version} is not known", "update qemu-postcopy")
    if number >= len(FORMATS):
        fail(f"libvirt save format number {number} is not known", "update qemu-postcopy")
    if not 0 < data_bytes <= _DATA_BYTES_MAX or cookie > data_bytes:
        fail(f"the header of the libvirt save file announces {data_bytes} bytes of XML")
    xml = os.pread(fd, data_bytes, HEADER_BYTES)
    if len(xml) != data_bytes:
        fail("the libvirt save file ends in its domain XML")
    try:
        text = xml[: cookie or data_bytes].split(b"\0", 1)[0].decode()
        noted = xml[cookie:].split(b"\0", 1)[0].decode() if cookie else ""
    except UnicodeDecodeError:
        fail("the domain XML of the libvirt save file is not UTF-8")
    return SaveHeader(FORMATS[number], text, bool(was_running), HEADER_BYTES + data_bytes, noted)


@contextmanager
def open_stream(fd: int, header: SaveHeader) -> Iterator[tuple[int, int]]:
    """The migration stream in a save file.

    Compressed ones come through a pipe, from a thread or from the program that libvirt itself uses;
    either ends with the context.

    Yields:
        a descriptor, valid within the context, and its offset for ``StreamReader``.

    Raises:
        ImageError: the compression is not supported here, or damaged.
    """
    if header.format in ("raw", "sparse"):
        os.lseek(fd, header.stream_offset_bytes, os.SEEK_SET)
        yield fd, header.stream_offset_bytes
        return
    os.lseek(fd, header.stream_offset_bytes, os.SEEK_SET)
    if header.format in TOOLS:
        with _unpacked_by_tool(fd, header.format) as read_fd:
            yield read_fd, 0
        return
    with os.fdopen(os.dup(fd), "rb") as packed:
        unpacked = _unpack(header.format, packed)
        read_fd, write_fd = os.pipe()
        errors: list[Exception] = []
        thread = threading.Thread(
            target=_pump, args=(unpacked, write_fd, errors), name="qpc-decompress", daemon=True
        )
        thread.start()
        failure: PostcopyError | OSError | None = None
        try:
            yield read_fd, 0
        except (PostcopyError, OSError) as error:
            failure = error
        finally:
            os.close(read_fd)
            thread.join()
        # Asked after the thread has ended: the reader sees the end of the pipe before that.
        if failure is not None:
            if errors:
                fail(f"the {header.format} data of the save file is damaged: {errors[0]}")
            raise failure


def _unpack(name: str, packed: IO[bytes]) -> io.BufferedIOBase:
    if name == "gzip":
        return gzip.GzipFile(fileobj=packed)
    if name == "bzip2":
        return bz2.BZ2File(packed)
    if name == "xz":
        return lzma.LZMAFile(packed)
    raise AssertionError(name)


@contextmanager
def _unpacked_by_tool(fd: int, name: str) -> Iterator[int]:
    """Yields the pipe that the tool writes to, which reads ``fd`` from where it stands."""
    with tempfile.TemporaryFile(prefix="qemu-postcopy-") as said:
        try:
            tool = subprocess.Popen([name, "-dc"], stdin=fd, stdout=subprocess.PIPE, stderr=said)
        except OSError as error:
            raise HostError(
                f"the save file is compressed with {name}, which cannot be run here: "
                f"{error.strerror}",
                hint=f"install {name}, as where the domain was saved",
            ) from error
        assert tool.stdout is not None
        failure: PostcopyError | OSError | None = None
        try:
            yield tool.stdout.fileno()
        except (PostcopyError, OSError) as error:
            failure = error
        finally:
            tool.stdout.close()
            # A reader that has had enough ends it by SIGPIPE.
            status = tool.wait()
        if failure is not None:
            if status > 0:
                said.seek(0)
                words = said.read(500).decode(errors="replace").strip()
                fail(f"the {name} data of the save file is damaged: {words}")
            raise failure


def _pump(unpacked: io.BufferedIOBase, write_fd: int, errors: list[Exception]) -> None:
    try:
        with os.fdopen(write_fd, "wb", buffering=0) as out:
            while part := unpacked.read(1 << 20):
                view = memoryview(part)
                while view:
                    view = view[out.write(view) :]
    except BrokenPipeError:
        pass  # the reader has had enough; it says why
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        errors.append(error)
