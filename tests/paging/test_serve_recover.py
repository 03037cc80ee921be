"""A server of a VMM that handed its memory over may be killed: the VMM waits, and is served on.

The VMM verifies every word of its memory, from four threads.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from paging.handed_over import SECONDS, Vmm
from vm.guests import ends_within, refused, send, status_of, wait_until

from qemu_postcopy.errors import HostError
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("uffd", "cc", "ptrace"), pytest.mark.timeout(120)]

SEED = int(os.environ.get("QPC_SEED", "1"))
KILLS = int(os.environ.get("QPC_KILLS", "6"))
#: So that little is there when the server dies.
SLOWLY = ("--no-background", "--chunk", "4K")
#: Pages that four threads verify in this time are a small part of all.
LONGEST_LIFE_SECONDS = 0.05


def sidecar_of(run: RunDirectory) -> ProcessIdentity:
    record = run.read_record()
    assert record is not None
    return ProcessIdentity.open(record.sidecar_pid)


def kill_server(run: RunDirectory) -> None:
    with sidecar_of(run) as sidecar:
        send(sidecar, signal.SIGKILL)
        assert ends_within(sidecar, SECONDS)


class Served:
    """A VMM and the server in the background that it has handed its memory to."""

    def __init__(self, directory: Path, vmm: Vmm) -> None:
        self.run = RunDirectory(directory)
        self.vmm = vmm

    def sidecar(self) -> ProcessIdentity:
        return sidecar_of(self.run)

    def kill_server(self) -> None:
        kill_server(self.run)

    def wait_state(self, *states: str) -> None:
        wait_until(lambda: status_of("vm")["state"] in states, f"it is {states}", SECONDS)


Serve = Callable[..., Served]


def tool(*arguments: object) -> str:
    """Runs it; what it says on standard output.

    A server in the background has none of the pipes, so it does not keep them open.
    """
    done = subprocess.run(
        [sys.executable, "-m", "qemu_postcopy", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def serve_vmm(
    run_dir: Path, memory_file: Path, vmm_binary: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Serve]:
    """Serves one VMM in the background."""
    monkeypatch.setenv("QEMU_POSTCOPY_RUN_DIR", str(run_dir / "run"))
    with ExitStack() as stack:

        def make(*options: object, how: tuple[str, ...] = (), image: Path = memory_file) -> Served:
            path = run_dir / "uffd.sock"
            said = tool(
                "serve", "--json", "--name", "vm", "--handshake", path, "--image", image, *options
            )
            event = json.loads(said)
            assert event["event"] == "listening"
            assert status_of("vm")["state"] == "listening"
            vmm = Vmm(vmm_binary, path, 4096, *how)
            stack.callback(vmm.close)
            served = Served(Path(event["run_directory"]), vmm)
            served.wait_state("running", "complete", "detached")
            return served

        yield make


def answers(vmm: Vmm) -> bool:
    """Whether it has done what it was told."""
    assert vmm.process.stdout is not None
    return bool(select.select([vmm.process.stdout], [], [], 0)[0])


def answer(vmm: Vmm) -> int:
    assert vmm.process.stdout is not None
    return int(vmm.process.stdout.readline())


@pytest.mark.parametrize("how", [(), ("close",)], ids=["copy kept", "no copy kept"])
def test_a_vmm_whose_server_was_killed_is_served_on(how: tuple[str, ...], serve_vmm: Serve) -> None:
    served = serve_vmm(*SLOWLY, how=how)
    vmm = served.vmm
    assert vmm.do("remove", 100, 50) == 0
    assert vmm.do("zeros", 1000, 1) == 512  # a page that has come
    assert vmm.do("remove", 1000, 1) == 0
    served.kill_server()
    said = status_of("vm")
    assert said["state"] == "waiting" and "recover vm" in said["trouble"]
    vmm.tell("zeros", 3000, 1)
    wait_until(vmm.waits_for_memory, "it waits, and is not given zeros")
    assert not answers(vmm)
    assert vmm.registered() > 0

    tool("recover", "vm")
    assert answer(vmm) == 512
    # What it gave back stays zero, whichever server had heard of it.
    assert vmm.do("zeros", 100, 50) == 0
    assert vmm.do("zeros", 1000, 1) == 0
    refused("recover", "vm", status=10, words=["being restored or served"])
    tool("fill", "vm")
    served.wait_state("complete")
    with served.sidecar() as sidecar:
        vmm.end()
        assert ends_within(sidecar, SECONDS), "the server ends with the VMM"
    wait_until(lambda: not served.run.keeper_socket.exists(), "the keeper ends with it", SECONDS)
    assert status_of("vm")["state"] == "ended"


def test_a_keeper_that_was_killed_too_leaves_the_copy_that_the_vmm_keeps(
    serve_vmm: Serve,
) -> None:
    served = serve_vmm(*SLOWLY)
    kill_keeper(served)
    served.kill_server()
    tool("recover", "vm")
    assert served.vmm.do("verify") == 0


def test_a_guest_that_is_lost_is_told_to_be(serve_vmm: Serve) -> None:
    """Nobody holds the descriptor any more: the kernel has given the memory back, as zeros."""
    served = serve_vmm(*SLOWLY, how=("close",))
    kill_keeper(served)
    served.kill_server()
    assert served.vmm.registered() == 0
    refused("recover", "vm", status=6, words=["lost", "end that VMM"])


def kill_keeper(served: Served) -> None:
    (pid,) = (
        int(comm.parent.name)
        for comm in Path("/proc").glob("[0-9]*/comm")
        if read(comm) == "qpc-keeper\n" and str(served.run.path) in sockets_of(comm.parent)
    )
    with ProcessIdentity.open(pid) as identity:
        send(identity, signal.SIGKILL)
        assert ends_within(identity, SECONDS)


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def sockets_of(process: Path) -> str:
    """The paths of UNIX sockets that a process listens at."""
    inodes = {entry.stat().st_ino for entry in (process / "fd").iterdir()}
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    return "\n".join(line for line in lines if int(line.split()[6]) in inodes)


#: Where a server is killed that knows all and has answered nothing.
BEFORE_IT_SERVES = {
    "before the ledger": "handover.HandoverSession.serve = lambda s: kill()",
    "in the ledger": "ledger.HEADER = types.SimpleNamespace(pack_into=kill, size=16)",
    "after the ledger": "session.Session._make_pager = kill",
}


@pytest.mark.parametrize("where", BEFORE_IT_SERVES)
def test_a_server_that_died_before_it_served_is_replaced(
    where: str, serve_vmm: Serve, run_dir: Path, memory_file: Path, vmm_binary: Path
) -> None:
    """The VMM waits from the first."""
    stopping = (
        "import os, signal, types\n"
        "from qemu_postcopy import cli, handover, session\n"
        "from qemu_postcopy.paging import ledger\n"
        "def kill(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{BEFORE_IT_SERVES[where]}\n"
        "cli.main()"
    )
    path = run_dir / "uffd.sock"
    server = subprocess.Popen(
        [sys.executable, "-c", stopping, "serve", "--foreground", "--name", "vm",
         "--handshake", str(path), "--image", str(memory_file)],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert server.stdout is not None and server.stdout.readline() == b"listening\n"
    vmm = Vmm(vmm_binary, path, 4096, "close")
    assert server.wait(SECONDS) == -signal.SIGKILL
    server.stdout.close()
    vmm.tell("verify")
    ledger = RunDirectory.find("vm").ledger
    assert ledger.exists() is (where == "after the ledger")
    try:
        assert status_of("vm")["state"] == "waiting"
        if where == "after the ledger":  # a damaged one could be that of a server that has served
            good = ledger.read_bytes()
            ledger.write_bytes(good[:10])
            refused("recover", "vm", status=4, words=["ledger", "too short"])
            assert vmm.registered() > 0
            ledger.write_bytes(good)
        tool("recover", "vm")
        assert answer(vmm) == 0
    finally:
        vmm.close()


def test_a_server_that_cannot_serve_leaves_the_vmm_waiting_and_not_with_zeros(
    serve_vmm: Serve, run_dir: Path, memory_file: Path, vmm_binary: Path
) -> None:
    """Its run directory is full, say: the ledger cannot be made."""
    failing = (
        "from qemu_postcopy import cli; from qemu_postcopy.errors import HostError;"
        "from qemu_postcopy.paging.pager import Pager\n"
        "def start(self): raise HostError('no room', hint='make some')\n"
        "Pager.start = start\n"
        "cli.main()"
    )
    path = run_dir / "uffd.sock"
    server = subprocess.Popen(
        [sys.executable, "-c", failing, "serve", "--foreground", "--name", "vm",
         "--handshake", str(path), "--image", str(memory_file)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert server.stdout is not None and server.stdout.readline() == b"listening\n"
    vmm = Vmm(vmm_binary, path, 4096, "close")
    try:
        assert server.wait(SECONDS) == HostError.exit_code
        server.stdout.close()
        assert vmm.registered() > 0
        tool("recover", "vm")
        assert vmm.do("verify") == 0
    finally:
        vmm.close()


def test_a_memory_file_that_was_written_to_since_is_not_served(
    serve_vmm: Serve, run_dir: Path, memory_file: Path
) -> None:
    own = run_dir / "mem"
    own.write_bytes(memory_file.read_bytes())
    served = serve_vmm(*SLOWLY, image=own)
    served.kill_server()
    os.utime(own, ns=(1, 1))
    refused("recover", "vm", status=4, words=["not the image"])
    assert served.vmm.registered() > 0


def test_kills_at_random_moments_cost_no_word(serve_vmm: Serve) -> None:
    """Of the first server and of those that take over; with and without the VMM's own copy."""
    chance = random.Random(SEED)
    kills = 0
    while kills < KILLS:
        served = serve_vmm(*SLOWLY, how=chance.choice([(), ("close",)]))
        served.vmm.tell("verify")
        for _ in range(6):
            time.sleep(chance.uniform(0, LONGEST_LIFE_SECONDS))
            served.kill_server()
            tool("recover", "vm")
            kills += 1
        assert answer(served.vmm) == 0
        with served.sidecar() as sidecar:
            served.vmm.close()
            assert ends_within(sidecar, SECONDS)
    print(f"QPC_SEED={SEED}: {kills} kills: 0 wrong words")


def test_a_supervised_vmm_is_served_on_by_itself(serve_vmm: Serve) -> None:
    served = serve_vmm(*SLOWLY, "--supervise")
    served.vmm.tell("verify")
    for _ in range(2):
        with served.sidecar() as sidecar:
            before = sidecar.pid
            send(sidecar, signal.SIGKILL)

        def taken_over(before: int = before) -> bool:
            record = served.run.read_record()
            return record is not None and record.sidecar_pid != before

        wait_until(taken_over, "another server serves", SECONDS)
        served.wait_state("running", "complete", "detached")
    assert answer(served.vmm) == 0


def test_a_detached_vmm_has_all_its_memory_and_nobody_left(serve_vmm: Serve) -> None:
    served = serve_vmm("--detach")
    served.wait_state("detached")
    assert served.vmm.registered() == 0
    assert served.vmm.do("verify") == 0
    wait_until(lambda: not served.run.keeper_socket.exists(), "the keeper has ended", SECONDS)
    refused("recover", "vm", status=10, words=["detached", "needs no sidecar"])


def test_a_server_killed_before_a_vmm_came_is_told_of(
    serve_vmm: Serve, run_dir: Path, memory_file: Path
) -> None:
    path = run_dir / "uffd.sock"
    words = ("serve", "--name", "early", "--handshake", path, "--image", memory_file)
    tool(*words)
    refused(*words, status=10, words=["early", "being restored or served"])
    kill_server(RunDirectory.find("early"))
    said = status_of("early")
    assert said["state"] == "ended" and "serve it again" in said["trouble"]
    refused("recover", "early", status=10, words=["before a VMM had handed"])
    tool(*words)
    kill_server(RunDirectory.find("early"))
