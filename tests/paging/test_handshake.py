"""VMMs that hand their own userfaultfd over: served like any guest, and not believed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest
from paging.handed_over import MIB, PAGE, SECONDS, SIZE_MIB, Vmm
from paging.mapper_process import wait_until

from qemu_postcopy._native import check, lib, new_error
from qemu_postcopy.errors import GuestEndedError, HandshakeError, ImageError, LeftRunningError
from qemu_postcopy.image.manifest import Block, Manifest, Provenance, StateFile
from qemu_postcopy.image.memory_file import MemoryFile
from qemu_postcopy.region import Region
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.userfaultfd import Mode, Userfaultfd
from qemu_postcopy.vm import handshake, handshake_socket
from qemu_postcopy.vm.kernel_faults import require_kernel_faults, require_registered
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("uffd", "cc"), pytest.mark.timeout(120)]

NOBODY = 65534
REFUSED = 6


class Server:
    """`qemu-postcopy serve`, its reports read as they come."""

    def __init__(
        self, directory: Path, image: Path, *options: object, foreground: bool = True
    ) -> None:
        self.path = directory / "uffd.sock"
        arguments = [
            "serve",
            *(["--foreground"] if foreground else []),
            "--json",
            "--name",
            "vm",
            "--handshake",
            self.path,
            "--image",
            image,
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qemu_postcopy", *map(str, [*arguments, *options])],
            env={**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(directory / "run")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.run_base = directory / "run"
        self.events: list[str] = []

    def wait_for(self, event: str) -> Self:
        """Until it has said so."""
        assert self.process.stdout is not None
        while event not in self.events:
            line = self.process.stdout.readline()
            assert line, f"ended without {event}: {self.errors()}"
            self.events.append(json.loads(line)["event"])
        return self

    def is_served(self) -> bool:
        return RunDirectory(self.run_base / "vm").is_served()

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def wait(self) -> int:
        """Its exit status."""
        return self.process.wait(SECONDS)

    def status(self) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "qemu_postcopy", "status", "vm", "--json"],
            env={**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(self.run_base)},
            capture_output=True,
            check=True,
        )
        (entry,) = json.loads(done.stdout)
        assert isinstance(entry, dict)
        return entry

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


Start = Callable[..., Server]
Resume = Callable[..., Vmm]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def start(run_dir: Path, memory_file: Path, stack: ExitStack) -> Start:
    """A server that listens."""

    def make(*options: object, image: Path = memory_file) -> Server:
        server = Server(run_dir, image, *options)
        stack.callback(server.close)
        return server.wait_for("listening")

    return make


@pytest.fixture
def resume(vmm_binary: Path, stack: ExitStack) -> Resume:
    """A VMM that has handed over."""

    def make(server: Server, page_bytes: int = PAGE, *how: str) -> Vmm:
        vmm = Vmm(vmm_binary, server.path, page_bytes, *how)
        stack.callback(vmm.close)
        return vmm

    return make


@pytest.mark.parametrize(
    "options",
    [(), ("--no-background", "--chunk", "4K")],
    ids=["background", "demand"],
)
def test_every_word_of_a_handed_over_memory_is_right(
    options: tuple[str, ...], start: Start, resume: Resume
) -> None:
    server = start(*options)
    vmm = resume(server)
    assert vmm.do("verify") == 0
    server.wait_for("complete")
    status = server.status()
    assert (status["state"], status["pid"], status["trouble"]) == (
        "complete",
        vmm.process.pid,
        "",
    )
    # It serves on: the guest's balloon takes and gives.
    assert vmm.registered() > 0
    assert vmm.do("remove", 100, 500) == 0
    assert vmm.do("zeros", 100, 500) == 0
    vmm.end()
    assert server.wait_for("gone").wait() == 0
    assert not server.path.exists()


def test_pages_that_a_balloon_took_before_they_came_are_zero(start: Start, resume: Resume) -> None:
    server = start("--no-background", "--chunk", "2M")
    vmm = resume(server)
    assert vmm.do("remove", 1000, 1000) == 0
    assert vmm.do("zeros", 1000, 1000) == 0
    assert server.status()["statistics"]["pages_removed"] == 1000


@pytest.mark.needs("hugetlb")
def test_huge_pages_are_served_whole(
    start: Start, resume: Resume, reserve_huge_pages: Callable[[int], None]
) -> None:
    reserve_huge_pages(SIZE_MIB * MIB)
    server = start("--no-background")
    vmm = resume(server, 2 * MIB)
    assert vmm.do("verify") == 0
    assert server.wait_for("complete").status()["statistics"]["pages_total"] == SIZE_MIB // 2


def test_an_image_of_ours_serves_its_blocks_one_after_the_other(
    start: Start, resume: Resume, memory_file: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    (image / "ram").mkdir(parents=True)
    (image / "state.bin").write_bytes(b"-")
    data = memory_file.read_bytes()
    first = SIZE_MIB * MIB // 4 * 3
    (image / "ram/a").write_bytes(data[:first])
    (image / "ram/b").write_bytes(data[first:])
    block = Block("a", first, PAGE, "ram/a", 0, 0, ("0" * 64,))
    manifest = Manifest(
        qemu_version=None,
        machine="none",
        architecture="x86_64",
        target_page_size_bytes=PAGE,
        chunk_size_bytes=64 << 10,
        state=StateFile("state.bin", 1, "0" * 64),
        blocks=(block, replace(block, name="b", file="ram/b", size_bytes=len(data) - first)),
        provenance=Provenance("2026-01-01T00:00:00+00:00", "test", "test"),
    )
    (image / "manifest.json").write_text(manifest.to_json())
    vmm = resume(start(image=image))
    assert vmm.do("verify") == 0


def test_a_vmm_that_is_left_when_complete_has_all_of_its_memory(
    start: Start, resume: Resume
) -> None:
    server = start("--detach")
    vmm = resume(server)
    assert server.wait_for("detached").wait() == 0
    assert vmm.registered() == 0
    assert vmm.do("verify") == 0


def test_a_server_that_is_asked_to_end_fills_the_rest_first(start: Start, resume: Resume) -> None:
    server = start("--no-background")
    vmm = resume(server)
    server.wait_for("running")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait_for("detached").wait() == 0
    assert vmm.do("verify") == 0


def test_a_server_that_is_asked_to_end_before_a_vmm_came_leaves_nothing(start: Start) -> None:
    server = start()
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 130
    assert not server.path.exists()
    assert list(server.run_base.iterdir()) == []


def test_a_server_that_nobody_comes_to_gives_up(start: Start) -> None:
    server = start("--accept-seconds", "0.1")
    assert server.wait() == 130
    assert "no VMM has connected" in server.errors()


def test_a_vmm_that_is_killed_ends_its_server(start: Start, resume: Resume) -> None:
    server = start("--no-background")
    vmm = resume(server)
    server.wait_for("running")
    vmm.process.kill()
    assert server.wait_for("gone").wait() == GuestEndedError.exit_code
    assert "ended while it was served" in server.errors()


@pytest.mark.parametrize("goal", ["running", "complete"])
def test_ctrl_c_leaves_a_server_that_listens_or_serves_alone_and_says_so(
    goal: str, run_dir: Path, memory_file: Path, resume: Resume, stack: ExitStack
) -> None:
    options = ("--no-background", "--wait", goal)
    server = Server(run_dir, memory_file, *options, foreground=False)
    stack.callback(server.close)
    server.wait_for("listening")
    vmm = None
    if goal == "complete":
        vmm = resume(server)
        server.wait_for("running")
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == LeftRunningError.exit_code
    assert "serves on as vm" in server.errors()
    vmm = vmm or resume(server)
    assert vmm.do("verify") == 0
    vmm.end()
    wait_until(lambda: not server.is_served(), "the server has ended", SECONDS)


def test_a_vmm_that_dies_in_the_handshake_makes_room_for_another(
    start: Start, resume: Resume
) -> None:
    server = start()
    for piece in (b"", b'[{"base_host'):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.path))
            client.sendall(piece)
    assert resume(server).do("verify") == 0


def test_a_vmm_is_served_though_no_keeper_can_be_had(start: Start, resume: Resume) -> None:
    """Given up it would run on with zeros, if it keeps no copy of its userfaultfd."""
    server = start("--no-background")
    (run,) = (RunDirectory(path) for path in server.run_base.iterdir())
    run.keeper_socket.mkdir()
    vmm = resume(server, PAGE, "close")
    assert vmm.do("verify") == 0
    vmm.process.kill()
    assert server.wait_for("gone").wait() == 0
    assert "is lost" in server.errors()


@pytest.mark.needs("root")
def test_only_the_users_that_are_meant_are_served(start: Start, resume: Resume) -> None:
    server = start()
    server.path.chmod(0o666)
    server.path.parent.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(server.path))
            os._exit(len(client.recv(1)))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert resume(server).do("verify") == 0


def test_a_vmm_that_asks_for_what_is_not_there_is_told_to_the_operator(start: Start) -> None:
    server = start()
    region = {"base_host_virt_addr": 1 << 40, "size": PAGE, "offset": 64 * MIB}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(server.path))
        socket.send_fds(client, [json.dumps([region]).encode()], [userfaultfd()])
        assert server.wait() == REFUSED
    said = server.errors()
    assert "the image has pieces" in said and "Traceback" not in said
    assert not server.path.exists()


@pytest.mark.needs("ptrace")
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("user-mode-only", ["UFFD_USER_MODE_ONLY", "KVM", "/dev/userfaultfd", "sysctl"]),
        ("unregistered", ["registered", "UFFDIO_REGISTER"]),
        ("write-protect", ["MISSING only"]),
        ("claim", ["4,096 bytes", "2,097,152"]),
    ],
)
def test_a_userfaultfd_that_cannot_serve_the_guest_is_refused_by_name(
    how: str, words: list[str], start: Start, resume: Resume
) -> None:
    """Before anything is served; the VMM is left as it was."""
    server = start()
    vmm = resume(server, PAGE, how)
    assert server.wait() == REFUSED, server.errors()
    said = server.errors()
    assert "Traceback" not in said
    for word in words:
        assert word in said
    assert "attached" not in server.events
    assert vmm.process.poll() is None


@pytest.mark.needs("ptrace")
def test_memory_that_is_registered_and_not_handed_over_is_told_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        ProcessIdentity.open(os.getpid()) as ourselves,
        Region.anonymous(4 * PAGE) as memory,
        Userfaultfd.open(blocking=False) as uffd,
    ):
        uffd.register(memory.address, 4 * PAGE, Mode.MISSING)
        two = [
            handshake.Region(memory.address + 2 * PAGE, 2 * PAGE, 0, PAGE),
            handshake.Region(memory.address, 2 * PAGE, 0, PAGE),
        ]
        require_registered(ourselves, two)
        assert not caplog.records
        require_registered(ourselves, two[1:])
        assert f"{memory.address + 2 * PAGE:#x} is registered" in caplog.text


@pytest.mark.needs("ptrace")
def test_asking_whether_the_kernel_s_faults_come_fills_nothing_and_leaves_no_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        ProcessIdentity.open(os.getpid()) as ourselves,
        Region.anonymous(2 * PAGE) as memory,
        Userfaultfd.open(blocking=False) as uffd,
    ):
        uffd.register(memory.address, 2 * PAGE, Mode.MISSING)
        require_kernel_faults(ourselves, uffd.fileno(), [memory.address])
        assert uffd.read() == []
        assert not caplog.records
        uffd.zeropage(memory.address, PAGE)
        # The first one is present, and tells nothing; then nobody can tell.
        require_kernel_faults(ourselves, uffd.fileno(), [memory.address, memory.address + PAGE])
        assert not caplog.records
        require_kernel_faults(ourselves, uffd.fileno(), [memory.address])
        assert "not known" in caplog.text
        uffd.zeropage(memory.address + PAGE, PAGE)  # it was still missing


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def userfaultfd() -> int:
    error = new_error()
    return check(lib.qpc_uffd_open(error), error)


REGION = b'[{"base_host_virt_addr": 1099511627776, "size": 4096, "offset": 0}]'
#: what is sent, with which descriptors
HOSTILE: dict[str, tuple[list[tuple[bytes, str]], str]] = {
    "no descriptor": ([(REGION, "")], "no descriptor"),
    "two descriptors": ([(REGION, "uu")], "2 descriptors"),
    "one with each part": ([(REGION[:5], "u"), (REGION[5:], "u")], "2 descriptors"),
    "more than can be read": ([(REGION, "u" * 40)], "descriptors"),
    "a file": ([(REGION, "f")], "another descriptor"),
    "a socket": ([(REGION, "s")], "another descriptor"),
    "no array": ([(b"{}", "u")], "no JSON array"),
    "something else": ([(b"GET / HTTP/1.1\r\n", "u")], "no JSON array"),
    "an array and more": ([(REGION + b"x", "u")], "follows"),
    "cut": ([(REGION[:-1], "u")], "before its closing bracket"),
    "nothing": ([], "hung up"),
    "no end": ([(b"[", "u"), *[(b" " * 70_000, "")] * 20], "longer"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_handshake_is_refused_and_leaves_no_descriptor(name: str) -> None:
    parts, words = HOSTILE[name]
    before = descriptors()
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs:
            for data, kinds in parts:
                made = [
                    {"u": userfaultfd, "f": lambda: os.memfd_create("x"), "s": theirs.dup().detach}[
                        kind
                    ]()
                    for kind in kinds
                ]
                try:
                    socket.send_fds(theirs, [data], made)
                except OSError:
                    return
                finally:
                    for descriptor in made:
                        os.close(descriptor)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with ours, pytest.raises(HandshakeError, match=words):
            asyncio.run(handshake_socket.read_handshake(ours))
    finally:
        sender.join(SECONDS)
    assert descriptors() == before


def test_a_handshake_that_stays_away_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake_socket, "MESSAGE_SECONDS", 0.05)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(HandshakeError, match="not sent a whole handshake"):
        theirs.send(b"[")
        asyncio.run(handshake_socket.read_handshake(ours))


def test_a_memory_file_is_a_file_with_something_in_it(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(ImageError):
            MemoryFile.open(path)
