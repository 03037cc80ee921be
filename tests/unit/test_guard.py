"""The guard of a snapshot tries again where the guest may yet be reached, and only there."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import pytest

from qemu_postcopy.errors import LibvirtError, QmpError, StateError
from qemu_postcopy.vm import guard

NO_CONNECTION, NO_DOMAIN = 38, 42


def test_where_nobody_listens_any_more_it_gives_up_at_once(run_dir: Path) -> None:
    dead = run_dir / "dead.sock"
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
        bound.listen()
    for path in (dead, run_dir / "none.sock"):
        began = time.monotonic()
        with pytest.raises(QmpError):
            asyncio.run(guard.resume(str(path), {}))
        assert time.monotonic() - began < guard.GONE_SECONDS


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[Exception | None]:
    """What comes of each try, in order."""
    found: list[Exception | None] = []

    async def once(monitor: str, settings: object) -> None:
        outcome = found.pop(0)
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(guard, "_resume_once", once)
    monkeypatch.setattr(guard, "RETRY_SECONDS", 0)
    return found


def test_a_daemon_that_is_away_is_tried_again(outcomes: list[Exception | None]) -> None:
    away = LibvirtError("cannot connect", code=NO_CONNECTION)
    outcomes += [away, TimeoutError(), QmpError("another operation is under way"), away, None]
    asyncio.run(guard.resume("libvirt:qemu:///system#uuid", {}))
    assert outcomes == []


def test_a_guest_that_cannot_run_is_not_tried_again(
    outcomes: list[Exception | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes += [StateError("the guest cannot run on: it is shutdown")]
    with pytest.raises(StateError):
        asyncio.run(guard.resume("libvirt:qemu:///system#uuid", {}))
    monkeypatch.setattr(guard, "GONE_SECONDS", 0)
    outcomes += [LibvirtError("no domain", code=NO_DOMAIN)]
    with pytest.raises(LibvirtError):
        asyncio.run(guard.resume("libvirt:qemu:///system#uuid", {}))
