"""The preload library in a program that does to it what a QEMU might, and worse."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from native.conftest import FLAGS, run_tool

from qemu_postcopy.errors import AttachError, TargetGoneError
from qemu_postcopy.vm.preload import EXIT_STATUS, PROGRAM_VARIABLE, PreloadServer
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("uffd", "cc"), pytest.mark.timeout(120)]

MIB = 1 << 20
SIZES = [32 * MIB, 16 * MIB, 32 * MIB]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("preload") / "preload_test"
    run_tool("cc", *FLAGS, Path(__file__).with_name("preload_test.c"), "-o", binary)
    return binary


@pytest.fixture
def server(run_dir: Path) -> Iterator[PreloadServer]:
    made = PreloadServer(run_dir, SIZES)
    yield made
    made.close()


def start(program: Path, server: PreloadServer, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [program, what],
        env=server.environment({**os.environ, PROGRAM_VARIABLE: program.name}),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_memory_is_registered_as_it_is_mapped_whatever_goes_on_beside(
    program: Path, server: PreloadServer
) -> None:
    with (
        start(program, server, "all") as running,
        ProcessIdentity.open(running.pid) as identity,
    ):
        taken = server.serve(identity)
        assert running.stdout is not None
        said = [running.stdout.readline().split() for _ in range(3)]
        with server.process(identity) as told:
            found = {(m.start, m.end - m.start): m.permissions for m in told.maps()}
            for address, size in said:
                assert (int(address, 16), int(size)) in found
                assert told.registered_from_birth(int(address, 16), int(size))
        smaps = Path(f"/proc/{running.pid}/smaps").read_text()
        for address, _ in said:
            flags = re.search(rf"^{address}-.*?^VmFlags:(.*?)$", smaps, re.M | re.S)
            assert flags and "um" in flags[1].split(), address
        number = f"/proc/{running.pid}/fd/{taken.remote_descriptor}"
        assert "userfaultfd" in str(Path(number).readlink())
        os.close(taken.descriptor)
        said_last, errors = running.communicate(timeout=60)
        # The child's last words; the program's own are none.
        assert errors.count("\n") == 1 and "forked process" in errors
    assert (running.returncode, said_last) == (0, "")


def test_memory_that_is_touched_at_once_ends_the_program_and_says_why(
    program: Path, server: PreloadServer
) -> None:
    with (
        start(program, server, "touch") as running,
        ProcessIdentity.open(running.pid) as identity,
        pytest.raises(AttachError, match="touches guest memory"),
    ):
        server.serve(identity)
    assert running.returncode == -9


def test_program_ends_when_the_sidecar_dies_on_the_way(
    program: Path, server: PreloadServer
) -> None:
    with start(program, server, "all") as running:
        channel, _ = server._listener.accept()
        channel.close()
        _, errors = running.communicate(timeout=60)
    assert running.returncode == EXIT_STATUS
    assert "the sidecar has gone" in errors


@pytest.mark.parametrize("answer", [b"", b"x", b"QCP1" + b"\1\0\0\0" + b"\xff" * 32])
def test_program_ends_where_it_is_answered_nonsense(
    answer: bytes, program: Path, server: PreloadServer
) -> None:
    with start(program, server, "all") as running:
        channel, _ = server._listener.accept()
        channel.send(answer)
        running.communicate(timeout=60)
        channel.close()
    assert running.returncode == EXIT_STATUS


def test_another_process_is_not_taken_for_the_one_that_was_started(
    program: Path, server: PreloadServer
) -> None:
    """Whoever connects first; the server goes on waiting until its own has ended."""
    with (
        start(program, server, "all") as stranger,
        subprocess.Popen(["sleep", "1"]) as meant,
        ProcessIdentity.open(meant.pid) as identity,
        pytest.raises(TargetGoneError),
    ):
        server.serve(identity)
    assert stranger.returncode == EXIT_STATUS
