"""Whose faults a pager answered, and where: what ``_native/pager_account.c`` has counted.

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
    counts those answered in less than 2**i microseconds (and at least half of that), so that bucket
    i + 1 is bucket i of QEMU's ``postcopy-latency-dist``.  ``waiting`` are not answered yet, and
    there has been one of them since ``waiting_since_ns`` (CLOCK_MONOTONIC).
    """

    tid: int
    faults: int
    blocked_ns: int
    latency_us: tuple[int, ...]
    waiting: int = 0
    waiting_since_ns: int = 0


@dataclass(frozen=True)
class BlockCounts:
    """What became of one block; pages are counted in its own page size."""

    faults: int
    waiting: int
    pages_data: int
    pages_data_missing: int
    pages_removed: int
    pages_unmapped: int


@dataclass(frozen=True)
class VcpuCounts:
    """Threads that run virtual CPUs (0: not known), and how many of them wait for a page now.

    ``all_stopped_ns`` is how long all of them waited at the same time, since they are known (a new
    list of them is heeded with the next fault); they do so now since ``all_stopped_since_ns``
    (CLOCK_MONOTONIC), if that is not 0.
    """

    count: int
    stopped: int
    all_stopped_ns: int
    all_stopped_since_ns: int


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
            int(slot.waiting),
            int(slot.waiting_since_ns),
        )
        for index, slot in enumerate(slots)
        if slot.faults
    ]


def read_blocks(pager: Any, count: int) -> list[BlockCounts]:
    """Every one of ``count`` blocks, in their order."""
    raw = ffi.new("struct qpc_block_account[]", count)
    lib.qpc_pager_read_blocks(pager, raw)
    names = BlockCounts.__dataclass_fields__
    return [BlockCounts(*(int(getattr(one, name)) for name in names)) for one in raw]


def read_vcpus(pager: Any) -> VcpuCounts:
    """What is known of the virtual CPUs as a whole."""
    raw = ffi.new("struct qpc_vcpu_account *")
    lib.qpc_pager_read_vcpus(pager, raw)
    return VcpuCounts(*(int(getattr(raw, name)) for name in VcpuCounts.__dataclass_fields__))
