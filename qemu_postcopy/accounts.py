"""What an operator is told of a guest that is served: who faults, where, what waits and for what.

Steps "serve" and "account" of the flow, in the control plane of the sidecar.  The pager counts
(``paging/account.py``) and records (``paging/trace.py``) by thread id; here the threads get their
names.  Trusts what :mod:`qemu_postcopy.vm.origin` trusts.  For one event loop.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_postcopy.errors import PostcopyError
from qemu_postcopy.vm import async_page_faults
from qemu_postcopy.vm.origin import ASYNC, Origins

if TYPE_CHECKING:
    from qemu_postcopy.paging.account import ThreadFaults
    from qemu_postcopy.paging.pager import Pager
    from qemu_postcopy.paging.trace import TraceBlock, TraceWriter
    from qemu_postcopy.vm.layout import RamBlock
    from qemu_postcopy.vm.monitor import Monitor

log = logging.getLogger(__name__)

#: Longer than any disk that works needs for a page: whoever waits so long is told of.
STALL_NS = 1_000_000_000


class Accounts:
    """The account of one guest.

    Args:
        pid: QEMU's.
        blocks: what the pager serves, in its order.
        source: where page data comes from, in words.
        names: threads as :meth:`threads` has returned them to a sidecar that is dead.
        asked_for_async: whether the guest used asynchronous page faults when it was saved.
        async_offered: what a dead sidecar has noted.
    """

    def __init__(
        self,
        pid: int,
        pager: Pager,
        blocks: Sequence[RamBlock],
        source: str,
        names: Mapping[str, str] | None = None,
        *,
        asked_for_async: Callable[[], bool | None] = lambda: None,
        async_offered: bool | None = None,
        put_back: str = "",
    ) -> None:
        self.trace: TraceWriter | None = None
        #: whether QEMU's CPU offers asynchronous page faults, once it was asked
        self.async_offered = async_offered
        self._asked_for_async = asked_for_async
        self._pager = pager
        self._blocks = blocks
        self._source = source
        self._put_back = put_back
        self._origins = Origins(pid, names)
        #: whether QEMU itself has said which threads are its virtual CPUs
        self._asked = bool(names)
        self._vcpus_named: list[int] = []
        self.name_vcpus()

    def name_vcpus(self) -> None:
        """Tells the pager the virtual CPUs as far as they are known: times when all of them stood
        still count from then on.  They may be there only when QEMU has started."""
        vcpus = self._origins.vcpus()
        if vcpus != self._vcpus_named:
            self._vcpus_named = vcpus
            self._pager.name_vcpus(vcpus)

    # --- threads ---------------------------------------------------------------------------------

    async def learn(self, qmp: Monitor) -> None:
        """Asks QEMU who its threads are; lacking answers cost no more than the names."""
        try:
            await self._origins.learn(qmp)
            self.async_offered = await async_page_faults.offered(qmp)
            self._asked = True
        except PostcopyError as error:
            log.warning("QEMU does not tell its threads, faults are not told apart: %s", error)
        self.name_vcpus()

    def threads(self) -> dict[str, str]:
        """Name by thread id of what QEMU has told, for whoever takes over; empty: nothing yet."""
        return self._origins.told()

    def name_threads(self) -> None:
        """Looks who has faulted while it is there to be looked at."""
        for thread in self._pager.threads():
            self._origins.name(thread.tid)

    # --- the trace -------------------------------------------------------------------------------

    def record(self, path: Path, *, resume: bool = False) -> None:
        """Has every fault recorded in a new file, or in the one that a dead sidecar has begun.

        Before the pager starts.

        Raises:
            PostcopyError: the file exists or cannot be made; or there is none that can be gone on
                with.
        """
        from qemu_postcopy.paging.trace import TraceWriter

        blocks = self._trace_blocks()
        writer = TraceWriter.resume(path, blocks) if resume else TraceWriter.create(path, blocks)
        self.trace = writer
        self._pager.record(writer)

    def _trace_blocks(self) -> list[TraceBlock]:
        from qemu_postcopy.paging.trace import TraceBlock

        return [
            TraceBlock(block.name, block.address, block.size_bytes, block.page_size_bytes)
            for block in self._blocks
        ]

    def close(self, *, discard: bool) -> None:
        """After the pager: ends the trace; ``discard`` removes it."""
        if self.trace is not None:
            self.trace.close()
            if discard:
                self.trace.path.unlink(missing_ok=True)
            self.trace = None

    # --- what is told ----------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """``origins``, ``vcpus`` and ``blocks`` as :func:`qemu_postcopy.status.collect` has them.

        Names the threads in the trace on the way.
        """
        if not self._asked:
            self._origins.find_vcpus()
            self.name_vcpus()
        threads = self._pager.threads()
        now = time.monotonic_ns()
        origins = self._origins.describe(threads, now)
        if self.trace is not None:
            # Those that share a number have their own in the records, but no name.
            self.trace.set_threads({t.tid: self._origins.name(t.tid) for t in threads if t.tid > 0})
        return {
            "origins": origins,
            "vcpus": self._vcpus(origins, threads, now),
            "blocks": self._block_list(),
        }

    def _vcpus(
        self, origins: Mapping[str, Any], threads: Sequence[ThreadFaults], now: int
    ) -> dict[str, Any]:
        counts = self._pager.vcpus()
        vcpus = set(self._origins.vcpus())
        since = [t.waiting_since_ns for t in threads if t.tid in vcpus and t.waiting]
        # The pager cannot heed who the virtual CPUs are while it stands in a read.
        unheeded = counts.count == 0 and len(vcpus) == len(since) and since
        began = max(since) if unheeded else counts.all_stopped_since_ns
        all_stopped_ns = counts.all_stopped_ns + (max(0, now - began) if began else 0)
        stopped_us = {
            name: entry["blocked_us"] for name, entry in origins.items() if name.startswith("vCPU ")
        }
        faults = sum(entry["faults"] for entry in origins.values())
        return {
            "count": len(vcpus),
            "stopped": len(since),
            "stopped_us": stopped_us,
            # Whenever the only one waited, all did, also before it was known.
            "all_stopped_us": (
                sum(stopped_us.values()) if len(vcpus) == 1 else all_stopped_ns // 1000
            ),
            "async_page_faults": async_page_faults.use_of(
                self._asked_for_async(), self.async_offered
            ),
            "async_share": origins.get(ASYNC, {"faults": 0})["faults"] / faults if faults else 0.0,
        }

    def _block_list(self) -> list[dict[str, Any]]:
        return [
            {
                "name": block.name,
                "page_size": block.page_size_bytes,
                "pages": block.size_bytes // block.page_size_bytes,
                "faults": counts.faults,
                "waiting": counts.waiting,
                "pages_data": counts.pages_data,
                "pages_data_missing": counts.pages_data_missing,
                "pages_removed": counts.pages_removed,
                "pages_unmapped": counts.pages_unmapped,
            }
            for block, counts in zip(self._blocks, self._pager.block_counts(), strict=True)
        ]

    def trouble(self) -> str:
        """Why faults wait, in words, or an empty string while all is well."""
        from qemu_postcopy.paging.pager import PagerState

        statistics = self._pager.statistics()
        now = time.monotonic_ns()
        if statistics.state is PagerState.MAPPER_GONE:
            return ""
        if statistics.failing:
            block = self._blocks[statistics.last_error_block].name
            huge = self._blocks[statistics.last_error_block].page_size_bytes > 4096
            if statistics.last_error == errno.ENODATA:
                reason = "the image's page file was cut short: put its data back"
            elif statistics.last_error == errno.ESTALE:
                reason = f"{self._source} was written to since it is served: {self._put_back}"
            elif statistics.last_error == errno.ENOMEM and huge:
                # The kernel gives one answer for both (see fill_pages() in pager_fill.c).
                reason = (
                    "there is no memory for a huge page, or another process that maps this memory "
                    "has made the page, of zeros"
                )
            else:
                reason = os.strerror(statistics.last_error)
            return (
                f"page {statistics.last_error_page} of block {block} cannot be had: {reason}; "
                f"{statistics.faults_waiting} faults wait, and are tried again{self._who(now)}"
            )
        since = statistics.reading_since_ns
        if since and now - since >= STALL_NS:
            block = self._blocks[statistics.reading_block].name
            return (
                f"page {statistics.reading_page} of block {block} has not come for "
                f"{(now - since) / 1e9:.0f} s: {self._source} does not answer{self._who(now)}"
            )
        waiting = [thread.waiting_since_ns for thread in self._pager.threads() if thread.waiting]
        if waiting and now - min(waiting) >= STALL_NS:
            if statistics.state is PagerState.IDLE:
                return f"faults are not answered: the pager is stopped{self._who(now)}"
            return (
                "faults are put off while QEMU gives memory back "
                f"({statistics.retries} attempts){self._who(now)}"
            )
        return ""

    def _who(self, now: int) -> str:
        """Who waits how long, longest first; empty where that is nobody."""
        since: dict[str, int] = {}
        for thread in self._pager.threads():
            if thread.waiting:
                name = self._origins.name(thread.tid)
                since[name] = min(since.get(name, now), thread.waiting_since_ns)
        waits = [
            f"{name} for {(now - began) / 1e9:.1f} s"
            for name, began in sorted(since.items(), key=lambda item: item[1])
        ]
        return f"; waiting: {', '.join(waits)}" if waits else ""
