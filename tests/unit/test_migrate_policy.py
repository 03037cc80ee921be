"""When a migration is switched to post-copy, on figures alone."""

from __future__ import annotations

import pytest

from qemu_postcopy.migrate.policy import Passes, Policy

MIB = 1 << 20


def test_nothing_is_switched_before_the_first_pass_has_begun() -> None:
    assert Policy(passes=0, seconds=0).reason_to_switch(Passes(0, (), 100.0)) is None


@pytest.mark.parametrize("begun, switches", [(1, False), (2, False), (3, True), (7, True)])
def test_two_complete_passes_switch_by_default(begun: int, switches: bool) -> None:
    left = tuple(100 * MIB >> number for number in range(begun))
    assert bool(Policy().reason_to_switch(Passes(begun, left))) is switches


def test_at_once_means_within_the_first_pass() -> None:
    assert Policy(passes=0).reason_to_switch(Passes(1, (100 * MIB,))) == "at once, as asked"


def test_a_pass_that_leaves_as_much_as_the_one_before_does_not_converge() -> None:
    policy = Policy(passes=None)
    assert policy.reason_to_switch(Passes(2, (100 * MIB, 50 * MIB))) is None
    reason = policy.reason_to_switch(Passes(3, (100 * MIB, 50 * MIB, 46 * MIB)))
    assert reason is not None and "converge" in reason and "46 MiB of 50 MiB" in reason
    patient = Policy(passes=None, stalled=False)
    assert patient.reason_to_switch(Passes(3, (100 * MIB, 50 * MIB, 46 * MIB))) is None


def test_dirty_rate_and_time_are_limits_of_their_own() -> None:
    policy = Policy(passes=None, dirty_rate=50 * MIB, seconds=30)
    assert policy.reason_to_switch(Passes(1, (1,), 29.9, 50 * MIB)) is None
    assert policy.reason_to_switch(Passes(1, (1,), 1.0, 51 * MIB)) == "the guest writes 51 MiB/s"
    assert policy.reason_to_switch(Passes(1, (1,), 30.0, 0)) == "30 s have passed"


def test_never_is_never() -> None:
    policy = Policy(passes=0, dirty_rate=0, seconds=0, never=True)
    assert policy.reason_to_switch(Passes(9, (1, 1, 1), 1e6, 1 << 40)) is None
