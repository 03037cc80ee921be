"""A sidecar that was killed before it had noted its QEMU: that one is looked for, and none but a
QEMU is ended."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_postcopy.errors import AttachError
from qemu_postcopy.recover import _leave_without_guest, owner_of
from qemu_postcopy.sidecar.rundir import SessionRecord


@pytest.fixture
def monitor(tmp_path: Path) -> Path:
    return tmp_path / "qmp.sock"


def started(program: str, monitor: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Waits for its input, and has the monitor among its arguments."""
    words = [program, "-c", "echo ready; read line", f"socket,path={monitor},server=on"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


@pytest.fixture
def wrapper(monitor: Path) -> Iterator[subprocess.Popen[bytes]]:
    yield from started("/bin/sh", monitor)


@pytest.fixture
def qemu(monitor: Path, wrapper: object) -> Iterator[subprocess.Popen[bytes]]:
    program = monitor.with_name("qemu-system-none")
    shutil.copy("/bin/sh", program)
    yield from started(str(program), monitor)


def test_a_wrapper_is_not_taken_for_its_qemu(
    monitor: Path, wrapper: subprocess.Popen[bytes]
) -> None:
    assert owner_of(monitor) == 0


def test_a_qemu_is_found_beside_its_wrapper(monitor: Path, qemu: subprocess.Popen[bytes]) -> None:
    assert owner_of(monitor) == qemu.pid


def test_what_is_no_qemu_is_not_ended(wrapper: subprocess.Popen[bytes]) -> None:
    """The PID may be another process's by the time."""
    record = SessionRecord("/image", "new", pid=wrapper.pid, owned=True)
    with pytest.raises(AttachError, match="is no QEMU"):
        _leave_without_guest(record)
    assert wrapper.poll() is None
