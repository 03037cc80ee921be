"""A snapshot of a domain whose libvirtd is killed meanwhile, alone or with the tool: no image, and
the guest runs on as if nothing was as soon as libvirtd is back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import Domain, start_domain
from libvirtd.saved import MEMFD
from vm.guests import PATIENCE, send, wait_until
from vm.stream_pipe import open_stream_of, read_what_is_there

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = [pytest.mark.needs("guest", "uffd", "ptrace", "root"), pytest.mark.timeout(300)]

TOOL = (sys.executable, "-m", "qemu_postcopy", "snapshot")
GUARD = f"{sys.executable}\0-P\0-m\0qemu_postcopy.vm.guard"
TRIES = 10
#: How long libvirtd is not there: longer than one try to reach it.
AWAY_SECONDS = 2.0


@dataclass
class Tool:
    """A snapshot under way, stopped in the middle of the stream."""

    popen: subprocess.Popen[str]
    process: ProcessIdentity

    def stop(self) -> None:
        """With nsenter, by which it was started, and which stops itself when its child does."""
        send(self.process, signal.SIGSTOP)
        stat = Path(f"/proc/{self.popen.pid}/stat")
        wait_until(
            lambda: self.popen.poll() is not None or stat.read_text().rpartition(") ")[2][0] == "T",
            "nsenter has stopped",
        )

    def go_on(self) -> None:
        send(self.process, signal.SIGCONT)
        with suppress(ProcessLookupError):
            os.kill(self.popen.pid, signal.SIGCONT)

    def end(self) -> tuple[int, str]:
        """Its exit status and what it said."""
        _, said = self.popen.communicate(timeout=PATIENCE)
        return self.popen.returncode, said


def ask(host: Host, command: str) -> Any:
    said = host.virsh("qemu-monitor-command", "guest", json.dumps({"execute": command}))
    return json.loads(said)["return"]


def settings(host: Host) -> list[Any]:
    return [ask(host, f"query-migrate-{what}") for what in ("capabilities", "parameters")]


def has_begun(image: Path) -> bool:
    """Whether a page has been written."""
    return any(path.stat().st_blocks for path in image.parent.glob(".*/ram/*"))


@contextmanager
def stopped_while_sending(host: Host, image: Path) -> Iterator[Tool]:
    """QEMU is in the middle of its stream and waits for its reader, which is stopped."""
    for _ in range(TRIES):
        popen = host.popen(
            *TOOL, "--connect", "qemu:///system", "guest", image,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        (pid,) = wait_until(lambda: host.processes("\0".join(TOOL)), "the tool")
        with ProcessIdentity.open(pid) as process:
            wait_until(lambda: has_begun(image) or popen.poll() is not None, "pages")  # noqa: B023
            tool = Tool(popen, process)
            tool.stop()
            try:
                if ask(host, "query-migrate").get("status") == "active":
                    yield tool
                    return
            finally:
                tool.go_on()
        # It was too fast: the image is whole.
        assert tool.end()[0] == 0
        subprocess.run(["rm", "-r", image], check=True)
    raise AssertionError("the tool could not be stopped in time")


def read_to_its_end(host: Host, tool: Tool) -> None:
    """What QEMU sends, in place of the tool, until QEMU has closed its end: it has sent all."""
    (qemu,) = host.qemus()
    stream = open_stream_of(tool.process.pid)
    pipe = os.readlink(f"/proc/self/fd/{stream}")  # noqa: PTH115  no path behind it
    try:
        while pipe in open_files(qemu):
            read_what_is_there(stream)
    finally:
        os.close(stream)


def open_files(pid: int) -> list[str]:
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(entry))  # noqa: PTH115
    return found


def check_unharmed(domain: Domain, image: Path, before: list[Any]) -> None:
    """It runs, with all of its memory; nothing of the snapshot is left, not in QEMU's settings."""
    assert domain.state() == "running"
    assert settings(domain.host) == before
    assert not image.exists()
    domain.console.wait_passes(1)


def test_the_guest_runs_on_when_libvirtd_is_killed_in_mid_snapshot(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain = start_domain(host, shared_guest, shared_dir, fill_mib=64, memory_backing=MEMFD)
    domain.wait_ready()
    before = settings(host)
    image = shared_dir / "images" / "guest.qpc"
    image.parent.mkdir()

    # libvirtd alone, which comes back: the tool ends and says that the guest runs.
    with stopped_while_sending(host, image) as tool:
        host.stop_daemon("libvirtd", signal.SIGKILL)
    back = threading.Timer(AWAY_SECONDS, host.start_daemon, ("libvirtd",))
    back.start()
    status, said = tool.end()
    back.join()
    assert status == 14, said
    assert "it runs" in said
    check_unharmed(domain, image, before)

    # Both, when QEMU has sent all, and stands until somebody tells it to go on.
    with stopped_while_sending(host, image) as tool:
        host.stop_daemon("libvirtd", signal.SIGKILL)
        read_to_its_end(host, tool)
        send(tool.process, signal.SIGKILL)
    assert tool.end()[0] != 0
    time.sleep(AWAY_SECONDS)
    assert host.processes(GUARD) != []
    host.start_daemon("libvirtd")
    wait_until(lambda: host.processes(GUARD) == [], "the guard has ended")
    check_unharmed(domain, image, before)
    host.tool("snapshot", "--connect", "qemu:///system", "guest", image)
    host.tool("image", "verify", image)
    domain.console.wait_passes(1)
