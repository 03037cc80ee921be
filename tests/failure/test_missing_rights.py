"""Rights that are missing: each named, with who could give it; QEMU left as it was."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from vm.guests import Guest, Lab, SharedSnapshots, refused

from qemu_postcopy.errors import PostcopyError
from qemu_postcopy.image.image import Image
from qemu_postcopy.launched import LaunchedSession
from qemu_postcopy.session import Session, SessionOptions
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.userfaultfd import Userfaultfd

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace", "root")

NOBODY = 65534
HOST_LACKS = 3


def as_nobody(body: Callable[[], object]) -> str:
    """Runs it in a forked child of user nobody, who sees this Python; returns how it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        text = "no failure"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            body()
        except PostcopyError as failure:
            text = f"{type(failure).__name__}: {failure}"
        except BaseException as failure:  # noqa: BLE001  reported by the parent
            text = f"unexpected {failure!r}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return text


def open_to_all(directory: Path) -> None:
    """Lets everybody read, and talk to sockets, from this directory down."""
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o777 if path.is_dir() or path.is_socket() else 0o644)


def still_waits(waiting: Guest) -> None:
    assert waiting.run_state() == "inmigrate"
    assert waiting.registered_ranges() == 0


def test_user_without_the_right_to_trace_qemu(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    own = snapshots.bare(lab, qemu).copy(run_dir / "image")
    waiting = lab.waiting(own)
    open_to_all(run_dir)

    def attach() -> None:
        async def run() -> None:
            run = RunDirectory.create("a", run_dir / "nobodys")
            session = Session(Image.open(own.image), run, SessionOptions())
            try:
                await session.find(waiting.qmp_path)
                session.attach()
            finally:
                await session.close()

        asyncio.run(run())

    said = as_nobody(attach)
    assert said.startswith("AttachError: no right to look at process")
    assert "Run as root, or as the user that QEMU runs as" in said
    still_waits(waiting)
    lab.attach(waiting, own.image, "--wait", "complete")


def test_user_without_the_right_to_read_the_image(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    own = snapshots.bare(lab, qemu).copy(run_dir / "image")
    run_dir.chmod(0o755)
    said = as_nobody(lambda: Image.open(own.image))
    assert "ImageError" in said
    assert "Permission denied" in said
    assert "permissions" in said


def test_user_without_the_right_to_talk_to_the_monitor(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    own = snapshots.bare(lab, qemu).copy(run_dir / "image")
    waiting = lab.waiting(own)
    open_to_all(run_dir)
    waiting.qmp_path.chmod(0o600)

    def find() -> None:
        async def run() -> None:
            run = RunDirectory.create("a", run_dir / "nobodys")
            session = Session(Image.open(own.image), run, SessionOptions())
            try:
                await session.find(waiting.qmp_path)
            finally:
                await session.close()

        asyncio.run(run())

    said = as_nobody(find)
    assert said.startswith("QmpError: cannot talk to QEMU")
    assert "Permission denied" in said
    still_waits(waiting)


@pytest.mark.needs("restricted")
def test_user_who_may_only_have_faults_of_user_mode_is_told_before_qemu_is_launched(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    """One with UFFD_USER_MODE_ONLY is open to everybody, and KVM's faults fail with it."""
    own = snapshots.bare(lab, qemu).copy(run_dir / "image")
    open_to_all(run_dir)

    def restore() -> None:
        async def run() -> None:
            Userfaultfd.open(user_mode_only=True).close()
            run = RunDirectory.create("a", run_dir / "nobodys")
            session = LaunchedSession(Image.open(own.image), run, SessionOptions())
            try:
                await session.launch(["/there/is/no/qemu-system-x86_64"])
            finally:
                await session.close()

        asyncio.run(run())

    said = as_nobody(restore)
    assert said.startswith("AttachError: neither /dev/userfaultfd nor userfaultfd(2)"), said
    for words in ("KVM", "UFFD_USER_MODE_ONLY", "doctor"):
        assert words in said


@pytest.mark.needs("restricted")
def test_qemu_that_may_not_open_the_device_itself_is_given_it(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    """QEMU runs as nobody, and the device is root's."""
    snapshot = snapshots.bare(lab, qemu)
    waiting = lab.waiting(snapshot, "-runas", "nobody")
    lab.attach(waiting, snapshot.image, "--wait", "complete")


def test_run_directory_of_somebody_else(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, run_dir: Path
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    base = run_dir / "run"
    base.mkdir(mode=0o700)
    os.chown(base, NOBODY, NOBODY)
    refused(
        *("restore", "--name", "r", snapshot.image),
        status=HOST_LACKS,
        words=[str(base), f"user {NOBODY}", "QEMU_POSTCOPY_RUN_DIR"],
    )
    assert list(base.iterdir()) == []


def test_run_directory_that_cannot_be_made(run_dir: Path) -> None:
    run_dir.chmod(0o755)
    said = as_nobody(lambda: RunDirectory.create("r", run_dir / "run"))
    assert said.startswith("HostError: cannot make the run directory")
    assert "Permission denied" in said
    assert "QEMU_POSTCOPY_RUN_DIR" in said


def test_name_in_use_is_refused_and_its_guest_runs_on(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots
) -> None:
    snapshot = snapshots.bare(lab, qemu)
    guest = lab.restore(snapshot, "--wait", "complete", name="taken")
    refused(
        *("restore", "--name", "taken", snapshot.image),
        status=10,
        words=["taken runs already", str(guest.pid), "--name"],
    )
    assert guest.run_state() == "running"
    guest.kill()
    lab.restore(snapshot, "--wait", "complete", name="taken")
