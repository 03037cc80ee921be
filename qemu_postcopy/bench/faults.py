"""``bench faults``: our pager against a bare handler, on the same memory in the same order.

A toucher (C) maps memory and touches every page, timing each.  Its faults are answered in turn by
the bare handler (C) that blocks in read(2), the bare one that never sleeps, and our pager; they
take turns, so that a machine whose speed drifts treats all alike.  Those two copy from a file that
they have mapped whole beforehand.  Our pager reads what it copies, since a mapping would show zeros
where a file was cut short; so a third bare one, that never sleeps either, reads as well.  The
content is compared in full after every run.  Toucher and handler have a processor each, where there
are two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qemu_postcopy.bench.report import Ratio, Report, Result, describe_host
from qemu_postcopy.errors import ContentError, HostError
from qemu_postcopy.paging import registration
from qemu_postcopy.paging.ledger import Ledger, LedgerBlock
from qemu_postcopy.paging.pager import Pager, PagerBlock
from qemu_postcopy.paging.source import FileSource
from qemu_postcopy.paging.trace import TraceBlock, TraceWriter

BLOCKING = "bare, blocking"
SPINNING = "bare, spinning"
READING = "bare, spinning, reads"
OURS = "pager"
TRACED = "pager, traced"

WORD_BYTES = 8
HUGE_PAGE_BYTES = 2 << 20
#: struct handover of handover.h: address, length, page size
HANDOVER = struct.Struct("<QQQ")
PROGRAMS = ("toucher", "bare_handler", "write_source", "replayer")
HUGE_PAGES_FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


@dataclass(frozen=True)
class Case:
    """One line of the comparison; ``chunk_size`` in bytes."""

    order: str
    threads: int
    chunk_size: int
    descriptors: int = 1

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        descriptors = "" if self.descriptors == 1 else f", {self.descriptors} descriptors"
        return f"{self.order}, {threads}{descriptors}, chunk {self.chunk_size >> 10} KiB"


@dataclass(frozen=True)
class Run:
    """What a toucher measured: pages per second, and microseconds a touch."""

    rate: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class FaultBench:
    """What to measure.

    ``memory`` is "memfd", "anonymous" or "hugetlb" (``pages`` counts its pages, of 4 KiB or 2 MiB);
    ``directory`` gets the file that page data comes from, and should be a tmpfs; ``descriptors`` is
    the number of equal parts that the memory is cut into, each with its userfaultfd and handler;
    ``trace`` adds the pager with every fault recorded.
    """

    pages: int
    orders: tuple[str, ...]
    threads: tuple[int, ...]
    chunk_sizes: tuple[int, ...]
    memory: str
    runs: int
    directory: Path
    descriptors: int = 1
    trace: bool = False
    say: Callable[[str], None] = field(default=lambda text: None)

    def run(self) -> Report:
        """Measures everything.

        Raises:
            HostError: no compiler, no huge pages, no userfaultfd.
            ContentError: a page held something else than its source.
        """
        page_size = HUGE_PAGE_BYTES if self.memory == "hugetlb" else 4096
        self._check_huge_pages()
        programs = compiled_programs()
        report = Report("faults", describe_host())
        toucher_cpu, handler_cpu = processors()
        if toucher_cpu == handler_cpu:
            report.notes.append(
                "One processor: toucher and handler share it, so this says little of the handlers."
            )
        else:
            report.notes.append(
                f"The toucher is pinned to processor {toucher_cpu}, the handler to {handler_cpu}."
            )
        cases = [
            Case(order, threads, chunk, self.descriptors)
            for chunk in self.chunk_sizes
            for threads in self.threads
            for order in self.orders
        ]
        with TemporaryDirectory(prefix="qpc-bench-", dir=self.directory) as place:
            source = Path(place, "source")
            words = self.pages * page_size // WORD_BYTES
            written = subprocess.run(
                [programs / "write_source", source, str(words)], capture_output=True, text=True
            )
            if written.returncode:
                raise HostError(
                    f"{words * WORD_BYTES} bytes of page data: {written.stderr.strip()}",
                    hint="choose another place with --directory, or fewer --pages",
                )
            stand = _Stand(self, programs, source, Path(place), toucher_cpu, handler_cpu)
            for case in cases:
                self._measure(case, stand, report)
        return report

    def _check_huge_pages(self) -> None:
        if self.memory != "hugetlb":
            return
        free = int(HUGE_PAGES_FREE.read_text()) if HUGE_PAGES_FREE.exists() else 0
        if free < self.pages:
            raise HostError(
                f"{self.pages} huge pages of 2 MiB are needed, {free} are free",
                hint=f"reserve some (sysctl vm.nr_hugepages={self.pages}), or use fewer --pages",
            )

    def _measure(self, case: Case, stand: _Stand, report: Report) -> None:
        handlers: dict[str, Callable[[Case], Run]] = {
            BLOCKING: lambda case: stand.bare(("block", "mapped"), case),
            SPINNING: lambda case: stand.bare(("spin", "mapped"), case),
            READING: lambda case: stand.bare(("spin", "read"), case),
            OURS: stand.ours,
        }
        if self.trace:
            handlers[TRACED] = lambda case: stand.ours(case, traced=True)
        runs: dict[str, list[Run]] = {name: [] for name in handlers}
        for number in range(self.runs + 1):
            self.say(f"{case}: " + (f"round {number} of {self.runs}" if number else "warming up"))
            for name, handler in handlers.items():
                run = handler(case)
                if number:
                    runs[name].append(run)
        unit = "faults/s" if case.chunk_size <= stand.page_size else "pages/s"
        rates = {name: [run.rate for run in of] for name, of in runs.items()}
        p99s = {name: [run.p99_us for run in of] for name, of in runs.items()}
        for name, of in runs.items():
            report.results += [
                Result(f"{case}: {name}", unit, rates[name]),
                Result(f"{case}: {name}, p50", "us", [run.p50_us for run in of]),
                Result(f"{case}: {name}, p99", "us", p99s[name]),
            ]
        for other in (BLOCKING, SPINNING, READING):
            name = f"{case}: {unit}"
            report.ratios.append(Ratio.by_round(name, OURS, other, rates[OURS], rates[other]))
        if self.trace:
            name = f"{case}: {unit}"
            report.ratios.append(Ratio.by_round(name, TRACED, OURS, rates[TRACED], rates[OURS]))
        better = [min(pair) for pair in zip(p99s[BLOCKING], p99s[SPINNING], strict=True)]
        report.ratios.append(
            Ratio.by_round(f"{case}: p99", OURS, "better of the first two", p99s[OURS], better)
        )


@dataclass(frozen=True)
class _Stand:
    """Where runs are made."""

    bench: FaultBench
    programs: Path
    source: Path
    place: Path
    toucher_cpu: int
    handler_cpu: int

    @property
    def page_size(self) -> int:
        return HUGE_PAGE_BYTES if self.bench.memory == "hugetlb" else 4096

    @contextmanager
    def toucher(self, case: Case) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
        """A toucher that waits for its handler at the other end of the socket."""
        ours, theirs = socket.socketpair()
        words = [self.bench.memory, self.bench.pages, case.order, case.threads, self.toucher_cpu, 0]
        words.append(case.descriptors)
        with ours, theirs:
            process = subprocess.Popen(
                [self.programs / "toucher", *map(str, words)],
                stdin=theirs.fileno(),
                stdout=subprocess.PIPE,
                text=True,
            )
            theirs.close()
            try:
                yield process, ours
            finally:
                process.kill()
                process.wait()

    def bare(self, kind: tuple[str, str], case: Case) -> Run:
        """One run with the bare handler; ``kind``: its first two arguments."""
        with self.toucher(case) as (toucher, connection):
            words = [*kind, self.source, case.chunk_size, self.handler_cpu, case.descriptors]
            handler = subprocess.Popen(
                [self.programs / "bare_handler", *map(str, words)], stdin=connection.fileno()
            )
            # With our end closed the handler notices the toucher's end, and the other way round.
            connection.close()
            try:
                return self._finish(toucher)
            finally:
                handler.kill()
                handler.wait()

    def ours(self, case: Case, *, traced: bool = False) -> Run:
        """One run with the pager, in threads of this process; traced: each fault recorded."""
        with self.toucher(case) as (toucher, connection), ExitStack() as stack:
            source = FileSource(os.open(self.source, os.O_RDONLY | os.O_CLOEXEC))
            stack.enter_context(source)
            pagers = []
            offset = 0
            for index in range(case.descriptors):
                message, (userfaultfd,), _, _ = socket.recv_fds(connection, HANDOVER.size, 1)
                stack.callback(os.close, userfaultfd)
                address, length, page_size = HANDOVER.unpack(message)
                registration.negotiate(userfaultfd)
                registration.register(userfaultfd, address, length)
                path = self.place / f"ledger{index}"
                entry = LedgerBlock("m0", page_size, length)
                ledger = stack.enter_context(Ledger.create(path, [entry]))
                stack.callback(path.unlink)
                block = PagerBlock(
                    name="m0",
                    address=address,
                    length=length,
                    page_size=page_size,
                    source=source,
                    source_offset=offset,
                    data_bitmap=b"\xff" * -(-entry.page_count // 8),
                )
                pager = Pager(
                    userfaultfd, [block], ledger, chunk_size=case.chunk_size, background=False
                )
                if traced:
                    place = self.place / f"trace{index}"
                    parts = [TraceBlock("m0", address, length, page_size)]
                    trace = TraceWriter.create(place, parts)
                    stack.callback(place.unlink)
                    stack.callback(trace.close)
                    pager.record(trace)
                pagers.append(stack.enter_context(pager))
                offset += length
            # A thread begins with the processors of the one that starts it.
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {self.handler_cpu})
            try:
                for pager in pagers:
                    pager.start()
            finally:
                os.sched_setaffinity(0, before)
            connection.send(b"g")
            return self._finish(toucher)

    def _finish(self, toucher: subprocess.Popen[str]) -> Run:
        output, _ = toucher.communicate()
        if toucher.returncode not in (0, 1) or not output:
            raise HostError(
                f"the toucher ended with {toucher.returncode}",
                hint="`qemu-postcopy doctor` tells what this host lacks",
            )
        found: dict[str, Any] = json.loads(output)
        if found["bad_words"]:
            raise ContentError(
                f"{found['bad_words']} words of memory differ from their source",
                hint="this is a bug: please report it with the command line and this host's kernel",
            )
        rate = found["touches"] / found["seconds"]
        return Run(rate, found["p50_us"], found["p99_us"])


def processors() -> tuple[int, int]:
    """One for the toucher and one for the handler; the same if there is but one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[min(1, len(allowed) - 1)]


def cache_directory() -> Path:
    """Where compiled programs are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "qemu-postcopy", "bench")


def compiled_programs() -> Path:
    """The folder with the C programs, compiled when their source has changed.

    Raises:
        HostError: there is no compiler, or it fails.
    """
    with as_file(files("qemu_postcopy.baseline")) as folder:
        sources = sorted(path for path in folder.iterdir() if path.suffix in (".c", ".h"))
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        ready = cache_directory() / digest[:16]
        if ready.exists():
            return ready
        compiler = shutil.which("cc")
        if compiler is None:
            raise HostError(
                "no C compiler, which the bare handlers are compiled with",
                hint="install one: `qemu-postcopy doctor --install`",
            )
        ready.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=ready.parent) as fresh:
            built = Path(fresh, "programs")
            built.mkdir()
            for name in PROGRAMS:
                words = [compiler, "-std=gnu11", "-O2", "-pthread", str(folder / f"{name}.c")]
                done = subprocess.run(
                    [*words, "-o", str(built / name)], capture_output=True, text=True
                )
                if done.returncode:
                    raise HostError(
                        f"{name}.c does not compile: {done.stderr.strip()}",
                        hint="the C library's development files may be missing: "
                        "`qemu-postcopy doctor --install`",
                    )
            try:
                built.rename(ready)
            except FileExistsError:
                pass  # somebody else was quicker
            except OSError:
                if not ready.exists():
                    raise
    return ready
