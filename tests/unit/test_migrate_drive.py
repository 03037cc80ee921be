"""The driver's steps against an engine that plays what is observed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from qemu_postcopy.errors import (
    GuestEndedError,
    LeftRunningError,
    LibvirtError,
    MigrationInterruptedError,
    OperationCancelledError,
    PostcopyError,
    StateError,
)
from qemu_postcopy.migrate import drive as module
from qemu_postcopy.migrate.drive import Drive, DriveOptions, News
from qemu_postcopy.migrate.engine import Blocktime, NotYetError, Observation, Phase, Statistics
from qemu_postcopy.migrate.native_terms import blocktime_of
from qemu_postcopy.migrate.policy import Policy
from qemu_postcopy.migrate.report import NO_BLOCKTIME, Report

MIB = 1 << 20
BROKEN = LibvirtError("the network is gone", hint="mend it")


def precopy(passes: int, left: int = 100) -> Observation:
    return Observation(
        Phase.PRECOPY, passes, Statistics(total=100 * MIB, remaining=left * MIB, passes=passes)
    )


POSTCOPY = Observation(Phase.POSTCOPY, 3, Statistics(total=100 * MIB, remaining=MIB))
INTERRUPTED = Observation(Phase.INTERRUPTED, 3, error=BROKEN)
COMPLETED = Observation(Phase.COMPLETED)
AWAY = Observation(Phase.UNREACHABLE, error=BROKEN)
ENDED = Observation(Phase.ENDED)


class PlayedEngine:
    """Observes what it is given, and notes what is asked of it."""

    name = "played"

    def __init__(self, *seen: Observation, refuse: PostcopyError | None = None) -> None:
        self.seen = list(seen)
        self.asked: list[str] = []
        self.refuse = refuse
        self.counted: Blocktime | None = None
        self.before: Callable[[int], None] = lambda left: None

    async def observe(self, timeout: float) -> Observation:
        self.before(len(self.seen))
        return self.seen.pop(0)

    async def start(self) -> None:
        self.asked.append("start")

    async def can_start(self) -> bool:
        self.asked.append("can start?")
        return self.asked.count("can start?") > 1

    async def switch(self) -> None:
        self.asked.append("switch")
        if self.refuse is not None:
            raise self.refuse

    async def cancel(self) -> None:
        self.asked.append("cancel")

    async def pause(self) -> None:
        self.asked.append("pause")

    async def resume(self) -> None:
        self.asked.append("resume")

    async def completed_statistics(self) -> Statistics:
        return Statistics(passes=3, raw={"known": True})

    async def blocktime(self) -> Blocktime | None:
        return self.counted

    async def close(self) -> None:
        self.asked.append("close")


def driven(
    engine: PlayedEngine, options: DriveOptions | None = None, told: list[News] | None = None
) -> Drive:
    listener = told.append if told is not None else lambda news: None
    return Drive(engine, "web", options or DriveOptions(), listener)


def run(drive: Drive) -> Report:
    return asyncio.run(drive.run())


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRIES", (0.0,))


def test_it_switches_when_the_policy_says_so_and_reports_why() -> None:
    engine = PlayedEngine(
        Observation(Phase.SETUP), precopy(1), precopy(2, 40), precopy(3, 20), POSTCOPY, COMPLETED
    )
    report = run(driven(engine))
    assert engine.asked == ["start", "switch"]
    assert report.as_json()["mode"] == "post-copy"
    assert report.switch_reason == "2 passes are complete"


def test_a_guest_that_converges_in_pre_copy_is_not_switched() -> None:
    engine = PlayedEngine(precopy(1), precopy(2, 1), COMPLETED)
    assert run(driven(engine)).as_json()["mode"] == "pre-copy"
    assert engine.asked == ["start"]


def test_a_switch_that_comes_too_early_is_asked_for_again() -> None:
    engine = PlayedEngine(precopy(1), precopy(1), POSTCOPY, COMPLETED, refuse=NotYetError("early"))
    run(driven(engine, DriveOptions(Policy(passes=0))))
    assert engine.asked == ["start", "switch", "switch"]


def test_a_migration_that_may_not_be_switched_is_watched_to_its_end() -> None:
    told: list[News] = []
    engine = PlayedEngine(precopy(1), precopy(2), COMPLETED, refuse=LibvirtError("never"))
    run(driven(engine, DriveOptions(Policy(passes=0), begin="watch"), told))
    assert engine.asked == ["switch"]
    assert any("stays in pre-copy" in news.text for news in told)


def test_ctrl_c_aborts_in_pre_copy() -> None:
    engine = PlayedEngine(precopy(1), precopy(1), ENDED)
    drive = driven(engine)
    engine.before = lambda left: drive.request_cancel() if left == 2 else None
    with pytest.raises(OperationCancelledError):
        run(drive)
    assert engine.asked == ["start", "cancel"]


def test_ctrl_c_in_post_copy_says_that_it_cannot_be_and_goes_on() -> None:
    told: list[News] = []
    engine = PlayedEngine(precopy(3), POSTCOPY, POSTCOPY, COMPLETED)
    drive = driven(engine, told=told)
    engine.before = lambda left: drive.request_cancel() if left == 2 else None
    run(drive)
    assert "cancel" not in engine.asked
    assert any("cannot be aborted" in news.text for news in told)


def test_ctrl_c_after_the_switch_was_accepted_aborts_nothing() -> None:
    told: list[News] = []
    engine = PlayedEngine(precopy(1), precopy(1), POSTCOPY, COMPLETED)
    drive = driven(engine, DriveOptions(Policy(passes=0)), told)
    engine.before = lambda left: drive.request_cancel() if left == 3 else None
    run(drive)
    assert "cancel" not in engine.asked
    assert any("cannot be aborted" in news.text for news in told)


def test_ctrl_c_aborts_where_the_switch_was_refused() -> None:
    engine = PlayedEngine(precopy(1), precopy(1), ENDED, refuse=NotYetError("early"))
    drive = driven(engine, DriveOptions(Policy(passes=0)))
    engine.before = lambda left: drive.request_cancel() if left == 2 else None
    with pytest.raises(OperationCancelledError):
        run(drive)
    assert engine.asked == ["start", "switch", "cancel"]


def test_a_guest_that_has_ended_is_not_said_to_run_on_after_ctrl_c() -> None:
    engine = PlayedEngine(
        precopy(1), precopy(1), Observation(Phase.ENDED, error=GuestEndedError("at both hosts"))
    )
    drive = driven(engine)
    engine.before = lambda left: drive.request_cancel() if left == 2 else None
    with pytest.raises(GuestEndedError):
        run(drive)


def test_ctrl_c_leaves_somebody_elses_migration_alone() -> None:
    engine = PlayedEngine(precopy(1), precopy(1))
    drive = driven(engine, DriveOptions(begin="watch"))
    engine.before = lambda left: drive.request_cancel() if left == 1 else None
    with pytest.raises(LeftRunningError, match="goes on"):
        run(drive)
    assert engine.asked == []


def test_an_interruption_ends_the_command_and_says_how_to_go_on() -> None:
    engine = PlayedEngine(precopy(3), POSTCOPY, INTERRUPTED)
    with pytest.raises(MigrationInterruptedError) as caught:
        run(driven(engine))
    assert "--resume" in caught.value.hint and "network is gone" in caught.value.message


def test_a_supervised_interruption_is_resumed_until_it_is_over() -> None:
    busy = Observation(Phase.INTERRUPTED, 3, busy=True)
    engine = PlayedEngine(
        precopy(3), POSTCOPY, INTERRUPTED, busy, busy, INTERRUPTED, busy, POSTCOPY, COMPLETED
    )
    report = run(driven(engine, DriveOptions(supervise=True)))
    assert engine.asked == ["start", "switch", "resume", "resume"]
    assert [one.attempts for one in report.interruptions] == [2]


def test_resume_takes_up_once_and_does_not_insist() -> None:
    engine = PlayedEngine(INTERRUPTED, Observation(Phase.INTERRUPTED, 3, busy=True), INTERRUPTED)
    with pytest.raises(MigrationInterruptedError):
        run(driven(engine, DriveOptions(begin="resume")))
    assert engine.asked == ["resume"]


def lost(left: int, error: PostcopyError = BROKEN) -> Observation:
    """What libvirt takes for interrupted, with so many MiB left."""
    return Observation(
        Phase.INTERRUPTED, 3, Statistics(total=100 * MIB, remaining=left * MIB), error
    )


@pytest.mark.parametrize("supervise", [False, True])
def test_a_post_copy_whose_pages_come_is_not_taken_for_interrupted(supervise: bool) -> None:
    told: list[News] = []
    engine = PlayedEngine(precopy(3), POSTCOPY, lost(50), lost(40), lost(0), INTERRUPTED, COMPLETED)
    report = run(driven(engine, DriveOptions(supervise=supervise), told))
    assert "resume" not in engine.asked and report.interruptions == []
    assert len([news for news in told if "QEMU goes on" in news.text]) == 1


def test_a_post_copy_whose_figures_stand_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DOUBT_SECONDS", 0.0)
    engine = PlayedEngine(precopy(3), POSTCOPY, lost(50), lost(50))
    with pytest.raises(MigrationInterruptedError, match="network is gone"):
        run(driven(engine))


def test_an_interruption_during_which_pages_come_again_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "DOUBT_SECONDS", 0.0)
    engine = PlayedEngine(precopy(3), POSTCOPY, lost(50), lost(50), lost(40), lost(0), COMPLETED)
    report = run(driven(engine, DriveOptions(supervise=True)))
    assert engine.asked == ["start", "switch", "resume"]
    (interruption,) = report.interruptions
    assert interruption.seconds is not None


def test_a_resume_refused_because_qemu_goes_on_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "DOUBT_SECONDS", 0.0)
    refused = lost(
        50, LibvirtError("it cannot be resumed: QEMU reports migration is still running")
    )
    engine = PlayedEngine(lost(50), lost(50), refused, refused, COMPLETED)
    run(driven(engine, DriveOptions(begin="resume")))
    assert engine.asked == ["resume", "resume", "resume"]


def test_there_is_nothing_to_resume_in_pre_copy_or_without_a_migration() -> None:
    for seen in (precopy(1), ENDED):
        with pytest.raises(StateError):
            run(driven(PlayedEngine(seen), DriveOptions(begin="resume")))


def test_a_post_copy_without_pages_counts_as_interrupted_where_it_is_supervised() -> None:
    engine = PlayedEngine(precopy(3), POSTCOPY, POSTCOPY, POSTCOPY, COMPLETED)
    run(driven(engine, DriveOptions(supervise=True, stall=0.0)))
    assert "pause" in engine.asked
    engine = PlayedEngine(precopy(3), POSTCOPY, POSTCOPY, POSTCOPY, COMPLETED)
    run(driven(engine, DriveOptions(stall=0.0)))
    assert "pause" not in engine.asked


def test_a_daemon_that_is_away_for_a_while_is_borne_and_one_away_for_long_is_told() -> None:
    run(driven(PlayedEngine(precopy(1), AWAY, AWAY, precopy(2), COMPLETED)))
    with pytest.raises(MigrationInterruptedError, match="libvirt"):
        run(driven(PlayedEngine(precopy(1), AWAY, AWAY), DriveOptions(unreachable=-1.0)))


def test_a_supervised_migration_is_not_given_up_while_its_daemon_is_away() -> None:
    engine = PlayedEngine(precopy(1), AWAY, AWAY, AWAY, precopy(2), COMPLETED)
    run(driven(engine, DriveOptions(supervise=True, unreachable=-1.0)))


@pytest.mark.parametrize("supervise", [False, True])
def test_ctrl_c_ends_the_wait_for_a_daemon_that_is_away_and_aborts_nothing(supervise: bool) -> None:
    engine = PlayedEngine(precopy(1), AWAY, AWAY)
    drive = driven(engine, DriveOptions(supervise=supervise))
    engine.before = lambda left: drive.request_cancel() if left == 1 else None
    with pytest.raises(MigrationInterruptedError, match="not known"):
        run(drive)
    assert engine.asked == ["start"]


def test_a_migration_that_fails_in_pre_copy_raises_what_the_engine_said() -> None:
    engine = PlayedEngine(precopy(1), Observation(Phase.ENDED, error=LibvirtError("no space")))
    with pytest.raises(LibvirtError, match="no space"):
        run(driven(engine))


def test_blocked_times_are_reported_where_they_were_counted_and_else_the_reason() -> None:
    engine = PlayedEngine(precopy(3), POSTCOPY, COMPLETED)
    report = run(driven(engine))
    assert report.as_json()["blocktime"] is None and NO_BLOCKTIME in report.notes
    # As query-migrate has it, of a QEMU 10.1.
    raw = {"postcopy-blocktime": 7, "postcopy-vcpu-blocktime": [40, 7], "postcopy-latency": 1500000}
    engine = PlayedEngine(precopy(3), POSTCOPY, COMPLETED)
    engine.counted = blocktime_of(raw)
    report = run(driven(engine))
    told = report.as_json()["blocktime"]
    assert (told["all_ms"], told["cpu_ms"], told["latency_ns"]) == (7, (40, 7), 1500000)
    assert "0: 40, 1: 7; 1.5 ms for a page" in report.as_text()
    assert NO_BLOCKTIME not in report.notes
    assert blocktime_of({"status": "completed"}) is None


LOST = Observation(Phase.ENDED, error=BROKEN, daemon_lost="source")


def test_a_pre_copy_that_a_lost_daemon_ended_is_started_over_where_it_is_supervised() -> None:
    told: list[News] = []
    engine = PlayedEngine(
        precopy(1), precopy(2, 40), AWAY, LOST, LOST, precopy(1), precopy(2, 50), precopy(3, 20),
        POSTCOPY, COMPLETED,
    )  # fmt: skip
    report = run(driven(engine, DriveOptions(supervise=True), told))
    # Passes and what they left are counted anew: no switch before the second one is complete.
    assert engine.asked == ["start", "can start?", "can start?", "start", "switch"]
    assert report.started_over == 1 and report.as_json()["started_over"] == 1
    assert "begun anew" in report.as_text()
    assert any("source's libvirtd went away" in news.text for news in told)


def test_a_lost_daemon_is_named_where_nobody_is_to_start_over() -> None:
    for options in (DriveOptions(), DriveOptions(begin="watch", supervise=True)):
        engine = PlayedEngine(precopy(1), AWAY, LOST)
        with pytest.raises(LibvirtError, match="source's libvirtd went away") as caught:
            run(driven(engine, options))
        assert "runs on at the source" in caught.value.hint
        assert "can start?" not in engine.asked


def test_only_a_lost_daemon_is_a_reason_to_start_over() -> None:
    engine = PlayedEngine(precopy(1), Observation(Phase.ENDED, error=LibvirtError("no space")))
    with pytest.raises(LibvirtError, match="no space"):
        run(driven(engine, DriveOptions(supervise=True)))


def test_ctrl_c_ends_the_wait_to_start_over() -> None:
    engine = PlayedEngine(precopy(1), LOST, LOST)
    drive = driven(engine, DriveOptions(supervise=True))
    engine.before = lambda left: drive.request_cancel() if left == 1 else None
    with pytest.raises(OperationCancelledError):
        run(drive)
    assert engine.asked == ["start", "can start?"]


def test_no_way_leads_back_from_post_copy_to_pre_copy() -> None:
    with pytest.raises(StateError, match="post-copy to pre-copy"):
        run(driven(PlayedEngine(precopy(3), POSTCOPY, precopy(3))))
