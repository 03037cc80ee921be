"""Who a guest's faults come from: thread ids of QEMU and of the kernel, put into words.

Step "serve" of the flow, in the control plane.  Faults are counted by thread id; a thread is looked
at when it faults for the first time, as it may end soon.  Trusts QEMU's monitor for virtual CPUs
and I/O threads, and /proc for the rest, of which only what everybody may read is needed: no right
that is given up after the attach.  A name once found is kept, but for what QEMU itself says; ids
that are used again within one guest's filling are taken for the first thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qemu_postcopy.paging.account import OTHER, UNKNOWN, ThreadFaults
from qemu_postcopy.vm.monitor import Monitor

ASYNC = "async page fault"
MAIN = "main loop"
WORKER = "worker"
MIGRATION = "migration"
#: What QEMU calls its threads that save or send a guest (7.2: migration/migration.c, multifd.c;
#: 10.0: migration/migration.h), where it names them: from 9.1 on, or with debug-threads=on.
MIGRATION_THREAD = re.compile(r"live_migration|bg_snapshot|multifd.*|mig/.*")
#: Names of threads that run virtual CPUs: Firecracker's (src/vmm/src/vstate/vcpu.rs), and QEMU's
#: with debug-threads=on (accel/kvm/kvm-accel-ops.c, accel/tcg/tcg-accel-ops-mttcg.c).
VCPU_THREAD = re.compile(r"(?:fc_vcpu |CPU )(\d+)(?:/(?:KVM|TCG))?")
#: PF_KTHREAD in the flags of /proc/PID/stat (Linux, include/linux/sched.h).
KERNEL_THREAD = 0x00200000


class Origins:
    """Names of the threads that fault for one QEMU."""

    def __init__(self, pid: int, told: Mapping[str, str] | None = None) -> None:
        """``told`` is what :meth:`told` has returned to somebody else for this QEMU."""
        self.pid = pid
        self._told = {int(tid): name for tid, name in (told or {}).items()}
        self._names: dict[int, str] = {UNKNOWN: "unknown", OTHER: "other", **self._told}

    async def learn(self, qmp: Monitor) -> None:
        """Asks QEMU which threads are its virtual CPUs and I/O threads; raises QmpError.

        Under TCG without multi-threading all virtual CPUs are one thread, which has the name of
        the first.
        """
        for cpu in reversed(await qmp.execute("query-cpus-fast")):
            self._told[int(cpu["thread-id"])] = f"vCPU {cpu['cpu-index']}"
        for thread in await qmp.execute("query-iothreads"):
            self._told[int(thread["thread-id"])] = f"I/O thread {thread['id']}"
        self._names.update(self._told)

    def find_vcpus(self) -> None:
        """Takes threads for virtual CPUs by their names, where there is nobody to be asked."""
        with suppress(OSError):
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with suppress(OSError):  # it has just ended
                    called = (task / "comm").read_text(errors="replace").strip()
                    if match := VCPU_THREAD.fullmatch(called):
                        self._told[int(task.name)] = f"vCPU {int(match[1])}"
        self._names.update(self._told)

    def told(self) -> dict[str, str]:
        """Names by thread id (as text) of all but what /proc tells; empty before QEMU was asked."""
        return {str(tid): name for tid, name in self._told.items()}

    def vcpus(self) -> list[int]:
        """The threads that run virtual CPUs, as far as is known."""
        return [tid for tid, name in self._told.items() if name.startswith("vCPU ")]

    def name(self, tid: int) -> str:
        """Of a thread: `vCPU n`, `I/O thread id`, `main loop`, `migration`, `worker` (any other
        of QEMU), `async page fault` (the kernel on a virtual CPU's behalf), else `other` (another
        process that reads QEMU's memory, or a thread that has ended)."""
        name = self._names.get(tid)
        if name is None:
            name = self._look(tid)
            if name is None:
                return "other"
            self._names[tid] = name
        return name

    def _look(self, tid: int) -> str | None:
        ours = _numbers_inside(self.pid)
        if tid == ours:
            return MAIN
        try:
            called = Path(f"/proc/{self.pid}/task/{tid}/comm").read_text(errors="replace").strip()
        except OSError:
            pass
        else:
            return MIGRATION if MIGRATION_THREAD.fullmatch(called) else WORKER
        if ours == self.pid and _is_kernel_thread(tid):
            return ASYNC
        return None

    def describe(self, threads: Iterable[ThreadFaults], now_ns: int) -> dict[str, Any]:
        """Faults, microseconds blocked and latencies by name; see ThreadFaults.

        ``waiting`` faults are not answered yet, and the longest has waited for ``waiting_us`` until
        ``now_ns`` (CLOCK_MONOTONIC); that time counts in ``blocked_us`` already.
        """
        ret: dict[str, Any] = {}
        for thread in threads:
            entry = ret.setdefault(
                self.name(thread.tid),
                {
                    "faults": 0,
                    "blocked_us": 0,
                    "waiting": 0,
                    "waiting_us": 0,
                    "latency_us": [0] * len(thread.latency_us),
                },
            )
            since = thread.waiting_since_ns
            waiting_us = max(0, now_ns - since) // 1000 if since else 0
            entry["faults"] += thread.faults
            entry["blocked_us"] += thread.blocked_ns // 1000 + waiting_us
            entry["waiting"] += thread.waiting
            entry["waiting_us"] = max(entry["waiting_us"], waiting_us)
            entry["latency_us"] = [
                a + b for a, b in zip(entry["latency_us"], thread.latency_us, strict=True)
            ]
        return ret


def _numbers_inside(pid: int) -> int:
    """The process's number in its own PID namespace, by which its threads are counted."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
    except OSError:
        pass
    return pid


def _is_kernel_thread(tid: int) -> bool:
    try:
        # proc(5): the name in parentheses may hold blanks; flags is the 7th field after it.
        fields = Path(f"/proc/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return False
    return bool(int(fields[6]) & KERNEL_THREAD)
