"""A restore that the hook began: from its first byte of state on QEMU has the word."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qemu_postcopy.errors import (
    AttachError,
    HostError,
    ImageError,
    MismatchError,
    OperationCancelledError,
    PostcopyError,
    TargetGoneError,
)
from qemu_postcopy.image.image import Image
from qemu_postcopy.libvirt import offer as offer_module
from qemu_postcopy.libvirt.hook import require_room
from qemu_postcopy.libvirt.hooked import HookedRestore, require_same, restore_hooked
from qemu_postcopy.libvirt.offer import FIRST, Offer, withdraw
from qemu_postcopy.paging import registration
from qemu_postcopy.session import Session, SessionOptions, State, StateChange
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.preload import LEAVE, MESSAGE
from qemu_postcopy.vm.process import ProcessIdentity


@pytest.fixture
def run(run_dir: Path) -> RunDirectory:
    return RunDirectory.create("s", run_dir / "run")


@pytest.fixture
def session(run: RunDirectory) -> Session:
    manifest = SimpleNamespace(chunk_size_bytes=65536, state=SimpleNamespace(sha256="0" * 64))
    image = SimpleNamespace(path=Path("/image"), shown_path=Path("/image"), manifest=manifest)
    session = Session(cast(Image, image), run, SessionOptions())
    session.state = State.SERVING
    return session


@pytest.fixture
def offer(run: RunDirectory, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offer]:
    monkeypatch.setattr(offer_module, "SOCKETS", run_dir / "sockets")
    made = Offer(run.path, "some-uuid", (0, 0))
    yield made
    made.close()


def test_what_qemu_may_have_loaded_counts_as_a_guest_though_giving_it_has_failed(
    session: Session,
) -> None:
    async def fail(_: int) -> None:
        assert session.has_guest()  # a signal does not cancel it, see ending_by_signals
        raise TargetGoneError("QEMU does not read")

    async def load() -> None:
        with pytest.raises(TargetGoneError):
            await session.load_by(fail, may_run=True)
        assert session.has_guest()
        await session.close()

    asyncio.run(load())
    assert session.state is State.SERVING  # and not failed: then its image would be discarded


def test_a_guest_that_its_starter_ends_with_the_load_is_none_until_it_is_loaded(
    session: Session,
) -> None:
    async def give(_: int) -> None:
        assert not session.has_guest()

    asyncio.run(session.load_by(give))
    assert session.state is State.LOADED
    assert session.has_guest()


@pytest.mark.parametrize("fed", [False, True])
def test_memory_is_let_go_only_before_the_first_byte_of_state(
    offer: Offer, run_dir: Path, monkeypatch: pytest.MonkeyPatch, fed: bool
) -> None:
    let_go = []
    monkeypatch.setattr(registration, "unregister", lambda *what: let_go.append(what))
    read_end, offer._feed = os.pipe()
    offer.registered = {(4096, 8192)}
    state = run_dir / "state"
    state.write_bytes(FIRST + b"state")
    with state.open("rb") as file, os.fdopen(read_end, "rb") as stream:
        if fed:
            offer.feed(file.fileno())
        offer.abandon(7)
        assert stream.read() == (b"state" if fed else b"")  # and its end
    assert let_go == ([] if fed else [(7, 4096, 8192)])


@pytest.mark.parametrize("may_run", [False, True])
def test_a_guest_that_may_run_is_filled_and_not_ended_where_something_reads_past_us(
    session: Session, monkeypatch: pytest.MonkeyPatch, may_run: bool
) -> None:
    asked: list[object] = []

    class Played:
        async def execute(self, command: str) -> None:
            asked.append(command)

        async def close(self) -> None:
            pass

    async def agrees(*_: object) -> None:
        pass

    async def refuses(*_: object) -> list[str]:
        return ["blob=on"]

    told: list[StateChange] = []
    monkeypatch.setattr("qemu_postcopy.vm.layout.confirm", agrees)
    monkeypatch.setattr("qemu_postcopy.vm.refusals.refusals", refuses)
    session._listener = told.append
    session._presumed, session._qmp = True, cast(Any, Played())
    session.pager = cast(Any, SimpleNamespace(set_background=lambda *how: asked.append(how)))
    session.state = State.LOADED
    monkeypatch.setattr(session, "_record", lambda: None)
    if may_run:
        asyncio.run(session.confirm(may_run=True))
        assert asked == [(True, 0)]
        (change,) = told
        assert isinstance(change.failure, MismatchError)
        assert session.has_guest()
    else:
        with pytest.raises(MismatchError):
            asyncio.run(session.confirm())
        assert asked == ["quit"]


def test_a_save_file_that_was_replaced_meanwhile_is_not_taken_for_the_one_that_qemu_loads(
    run_dir: Path,
) -> None:
    file = run_dir / "web.save"
    file.write_bytes(b"first")
    found = file.stat()
    source = (found.st_dev, found.st_ino)
    require_same(file, source)
    (run_dir / "other").write_bytes(b"second")
    (run_dir / "other").rename(file)
    with pytest.raises(ImageError, match="was replaced"):
        require_same(file, source)
    file.unlink()
    with pytest.raises(ImageError, match="was removed"):
        require_same(file, source)


class Refusing:
    """An offer that came to nothing."""

    def __init__(self, error: PostcopyError) -> None:
        self.error = error

    def take(self) -> None:
        raise self.error

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (AttachError("two of one size", hint="--connect"), ["two of one size (--connect)"]),
        (OperationCancelledError("not started"), []),
    ],
)
def test_why_a_restore_was_not_made_lazy_is_in_the_system_log(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, error: PostcopyError, told: list[str]
) -> None:
    said: list[str] = []
    monkeypatch.setattr("syslog.syslog", lambda _, words: said.append(words))
    order = HookedRestore("qemu:///system", "my web", "u", Path("/web.save"), SessionOptions())
    with pytest.raises(type(error)):
        asyncio.run(restore_hooked(order, cast(Any, Refusing(error)), run))
    assert said == [f"domain my web: its restore was not made lazy: {words}" for words in told]


def test_a_save_file_whose_image_has_no_room_is_restored_eagerly(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = run_dir / "web.save"
    file.write_bytes(b"x" * 8192)
    require_room(file)
    full = SimpleNamespace(f_bavail=1, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(HostError, match="image would take"):
        require_room(file)


def test_a_stranger_that_says_nothing_does_not_keep_others_from_the_offer(
    offer: Offer, run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offer_module, "STRANGER_SECONDS", 0.05)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent,
        ThreadPoolExecutor(1) as executor,
    ):
        silent.connect(str(offer.path))
        taking = executor.submit(offer.take)
        withdraw(run.path)
        with pytest.raises(OperationCancelledError):
            taking.result(30)


def starting_with(backends: list[str]) -> ProcessIdentity:
    """A QEMU with those -object arguments, which sees what we see."""
    words = ["qemu", *(word for text in backends for word in ("-object", text))]
    mounts = Path("/proc/self/mountinfo").read_text
    return cast(
        ProcessIdentity, SimpleNamespace(pid=os.getpid(), cmdline=lambda: words, mounts=mounts)
    )


def file_backend(path: str) -> str:
    return f"memory-backend-file,id=a,size={64 << 20},mem-path={path}/not/yet/there"


def test_memory_that_can_be_paged_is_asked_for_of_qemu(offer: Offer) -> None:
    anonymous = [f"memory-backend-ram,id=b{n},size={32 << 20}" for n in range(2)]
    found = offer._wanted(starting_with([file_backend("/dev/shm"), *anonymous]))
    assert found == [64 << 20, 32 << 20, 32 << 20]


@pytest.mark.parametrize(
    ("backends", "words"),
    [
        ([file_backend("/proc")], "tmpfs or hugetlbfs"),
        ([f"memory-backend-ram,id=b{n},size={(16 + n) << 20}" for n in range(65)], "65 memory"),
        ([f"memory-backend-ram,id=b,size={1 << 20}"], "no memory back-end"),
    ],
)
def test_memory_that_cannot_is_restored_eagerly(
    offer: Offer, backends: list[str], words: str
) -> None:
    with pytest.raises(AttachError, match=words):  # QEMU is told to LEAVE
        offer._wanted(starting_with(backends))


def test_who_has_not_the_save_file_open_is_not_the_one_that_is_meant(
    offer: Offer, run_dir: Path
) -> None:
    """It could be anybody's QEMU, with a pipe and that UUID."""
    ourselves = cast(ProcessIdentity, SimpleNamespace(pid=os.getpid(), require_alive=lambda: None))
    (run_dir / "web.save").touch()
    with (run_dir / "web.save").open() as file:
        found = os.fstat(file.fileno())
        offer.source = (found.st_dev, found.st_ino)
        assert offer._find_stream(ourselves) == file.fileno()
    read_end, write_end = os.pipe()
    try:
        assert offer._find_stream(ourselves) is None
        offer._packed = True
        assert offer._find_stream(ourselves) is None  # anybody can have a pipe
        with (run_dir / "web.save").open("rb") as file:
            unpacks = subprocess.Popen(["sleep", "60"], stdin=file, stdout=write_end)
        try:
            assert offer._find_stream(ourselves) == read_end
        finally:
            unpacks.kill()
            unpacks.wait()
    finally:
        os.close(read_end)
        os.close(write_end)


def test_a_stranger_that_pretends_to_be_the_domains_qemu_is_sent_away_and_the_offer_stands(
    offer: Offer, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Offer, "_is_meant", lambda *_: True)
    (run_dir / "web.save").touch()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(offer.path))
        with ThreadPoolExecutor(1) as executor:
            waiting = executor.submit(offer._await_qemu)
            assert MESSAGE.unpack(stranger.recv(MESSAGE.size))[1] == LEAVE
            with (
                (run_dir / "web.save").open() as file,
                socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as qemu,
            ):
                offer.source = (os.fstat(file.fileno()).st_dev, os.fstat(file.fileno()).st_ino)
                qemu.connect(str(offer.path))
                channel, identity, stream = waiting.result(10)
                assert (identity.pid, stream) == (os.getpid(), file.fileno())
                channel.close()
                identity.close()
