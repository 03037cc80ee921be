"""The session's order of steps: what is out of order is refused, with both states named."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qemu_postcopy.errors import QmpError, StateError, TargetGoneError
from qemu_postcopy.image.image import Image
from qemu_postcopy.launched import LaunchedSession
from qemu_postcopy.session import ENTRANCES, SessionOptions, State, StateChange
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm import migration
from qemu_postcopy.vm.gate import Gate
from qemu_postcopy.vm.migration import NotLoadedError
from qemu_postcopy.vm.monitor import CommandError

#: Each step, and the state that it leads to.
STEPS: dict[str, tuple[Callable[[LaunchedSession], Any], State]] = {
    "launch": (lambda session: session.launch(["qemu-system-x86_64"]), State.FOUND),
    "find": (lambda session: session.find(Path("/nowhere")), State.FOUND),
    "attach": (lambda session: session.attach(), State.ATTACHED),
    "serve": (lambda session: session.serve(), State.SERVING),
    "begin_to_load": (lambda session: session.begin_to_load(), State.LOADED),
    "load_device_state": (lambda session: session.load_device_state(), State.LOADED),
    "resume": (lambda session: session.resume(), State.RUNNING),
    "wait_complete": (lambda session: session.wait_complete(), State.COMPLETE),
    "detach": (lambda session: session.detach(), State.DETACHED),
}


@pytest.fixture
def session(run_dir: Path) -> LaunchedSession:
    manifest = SimpleNamespace(chunk_size_bytes=65536, state=SimpleNamespace(sha256="0" * 64))
    image = SimpleNamespace(path=Path("/image"), shown_path=Path("/image"), manifest=manifest)
    run = RunDirectory.create("s", run_dir / "run")
    return LaunchedSession(cast(Image, image), run, SessionOptions())


def perform(step: Callable[[LaunchedSession], Any], session: LaunchedSession) -> None:
    async def run() -> None:
        result = step(session)
        if inspect.isawaitable(result):
            await result

    asyncio.run(run())


OUT_OF_ORDER = [
    pytest.param(name, state, id=f"{name}-when-{state}")
    for name, (_, goal) in STEPS.items()
    for state in State
    if state not in ENTRANCES[goal]
]


@pytest.mark.parametrize(("name", "state"), OUT_OF_ORDER)
def test_step_out_of_order_is_refused(name: str, state: State, session: LaunchedSession) -> None:
    step, goal = STEPS[name]
    session.state = state
    with pytest.raises(StateError) as caught:
        perform(step, session)
    said = caught.value.message
    assert f"cannot become {goal}" in said
    assert f"the session is {state}" in said
    assert all(entrance in said for entrance in ENTRANCES[goal])
    assert session.state is state


def test_there_is_no_way_back_and_nothing_follows_the_end() -> None:
    """Every state but the first is entered from earlier ones only; three are final."""
    order = list(State)
    for state, entrances in ENTRANCES.items():
        if state not in (State.FAILED, State.GONE):
            assert all(order.index(entrance) < order.index(state) for entrance in entrances)
    entered_from = frozenset().union(*ENTRANCES.values())
    assert set(State) - entered_from == {State.DETACHED, State.FAILED, State.GONE}


def test_guest_that_exists_is_never_a_failure() -> None:
    """`failed` unregisters and kills: no state with a guest in it leads there."""
    assert not ENTRANCES[State.FAILED] & {State.LOADED, State.RUNNING, State.COMPLETE}


@pytest.mark.parametrize("name", ["statistics", "start_background"])
def test_pager_is_asked_for_in_vain_before_there_is_one(
    name: str, session: LaunchedSession
) -> None:
    with pytest.raises(StateError, match="the session is new"):
        getattr(session, name)()
    assert session.trouble() == ""


def test_each_step_is_told_and_recorded(session: LaunchedSession) -> None:
    told: list[StateChange] = []
    session._listener = told.append
    for state in (State.FOUND, State.ATTACHED, State.SERVING):
        session._enter(state)
    assert [change.state for change in told] == ["found", "attached", "serving"]
    assert 0 <= told[0].elapsed <= told[1].elapsed <= told[2].elapsed
    record = session.run.read_record()
    assert record is not None
    assert record.state == "serving"
    assert record.image == "/image"


def test_closed_without_a_guest_is_on_record_as_failed(session: LaunchedSession) -> None:
    asyncio.run(session.close())
    record = session.run.read_record()
    assert record is not None
    assert record.state == "failed"


@pytest.mark.parametrize("may_run", [True, False])
def test_a_guest_that_others_let_run_counts_from_the_begin_of_its_load(
    may_run: bool, session: LaunchedSession
) -> None:
    """Who feeds it may go on when told to stop, and its memory must not be let go then."""
    session.state = State.SERVING

    async def feed(_: int) -> None:
        assert session.has_guest() is may_run
        raise TargetGoneError("QEMU does not load its state")

    with pytest.raises(TargetGoneError):
        asyncio.run(session.load_by(feed, may_run=may_run))
    assert session.has_guest() is may_run

    async def stop(_: int) -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(session.load_by(stop, may_run=may_run))
    assert session.has_guest() is may_run
    asyncio.run(session.close())
    assert (session.state is State.FAILED) is not may_run


@pytest.mark.parametrize(
    ("error", "ended", "counts"),
    [
        (NotLoadedError("failed"), False, False),
        (CommandError("migrate-incoming", "GenericError", "no"), False, False),
        (QmpError("its monitor is gone"), False, True),
        (QmpError("its monitor is gone"), True, False),
        (asyncio.CancelledError(), False, True),
    ],
)
def test_what_fails_after_the_end_was_given(
    error: BaseException,
    ended: bool,
    counts: bool,
    session: LaunchedSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no guest only if QEMU says so, or has ended."""

    async def ends() -> bool:
        return ended

    async def loading() -> bool:
        session._may_run_from_now()
        assert session.has_guest()
        raise error

    session.state = State.SERVING
    monkeypatch.setattr(session, "_ends", ends)
    with pytest.raises(type(error)):
        asyncio.run(session._finish(loading()))
    assert session.has_guest() is counts


def test_qemu_that_does_not_take_its_state_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migration, "LOAD_SECONDS", 0.05)
    state = tmp_path / "state"
    state.write_bytes(bytes(4 << 20))  # more than a pipe holds
    gate = Gate()

    async def let_in(descriptor: int) -> None:
        await migration.in_time(gate.let_in(descriptor, 0, 4 << 20))

    with state.open("rb") as file, pytest.raises(QmpError, match="did not take its device state"):
        asyncio.run(let_in(file.fileno()))
    gate.close()
