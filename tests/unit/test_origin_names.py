"""Promise: threads have the names that QEMU, their own name, or the kernel gives them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_postcopy.paging.account import OTHER, UNKNOWN, ThreadFaults
from qemu_postcopy.vm.origin import Origins


@contextmanager
def thread_called(name: str) -> Iterator[int]:
    """The id of a thread of this process that has this name."""
    ready, end = threading.Event(), threading.Event()
    tid = 0

    def run() -> None:
        nonlocal tid
        tid = threading.get_native_id()
        Path(f"/proc/self/task/{tid}/comm").write_text(name)
        ready.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    yield tid
    end.set()
    thread.join()


@pytest.mark.parametrize("name", ["fc_vcpu 3", "CPU 3/KVM", "CPU 3/TCG"])
def test_virtual_cpus_are_known_by_their_threads_names(name: str) -> None:
    origins = Origins(os.getpid())
    assert origins.vcpus() == []
    with thread_called(name) as tid:
        origins.find_vcpus()
        assert origins.vcpus() == [tid]
        assert origins.name(tid) == "vCPU 3"
    # It has ended; what it was is still known, also to whoever takes over.
    again = Origins(os.getpid(), origins.told())
    assert again.vcpus() == [tid] and again.name(tid) == "vCPU 3"


@pytest.mark.parametrize("name", ["worker", "fc_api", "CPU x/KVM", "my CPU 3/KVM"])
def test_other_threads_are_no_virtual_cpus(name: str) -> None:
    origins = Origins(os.getpid())
    with thread_called(name) as tid:
        origins.find_vcpus()
        assert origins.vcpus() == [] and origins.name(tid) == "worker"
    assert origins.name(os.getpid()) == "main loop"


def test_what_waits_counts_as_blocked_already() -> None:
    origins = Origins(os.getpid(), {"7": "vCPU 0", "8": "vCPU 0"})
    threads = [
        ThreadFaults(7, 2, 5_000, (0, 1), waiting=1, waiting_since_ns=1_000_000),
        ThreadFaults(8, 1, 1_000, (1, 0)),
        ThreadFaults(UNKNOWN, 1, 0, (0, 0), waiting=1, waiting_since_ns=3_000_000),
        ThreadFaults(OTHER, 1, 2_000, (0, 1)),
    ]
    assert origins.describe(threads, 2_000_000) == {
        "vCPU 0": {
            "faults": 3,
            "blocked_us": 1006,
            "waiting": 1,
            "waiting_us": 1000,
            "latency_us": [1, 1],
        },
        # The pager has counted since we looked at the clock.
        "unknown": {
            "faults": 1,
            "blocked_us": 0,
            "waiting": 1,
            "waiting_us": 0,
            "latency_us": [0, 0],
        },
        "other": {
            "faults": 1,
            "blocked_us": 2,
            "waiting": 0,
            "waiting_us": 0,
            "latency_us": [0, 1],
        },
    }
