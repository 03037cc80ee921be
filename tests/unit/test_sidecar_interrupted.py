"""Ctrl-C before there is a guest: what came of it decides the exit status, not when it came."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from qemu_postcopy import serve as serving
from qemu_postcopy.errors import (
    GuestEndedError,
    LaunchError,
    LeftRunningError,
    OperationCancelledError,
    PostcopyError,
    SidecarError,
)
from qemu_postcopy.session import Session, State, StateChange
from qemu_postcopy.sidecar import process
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord

Listener = Callable[[StateChange], None]


@pytest.fixture
def run(run_dir: Path) -> Iterator[RunDirectory]:
    made = RunDirectory.create("vm", run_dir)
    yield made
    made.release()


def spawned(run: RunDirectory, after: Callable[[Listener], None]) -> process.Sidecar:
    """A sidecar that works until it is told to end (SIGTERM), and then does that."""

    def job(listener: Listener) -> Coroutine[Any, Any, Session]:
        async def work() -> Session:
            asked = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
            listener(StateChange(State.SERVING, 0.0))
            await asked.wait()
            after(listener)
            raise asyncio.CancelledError

        return work()

    sidecar = process.spawn(job, run)
    assert next(sidecar.events())["state"] == "serving"
    return sidecar


def outcome(sidecar: process.Sidecar, run: RunDirectory) -> PostcopyError:
    """What a command raises that is interrupted now."""
    with pytest.raises(PostcopyError) as caught:
        sidecar.interrupt(run)
    os.waitpid(sidecar.pid, 0)
    sidecar.reports.close()
    return caught.value


def fails(error: PostcopyError) -> Callable[[Listener], None]:
    def work(_: Listener) -> None:
        raise error

    return work


def test_what_is_taken_back_is_130(run: RunDirectory) -> None:
    assert type(outcome(spawned(run, lambda _: None), run)) is OperationCancelledError


def test_a_guest_that_came_to_be_meanwhile_is_not_130(run: RunDirectory) -> None:
    sidecar = spawned(run, lambda listener: listener(StateChange(State.LOADED, 0.0)))
    assert type(outcome(sidecar, run)) is LeftRunningError


@pytest.mark.parametrize(
    "error",
    [
        GuestEndedError("QEMU has ended"),
        LaunchError("no such machine", command=[], returncode=1, output=""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_meanwhile_is_told_as_what_it_is(run: RunDirectory, error: PostcopyError) -> None:
    assert type(outcome(spawned(run, fails(error)), run)) is type(error)


def test_a_second_ctrl_c_does_not_claim_that_nothing_is_left(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = spawned(run, lambda _: None)

    def interrupted(_: process.Sidecar) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(process.Sidecar, "events", interrupted)
    assert type(outcome(sidecar, run)) is LeftRunningError


@pytest.mark.parametrize(
    ("begun", "expected"), [(False, OperationCancelledError), (True, SidecarError)]
)
def test_a_sidecar_that_dies_of_it_had_begun_nothing_or_says_so(
    run: RunDirectory, begun: bool, expected: type[PostcopyError]
) -> None:
    """SIGTERM may come before it is handled."""
    if begun:
        run.write_record(SessionRecord(image="vm.qpc", state="new", sidecar_pid=0))
    sidecar = spawned(run, lambda _: os._exit(1))
    assert type(outcome(sidecar, run)) is expected


def test_ctrl_c_counts_when_it_is_known_which_sidecar_was_started(
    request: pytest.FixtureRequest,
) -> None:
    # A shell's background job has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    known = False
    with pytest.raises(KeyboardInterrupt), process.interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        known = True
    assert known


class FilledSession:
    filled = 0

    def fill_at_full_speed(self) -> None:
        self.filled += 1


def test_a_vmm_that_has_handed_over_is_served_though_its_server_was_asked_to_end() -> None:
    """Its memory is registered: were the work ended there, it would wait for ever."""
    session = FilledSession()

    async def work() -> None:
        ending = serving._Ending()
        with ending.on_signals():
            ending.there_is_a_vmm()
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(ending.asked.wait(), 30)
            ending.serves(cast(Any, session))

    asyncio.run(work())
    assert session.filled == 1
