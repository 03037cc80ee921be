"""Whose faults a pager answered, by thread id: what ``_native/pager_account.c`` has counted.

Step "serve" of the flow.  The pager's thread writes; any thread may read at any time, each number
right by itself.  Who the threads are is not known here: see :mod:`qemu_postcopy.vm.origin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qemu_postcopy._native import ffi, lib

#: Threads that found no room in the table, counted as one.
OTHER = -1
#: Faults whose thread the kernel does not tell (no UFFD_FEATURE_THREAD_ID).
UNKNOWN = 0


@dataclass(frozen=True)
class ThreadFaults:
    """The faults of one thread; ``tid`` is as the thread itself sees it, or OTHER or UNKNOWN.

    ``blocked_ns`` is the sum of the times from reading a fault to answering it; ``latency_us[i]``
    counts those answered in less than 2**i microseconds (and at least half of that).
    """

    tid: int
    faults: int
    blocked_ns: int
    latency_us: tuple[int, ...]


def read_threads(pager: Any) -> list[ThreadFaults]:
    """Every thread that has faulted, from a ``struct qpc_pager *``."""
    slots = ffi.new("struct qpc_origin[]", lib.QPC_ORIGIN_SLOTS)
    lib.qpc_pager_read_origins(pager, slots)
    special = {lib.QPC_ORIGIN_OTHER: OTHER, lib.QPC_ORIGIN_UNKNOWN: UNKNOWN}
    return [
        ThreadFaults(
            special.get(index, int(slot.tid)),
            int(slot.faults),
            int(slot.blocked_ns),
            tuple(slot.latency_us),
        )
        for index, slot in enumerate(slots)
        if slot.faults
    ]
