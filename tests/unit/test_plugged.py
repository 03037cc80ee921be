"""A guest that was kept from running goes on when it may, and only then."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

import pytest

from qemu_postcopy import plugged
from qemu_postcopy.errors import QmpError
from qemu_postcopy.plugged import PlugWatch
from qemu_postcopy.session import Session
from qemu_postcopy.vm.monitor import Monitor


class Played:
    """A monitor whose guest is in these states, one after the other."""

    def __init__(self, *states: str) -> None:
        self.states = list(states)
        self.asked: list[str] = []

    async def status(self) -> str:
        state = self.states.pop(0)
        if not state:
            raise QmpError("the monitor is in use")
        return state

    async def execute(self, command: str) -> dict[str, Any]:
        self.asked.append(command)
        return {}


def let_go(monitor: Played) -> list[str]:
    """What the guest's holder is told, in the end."""
    told: list[str] = []
    session = SimpleNamespace(
        held="stopped",
        identity=SimpleNamespace(pid=os.getpid(), is_alive=lambda: True),
        note_held=told.append,
        tell_held_back=told.append,
    )
    watch = PlugWatch(cast(Session, session))
    asyncio.run(watch._let_go(cast(Monitor, monitor)))
    assert monitor.states == []
    return told


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugged, "AGAIN_SECONDS", 0.0)


def test_a_guest_that_was_stopped_goes_on_when_its_monitor_can_be_had() -> None:
    monitor = Played("", "finish-migrate", "paused")
    assert let_go(monitor) == ["", ""]
    assert monitor.asked == ["cont"]


@pytest.mark.parametrize("state", ["postmigrate", "shutdown", "guest-panicked", "running"])
def test_a_guest_that_has_moved_or_ended_meanwhile_is_left_so(state: str) -> None:
    """It would run on two hosts."""
    monitor = Played("finish-migrate", state)
    assert let_go(monitor) == ["", ""]
    assert monitor.asked == []
