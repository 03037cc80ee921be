"""The gate in front of libvirt's QEMU: nobody is left waiting at it, and nobody slips past."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from qemu_postcopy.errors import LibvirtError
from qemu_postcopy.libvirt.gate import Gate
from qemu_postcopy.sidecar.rundir import RunDirectory

HEAD = b"header and XML" * 10


async def admit_while(path: Path, restoring: Any) -> None:
    """Stands in for libvirt's call by a function that is run in a thread."""
    gate = Gate(path, HEAD)
    try:
        gate.watch_call(asyncio.ensure_future(asyncio.to_thread(restoring, path)))
        async with asyncio.timeout(20):
            await gate.admit(b"QEVM")
    finally:
        gate.close()


def test_who_ends_without_reading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LibvirtError, match="without reading the stream"):
        asyncio.run(admit_while(tmp_path / "stream", lambda _: None))


def test_whoever_waits_at_the_gate_of_a_killed_sidecar_is_let_go(tmp_path: Path) -> None:
    run = RunDirectory.create("guest", tmp_path)
    os.mkfifo(run.stream)
    got: list[bytes] = []

    def wait_in_open() -> None:
        with run.stream.open("rb", buffering=0) as file:
            got.append(file.read(4096) or b"")
            got.append(file.read(4096) or b"")

    waiting = threading.Thread(target=wait_in_open, daemon=True)
    waiting.start()
    # A reader in open(2) cannot be seen from here; whichever comes first, it must not hang.
    reader_waits = Path(f"/proc/self/task/{waiting.native_id}/syscall")
    while not reader_waits.read_text().startswith("257 "):  # openat(2) on x86-64
        pass
    run.remove()
    waiting.join(20)
    assert not waiting.is_alive()
    assert got == [bytes(4096), b""]
    assert not run.path.exists()
