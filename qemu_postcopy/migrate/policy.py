"""When a migration is switched from pre-copy to post-copy: a decision on figures, nothing else.

Asked by the driver at each pass and at each look at the clock.  Pure: it knows no engine and no
time but what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A pass that leaves more than this share of what the one before it left brings nothing.
CONVERGING = 0.9


@dataclass(frozen=True)
class Passes:
    """What a policy decides on.

    Attributes:
        begun: the number of the pass under way, from 1; 0 before the first.
        left: bytes that were to be sent at the begin of each pass, in order; the first is all.
        elapsed: seconds since the migration began.
        dirty_rate: bytes per second that the guest writes anew; 0 while it is not known.
    """

    begun: int
    left: tuple[int, ...] = ()
    elapsed: float = 0.0
    dirty_rate: int = 0


@dataclass(frozen=True)
class Policy:
    """The limits; the first that is reached switches.

    Attributes:
        passes: switch when so many passes are complete; 0: as soon as it is possible, within the
            first; None: passes are not counted.
        stalled: switch when a pass leaves nearly as much as the one before.
        dirty_rate: switch when the guest writes more bytes per second than this.
        seconds: switch when the migration has taken so long.
        never: never switch.
    """

    passes: int | None = 2
    stalled: bool = True
    dirty_rate: int | None = None
    seconds: float | None = None
    never: bool = False

    def reason_to_switch(self, seen: Passes) -> str | None:
        """Why to switch now, as an operator reads it; None: not yet.

        Before the first pass has begun there is nothing to switch: libvirt and QEMU refuse it.
        """
        if self.never or seen.begun < 1:
            return None
        complete = seen.begun - 1
        if self.passes is not None and complete >= self.passes:
            return f"{complete} passes are complete" if complete else "at once, as asked"
        if self.stalled and len(seen.left) >= 2 and seen.left[-1] > seen.left[-2] * CONVERGING:
            return (
                f"pass {len(seen.left) - 1} left {seen.left[-1] >> 20} MiB of "
                f"{seen.left[-2] >> 20} MiB to be sent again: it does not converge"
            )
        if self.dirty_rate is not None and seen.dirty_rate > self.dirty_rate:
            return f"the guest writes {seen.dirty_rate >> 20} MiB/s"
        if self.seconds is not None and seen.elapsed >= self.seconds:
            return f"{seen.elapsed:.0f} s have passed"
        return None
