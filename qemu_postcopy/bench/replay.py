"""``bench replay``: a trace of faults once more, against the pager and its source, without a guest.

A stand-in (C) has a thread for each that had faulted in the trace, which touches the same pages in
the same order, at the traced times or as fast as it goes.  Its memory comes from the image by the
real pager, and what it then holds is compared with the image, page by page.  Page data may fail on
purpose meanwhile.  The trace is not trusted: what does not fit the image is refused.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from qemu_postcopy.bench.faults import HANDOVER, compiled_programs, processors
from qemu_postcopy.bench.report import Ratio, Report, Result, describe_host
from qemu_postcopy.errors import ContentError, HostError, MismatchError, UsageError
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.page_data import data_bitmap
from qemu_postcopy.paging import registration
from qemu_postcopy.paging.chaos import ChaosSchedule, ChaosSource
from qemu_postcopy.paging.ledger import Ledger, LedgerBlock
from qemu_postcopy.paging.pager import Pager, PagerBlock
from qemu_postcopy.paging.source import FileSource, Source
from qemu_postcopy.paging.trace import Answer, Fault, Trace, TraceBlock, TraceWriter

MOST_THREADS = 512
#: enum qpc_page_state of _native/pager.h
PRESENT = 2
PART_BYTES = 1 << 20
ENTRY = struct.Struct("<QII")


@dataclass(frozen=True)
class Replayed:
    """One run: what the stand-in and what the pager measured, in microseconds."""

    rate: float
    touch_p50_us: float
    touch_p99_us: float
    touch_max_us: float
    answer_p50_us: float
    answer_p99_us: float
    faults: int
    latest_ms: float


@dataclass(frozen=True)
class ReplayBench:
    """What to replay.

    Attributes:
        trace: a file of ``restore --trace``.
        image: that the traced guest was restored from, or another one with the same blocks.
        timed: touch at the traced times, instead of as fast as it goes.
        chunk_size: bytes around a fault; None: the image's own.
        background: fill the rest meanwhile, as a restore does.
        chaos: how page data fails, if it does.
        directory: where the schedule and the ledger are put for the time being.
    """

    trace: Path
    image: Path
    timed: bool
    runs: int
    directory: Path
    chunk_size: int | None = None
    background: bool = False
    chaos: ChaosSchedule | None = None
    say: Callable[[str], None] = field(default=lambda text: None)

    def run(self) -> Report:
        """Replays as often as asked for.

        Raises:
            ImageError: trace or image are damaged.
            MismatchError: the trace is not of a guest of this image.
            UsageError: there is nothing to replay, or nothing that would come to an end.
            HostError: no compiler, memory, huge pages or userfaultfd.
            ContentError: memory differs from the image.
        """
        if self.chaos is not None and self.chaos.stall > 0 and self.chaos.stall_ms is None:
            raise UsageError(
                "reads that stall until told would never go on here",
                hint="give the schedule's stalls a time: ms = [100, 2000]",
            )
        programs = compiled_programs()
        image = Image.open(self.image)
        with Trace(self.trace) as trace:
            check_fit(trace, image)
            threads = by_thread(trace)
            blocks = trace.blocks
            traced_ns = array("I", (fault.latency_ns for own in threads for fault in own))
        report = Report("replay", describe_host())
        cpus = processors()
        report.notes.append(
            f"{len(traced_ns)} touches by {len(threads)} threads on processor {cpus[0]}, the pager "
            f"on {cpus[1]}; touches are timed by who touches, answers by the pager as in the trace."
        )
        counts: list[dict[str, int]] = []
        with TemporaryDirectory(prefix="qpc-replay-", dir=self.directory) as place:
            schedule = Path(place, "schedule")
            write_schedule(schedule, blocks, threads)
            stand = _Stand(self, image, blocks, programs, schedule, Path(place), cpus)
            replayed = []
            for number in range(self.runs):
                self.say(f"run {number + 1} of {self.runs}")
                run, chaos = stand.run()
                replayed.append(run)
                counts.append(chaos)
        self._fill(report, replayed, traced_ns)
        if self.chaos is not None:
            totals = {key: sum(count[key] for count in counts) for key in counts[0]}
            totals.pop("stalled_now")
            said = ", ".join(f"{number} {name}" for name, number in totals.items())
            report.notes.append(f"Page data failed on purpose ({self.chaos.path}): {said}.")
            for name, number in totals.items():
                report.results.append(Result(f"chaos: {name}", "in all runs", [number]))
        report.notes.append("All memory that was filled holds what the image holds.")
        return report

    def _fill(self, report: Report, runs: list[Replayed], traced_ns: array[int]) -> None:
        pace = "at the traced times" if self.timed else "as fast as it goes"
        columns: tuple[tuple[str, str, Callable[[Replayed], float]], ...] = (
            ("touches", "1/s", lambda run: run.rate),
            ("touch, p50", "us", lambda run: run.touch_p50_us),
            ("touch, p99", "us", lambda run: run.touch_p99_us),
            ("touch, longest", "us", lambda run: run.touch_max_us),
            ("faults", "", lambda run: run.faults),
            ("answer, p50", "us", lambda run: run.answer_p50_us),
            ("answer, p99", "us", lambda run: run.answer_p99_us),
        )
        for name, unit, value in columns:
            report.results.append(Result(f"{pace}: {name}", unit, [value(run) for run in runs]))
        if self.timed:
            late = [run.latest_ms for run in runs]
            report.results.append(Result(f"{pace}: latest touch, behind its time", "ms", late))
        p50, p99 = percentiles(traced_ns)
        report.results += [
            Result("in the trace: answer, p50", "us", [p50]),
            Result("in the trace: answer, p99", "us", [p99]),
        ]
        if p50 and p99:
            ours = [run.answer_p50_us for run in runs], [run.answer_p99_us for run in runs]
            for name, values, traced in (("p50", ours[0], p50), ("p99", ours[1], p99)):
                report.ratios.append(
                    Ratio(f"answer, {name}", "replayed", "traced", [v / traced for v in values])
                )


def percentiles(latencies_ns: Sequence[int]) -> tuple[float, float]:
    """p50 and p99 in microseconds; zeros of nothing."""
    if not latencies_ns:
        return 0.0, 0.0
    ordered = sorted(latencies_ns)
    return median(ordered) / 1000, ordered[len(ordered) - 1 - len(ordered) // 100] / 1000


def check_fit(trace: Trace, image: Image) -> None:
    """MismatchError where a block of the trace is not one of the image's."""
    sizes = {block.name: block.size_bytes for block in image.manifest.blocks}
    for block in trace.blocks:
        if sizes.get(block.name) != block.length:
            there = ", ".join(f"{name} ({size} bytes)" for name, size in sizes.items())
            raise MismatchError(
                f"the trace has a block {block.name} of {block.length} bytes, the image: {there}",
                hint="give the image that the traced guest was restored from",
            )


def by_thread(trace: Trace) -> list[list[Fault]]:
    """The faults of each thread in the order in which they were read.

    Those whose memory was gone are left out: there is nothing to touch.
    """
    threads: dict[int, list[Fault]] = {}
    for fault in trace:
        if fault.answer != Answer.GONE:
            threads.setdefault(fault.tid, []).append(fault)
    if not threads:
        raise UsageError(f"{trace.path} has no fault to replay", hint="record another one")
    if len(threads) > MOST_THREADS:
        raise UsageError(f"{len(threads)} threads have faulted, {MOST_THREADS} can be replayed")
    return [sorted(own) for own in threads.values()]


def write_schedule(
    path: Path, blocks: Sequence[TraceBlock], threads: Sequence[Sequence[Fault]]
) -> None:
    """As replayer.c reads it."""
    begin = min(own[0].read_ns for own in threads)
    with path.open("wb") as file:
        file.write(struct.pack("<II", len(blocks), len(threads)))
        for block in blocks:
            file.write(struct.pack("<QQ", block.length, block.page_size))
        first = 0
        for own in threads:
            file.write(struct.pack("<QQ", first, len(own)))
            first += len(own)
        for own in threads:
            file.write(
                b"".join(ENTRY.pack(f.read_ns - begin, f.block, f.page) for f in own)
            )  # fmt: skip


@dataclass(frozen=True)
class _Block:
    """A block while it is replayed: the stand-in's memory and the image's data."""

    traced: TraceBlock
    address: int
    memory: int
    data: int
    offset: int
    bitmap: bytearray


@dataclass(frozen=True)
class _Stand:
    """Where runs are made."""

    bench: ReplayBench
    image: Image
    blocks: Sequence[TraceBlock]
    programs: Path
    schedule: Path
    place: Path
    cpus: tuple[int, int]

    def run(self) -> tuple[Replayed, dict[str, int]]:
        """One run, and what was done to reads of page data."""
        bench = self.bench
        ours, theirs = socket.socketpair()
        pace = "timed" if bench.timed else "fast"
        words = [self.programs / "replayer", self.schedule, pace, self.cpus[0]]
        with ExitStack() as stack:
            stack.enter_context(ours)
            with theirs:
                process = subprocess.Popen(
                    list(map(str, words)),
                    stdin=theirs.fileno(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            assert process.stdout is not None and process.stderr is not None
            # Killed first: the pager must not wait for a mapper that waits for it.
            end = stack.enter_context(ExitStack())
            stack.enter_context(process.stdout)
            stack.enter_context(process.stderr)
            stack.callback(process.wait)
            stack.callback(process.kill)
            userfaultfd, _ = self._receive(ours, process)
            end.callback(os.close, userfaultfd)
            registration.negotiate(userfaultfd)
            blocks = [self._block(traced, ours, process, end) for traced in self.blocks]
            chaos: list[ChaosSource] = []
            ledger = Ledger.create(
                self.place / "ledger",
                [LedgerBlock(b.traced.name, b.traced.page_size, b.traced.length) for b in blocks],
            )
            end.callback((self.place / "ledger").unlink)
            end.callback(ledger.close)
            pager_blocks = []
            for block in blocks:
                source: Source = FileSource(os.dup(block.data))
                if bench.chaos is not None:
                    name = block.traced.name
                    source = ChaosSource(source, bench.chaos, name, block.offset)
                    chaos.append(source)
                end.callback(source.close)
                registration.register(userfaultfd, block.address, block.traced.length)
                pager_blocks.append(
                    PagerBlock(
                        name=block.traced.name,
                        address=block.address,
                        length=block.traced.length,
                        page_size=block.traced.page_size,
                        source=source,
                        source_offset=block.offset,
                        data_bitmap=block.bitmap,
                    )
                )
            pager = Pager(
                userfaultfd,
                pager_blocks,
                ledger,
                chunk_size=bench.chunk_size or self.image.manifest.chunk_size_bytes,
                background=bench.background,
            )
            room = self.schedule.stat().st_size // ENTRY.size * 2
            answers = TraceWriter.create(self.place / "answers", self.blocks, room)
            end.callback((self.place / "answers").unlink)
            end.callback(answers.close)
            end.callback(pager.close)
            pager.record(answers)
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {self.cpus[1]})
            try:
                pager.start()
            finally:
                os.sched_setaffinity(0, before)
            ours.send(b"g")
            line = process.stdout.readline()
            if not line:
                raise self._ended(process)
            found: dict[str, Any] = json.loads(line)
            pager.stop()
            for block in blocks:
                compare(block, ledger.states(block.traced.name))
            with Trace(self.place / "answers") as trace:
                p50, p99 = percentiles([fault.latency_ns for fault in trace])
            totals = [asdict(source.counts()) for source in chaos]
            return (
                Replayed(
                    rate=found["touches"] / found["seconds"],
                    touch_p50_us=found["p50_us"],
                    touch_p99_us=found["p99_us"],
                    touch_max_us=found["max_us"],
                    answer_p50_us=p50,
                    answer_p99_us=p99,
                    faults=pager.statistics().faults,
                    latest_ms=found["latest_ms"],
                ),
                {key: sum(one[key] for one in totals) for key in (totals[0] if totals else ())},
            )

    def _receive(
        self, connection: socket.socket, process: subprocess.Popen[str]
    ) -> tuple[int, int]:
        """A descriptor of the stand-in's, and the address that came with it."""
        message, descriptors, _, _ = socket.recv_fds(connection, HANDOVER.size, 1)
        if len(message) != HANDOVER.size or not descriptors:
            raise self._ended(process)
        return descriptors[0], HANDOVER.unpack(message)[0]

    def _ended(self, process: subprocess.Popen[str]) -> HostError:
        _, said = process.communicate()
        return HostError(
            f"the stand-in for the guest ended with {process.returncode}: {said.strip()}",
            hint="memory of the traced size is needed, in huge pages where the guest's was; "
            "`qemu-postcopy doctor` tells what this host lacks",
        )

    def _block(
        self,
        traced: TraceBlock,
        connection: socket.socket,
        process: subprocess.Popen[str],
        end: ExitStack,
    ) -> _Block:
        memory, address = self._receive(connection, process)
        end.callback(os.close, memory)
        data, offset = self.image.open_block(traced.name)
        end.callback(os.close, data)
        bitmap = data_bitmap(data, offset, traced.length, traced.page_size)
        return _Block(traced, address, memory, data, offset, bitmap)


def compare(block: _Block, states: bytes) -> None:
    """ContentError where a page that the pager has filled is not what the image has.

    The memfd is read, not mapped: what is missing stays missing.
    """
    page_size = block.traced.page_size
    step = max(1, PART_BYTES // page_size)
    page = states.find(PRESENT)
    while page >= 0:
        end = page + 1
        while end - page < step and states[end : end + 1] == bytes([PRESENT]):
            end += 1
        length = (end - page) * page_size
        found = os.pread(block.memory, length, page * page_size)
        wanted = bytearray(os.pread(block.data, length, block.offset + page * page_size))
        for index in range(page, end):
            # What a file has where the bitmap says zero means nothing.
            if not block.bitmap[index >> 3] >> (index & 7) & 1:
                start = (index - page) * page_size
                wanted[start : start + page_size] = bytes(page_size)
        if found != wanted:
            wrong = next(
                index
                for index in range(page, end)
                if found[(index - page) * page_size : (index - page + 1) * page_size]
                != wanted[(index - page) * page_size : (index - page + 1) * page_size]
            )
            raise ContentError(
                f"page {wrong} of block {block.traced.name} differs from the image",
                hint="check the image first (qemu-postcopy image verify); if it is whole this is a "
                "bug: please report it with the trace",
            )
        page = states.find(PRESENT, end)
