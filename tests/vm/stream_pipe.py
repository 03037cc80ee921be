"""The pipe by which QEMU sends its state to a snapshot under way, read in the tool's place."""

from __future__ import annotations

import fcntl
import os
import select
from pathlib import Path

#: From linux/fcntl.h; the tool makes the pipe of the stream as large as it may be.
F_GETPIPE_SZ = 1032
STREAM_PIPE_BYTES = 1 << 20


def open_stream_of(pid: int) -> int:
    """The reading end of the migration's pipe, opened anew through /proc."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if not os.readlink(entry).startswith("pipe:"):  # noqa: PTH115  no path behind it
            continue
        flags = (Path(f"/proc/{pid}/fdinfo") / entry.name).read_text()
        if int(flags.split("flags:")[1].split()[0], 8) & os.O_ACCMODE != os.O_RDONLY:
            continue
        descriptor = os.open(entry, os.O_RDONLY | os.O_NONBLOCK)
        if fcntl.fcntl(descriptor, F_GETPIPE_SZ) == STREAM_PIPE_BYTES:
            return descriptor
        os.close(descriptor)
    raise AssertionError(f"process {pid} has no pipe of that size")


def read_what_is_there(descriptor: int) -> None:
    if select.select([descriptor], [], [], 0.05)[0]:
        os.read(descriptor, STREAM_PIPE_BYTES)
