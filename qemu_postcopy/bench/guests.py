"""``bench guests``: many guests from one image at once, what they cost, and whether all go on.

A guest that walks through its memory at an easy pace, verifying every word, is snapshotted once and
restored again and again, each time by the command, until so many run together.  Memory is counted
as proportional set size (PSS): what several processes share (the page cache of QEMU's and Python's
code) is counted once in the sum.  In the end all are filled, and each must have walked through all
of its memory once more without one wrong word.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu_postcopy.bench.report import Report, Result, describe_host
from qemu_postcopy.errors import ContentError, HostError, PostcopyError, TargetGoneError
from qemu_postcopy.image.image import Image
from qemu_postcopy.images.builder import build
from qemu_postcopy.images.console import Bad, ConsoleParser, Failure, Record, Walk
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.sidecar.control import ask
from qemu_postcopy.sidecar.rundir import RunDirectory, list_directories
from qemu_postcopy.snapshot import SnapshotOptions, snapshot
from qemu_postcopy.vm.async_page_faults import launch_offering
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec

BOOT_SECONDS = 240.0
#: For all guests together: a busy machine may need long.
WALK_SECONDS = 900.0
END_SECONDS = 60.0
POLL_SECONDS = 0.2
TICK_MS = 1000
#: Of guest time; a pass over 16 MiB takes 8 s, and so a guest a few percent of a processor.
PAGES_PER_SECOND = 512
MIB = 1 << 20


@dataclass(frozen=True)
class GuestsBench:
    """``count`` guests with ``fill_mib`` of patterned memory, ``at_once`` restores at a time.

    ``idle_seconds``: how long the guests are watched while only their sidecars' and QEMU's own use
    of the processor is counted; they are paused then.  ``directory`` gets the image and the run
    directories; its path must be short, for there are sockets in it.
    """

    count: int
    fill_mib: int
    at_once: int
    idle_seconds: float
    directory: Path
    qemu: str
    say: Callable[[str], None] = field(default=lambda text: None)

    async def run(self) -> Report:
        """Measures everything; ends all guests.

        Raises:
            PostcopyError: one could not be restored.
            ContentError: one found a wrong word, or did not go on.
        """
        if shutil.which(self.qemu) is None:
            raise HostError(f"{self.qemu} is not installed", hint="run: qemu-postcopy doctor")
        guest = await asyncio.to_thread(build)
        place = self.directory / f"qpc-guests-{os.getpid()}"
        place.mkdir(parents=True)
        fleet = _Fleet(self, place)
        try:
            self.say("booting, filling, snapshotting")
            await fleet.prepare(guest)
            return await self._measure(fleet)
        finally:
            await fleet.close()
            shutil.rmtree(place, ignore_errors=True)

    async def _measure(self, fleet: _Fleet) -> Report:
        report = Report("guests", describe_host())
        began = time.monotonic()
        await fleet.restore_all()
        all_run = time.monotonic() - began
        self.say(f"{self.count} guests run; waiting until each has walked through its memory")
        await fleet.wait_passes(1)
        served = [await fleet.status(guest) for guest in fleet.guests]
        await fleet.pause_all(True)
        lazy = fleet.memory()
        self.say(f"paused, watched for {self.idle_seconds:g} s")
        busy = await fleet.processor_time(self.idle_seconds)
        await fleet.pause_all(False)
        self.say("filling all of them")
        began = time.monotonic()
        await fleet.fill_all()
        filled_after = time.monotonic() - began
        self.say("all are detached; waiting until each has walked through its memory again")
        await fleet.wait_passes(1)
        filled = fleet.memory()
        manifest = fleet.image.manifest
        ram_mib = sum(block.size_bytes for block in manifest.blocks) / MIB
        data_mib = sum(block.data_bytes for block in manifest.blocks) / MIB
        report.notes.append(
            f"{self.count} guests of {ram_mib:.0f} MiB RAM from one image with {data_mib:.0f} MiB "
            f"of data; all {self.count} went on, and walked through their memory before and after "
            "they were filled: 0 bad words."
        )
        add = report.results.append
        add(Result("restore, from the command", "ms", fleet.restore_ms))
        add(Result(f"until all {self.count} run", "s", [all_run]))
        add(Result("faults served", "", [float(s["statistics"]["faults"]) for s in served]))
        add(Result("on demand: sidecar, PSS", "MiB", lazy.sidecars))
        add(Result("on demand: sidecar, RSS", "MiB", lazy.sidecars_rss))
        add(Result("on demand: QEMU with guest, PSS", "MiB", lazy.qemus))
        add(Result("on demand: all together, PSS", "MiB", [lazy.total]))
        seconds = f"{self.idle_seconds:g} s"
        add(Result(f"paused: sidecar, processor time in {seconds}", "ms", busy.sidecars))
        add(Result(f"paused: QEMU, processor time in {seconds}", "ms", busy.qemus))
        add(Result("until all are filled and detached", "s", [filled_after]))
        add(Result("filled: QEMU with guest, PSS", "MiB", filled.qemus))
        add(Result("filled: all together, PSS", "MiB", [filled.total]))
        return report


@dataclass(frozen=True)
class _Use:
    """Of each process; memory in MiB, or processor time in milliseconds."""

    qemus: list[float]
    sidecars: list[float]
    sidecars_rss: list[float]

    @property
    def total(self) -> float:
        return sum(self.qemus) + sum(self.sidecars)


class _RunningGuest:
    """One of the fleet: its processes, and what it says."""

    def __init__(self, run: RunDirectory, pid: int, sidecar_pid: int) -> None:
        self.run = run
        self.qemu = ProcessIdentity.open(pid)
        self.sidecar: ProcessIdentity | None = None
        with suppress(TargetGoneError):
            self.sidecar = ProcessIdentity.open(sidecar_pid)
        self._parser = ConsoleParser()
        self._read_bytes = 0
        self.last: Walk | None = None

    def read_console(self) -> None:
        """Takes in what is new.

        Raises:
            ContentError: the guest found its memory damaged, or has ended.
        """
        with suppress(FileNotFoundError), (self.run.path / "console.log").open("rb") as file:
            file.seek(self._read_bytes)
            text = file.read()
            self._read_bytes += len(text)
            for record in self._parser.feed(text):
                self._take(record)
        if not self.qemu.is_alive():
            raise ContentError(f"{self.run.name} has ended", hint=f"see {self.run.path}")

    def _take(self, record: Record) -> None:
        bad = isinstance(record, Bad | Failure)
        if bad or (isinstance(record, Walk) and record.bad_words):
            raise ContentError(
                f"{self.run.name} found its memory damaged: {record}",
                hint="this is a bug: please report it with the command line and this host's kernel",
            )
        if isinstance(record, Walk):
            self.last = record

    @property
    def passes(self) -> int:
        return self.last.passes if self.last else -1


class _Fleet:
    """All guests, and what is done with them together."""

    def __init__(self, bench: GuestsBench, place: Path) -> None:
        self._bench = bench
        self._place = place
        self._base = place / "run"
        self._image_path = place / "guest.qpc"
        self.image: Image
        self.guests: list[_RunningGuest] = []
        self.restore_ms: list[float] = []

    async def prepare(self, guest: GuestImage) -> None:
        """Boots, fills, snapshots."""
        bench = self._bench
        directory = self._place / "original"
        spec = VmSpec(
            binary=bench.qemu,
            memory=(MemoryBackend("memfd", "m0", guest.ram_mib(bench.fill_mib) * MIB),),
            kernel=str(guest.kernel),
            initrd=str(guest.initramfs),
            append=guest.kernel_command_line(
                "walk",
                fill_mib=bench.fill_mib,
                zero_percent=10,
                tick_ms=TICK_MS,
                rewrite=False,
                pages_per_second=PAGES_PER_SECOND,
            ),
        )
        qemu, qmp = await launch_offering(spec.argv(directory), directory)
        try:
            await qmp.close()
            console = directory / "console.log"
            deadline = time.monotonic() + BOOT_SECONDS
            # A file tells nobody when it grows.
            while not console.exists() or b"QPC walk=" not in console.read_bytes():
                if time.monotonic() > deadline:
                    raise HostError(f"the guest has not booted within {BOOT_SECONDS:g} s")
                await asyncio.sleep(POLL_SECONDS)
            await snapshot(SnapshotOptions(qmp=qemu.qmp_path, image=self._image_path, then="stop"))
        finally:
            qemu.kill()
            qemu.close()
        self.image = Image.open(self._image_path)

    async def restore_all(self) -> None:
        """By the command, some at a time; the others run on meanwhile."""
        turns = asyncio.Semaphore(self._bench.at_once)

        failures: list[PostcopyError] = []

        async def one(number: int) -> None:
            async with turns:
                if failures:
                    return
                began = time.monotonic()
                result = await self._command(
                    "restore", "--json", "--no-background", "--name", f"g{number}",
                    "--qemu", self._bench.qemu, str(self._image_path),
                )  # fmt: skip
                self.restore_ms.append((time.monotonic() - began) * 1000)
                run = RunDirectory.find(f"g{number}", self._base)
                self.guests.append(_RunningGuest(run, result["pid"], result["sidecar_pid"]))
                self._bench.say(f"restored {len(self.guests)} of {self._bench.count}")

        async def one_or_failure(number: int) -> None:
            # What others have begun comes to its end: then there is a record of every QEMU.
            try:
                await one(number)
            except PostcopyError as error:
                failures.append(error)

        await asyncio.gather(*(one_or_failure(number) for number in range(self._bench.count)))
        if failures:
            raise failures[0]

    async def _command(self, *words: str) -> dict[str, Any]:
        command = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "qemu_postcopy", *words,
            env={**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(self._base)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, errors = await command.communicate()
        if command.returncode:
            raise HostError(
                f"{' '.join(words)} failed with exit status {command.returncode}: "
                f"{errors.decode(errors='replace').strip()}"
            )
        result: dict[str, Any] = json.loads(output)
        return result

    async def wait_passes(self, count: int) -> None:
        """Until each guest has walked through its memory so many times, from begin to end."""
        deadline = time.monotonic() + WALK_SECONDS
        wanted: dict[str, int] = {}
        while True:
            late = []
            for guest in self.guests:
                guest.read_console()
                if guest.last is not None:
                    # The pass that is under way counts for nothing.
                    wanted.setdefault(guest.run.name, guest.passes + 1 + count)
                if guest.passes < wanted.get(guest.run.name, 0):
                    late.append(guest.run.name)
            if not late:
                return
            if time.monotonic() > deadline:
                raise ContentError(f"{', '.join(late)} did not go on within {WALK_SECONDS:g} s")
            await asyncio.sleep(POLL_SECONDS)

    async def status(self, guest: _RunningGuest) -> dict[str, Any]:
        """What its sidecar tells."""
        return await asyncio.to_thread(ask, guest.run.control_socket, "status")

    async def pause_all(self, paused: bool) -> None:
        """Stops or lets run all guests, by their monitors."""
        from qemu_postcopy.vm.qmp import Qmp

        for guest in self.guests:
            async with await Qmp.connect(guest.run.qmp_socket) as qmp:
                await qmp.execute("stop" if paused else "cont")

    async def fill_all(self) -> None:
        """Until every sidecar has done its work and gone."""
        for guest in self.guests:
            await asyncio.to_thread(
                ask, guest.run.control_socket, "background", enabled=True, rate=0
            )
        deadline = time.monotonic() + WALK_SECONDS
        while any(guest.sidecar and guest.sidecar.is_alive() for guest in self.guests):
            if time.monotonic() > deadline:
                raise ContentError(f"not all guests were filled within {WALK_SECONDS:g} s")
            await asyncio.sleep(POLL_SECONDS)

    def memory(self) -> _Use:
        """What the processes hold now."""
        sidecars = [_memory_mib(pid) for pid in self._sidecar_pids()]
        return _Use(
            [_memory_mib(guest.qemu.pid)[0] for guest in self.guests],
            [pss for pss, _ in sidecars],
            [rss for _, rss in sidecars],
        )

    async def processor_time(self, seconds: float) -> _Use:
        """What each process uses of a processor within so long, in milliseconds."""
        qemus = [guest.qemu.pid for guest in self.guests]
        sidecars = list(self._sidecar_pids())
        before = {pid: _processor_ms(pid) for pid in (*qemus, *sidecars)}
        await asyncio.sleep(seconds)
        return _Use(
            [_processor_ms(pid) - before[pid] for pid in qemus],
            [_processor_ms(pid) - before[pid] for pid in sidecars],
            [],
        )

    def _sidecar_pids(self) -> Iterable[int]:
        return [g.sidecar.pid for g in self.guests if g.sidecar and g.sidecar.is_alive()]

    async def close(self) -> None:
        """Ends every guest; their sidecars go by themselves."""
        known = {guest.run.name for guest in self.guests}
        for run in list_directories(self._base):
            record = run.read_record(missing_ok=True)
            if run.name not in known and record and run.guest_alive(record):
                self.guests.append(_RunningGuest(run, record.pid, record.sidecar_pid))
        for guest in self.guests:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(guest.qemu.pidfd, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        for guest in self.guests:
            for process in (guest.qemu, guest.sidecar):
                if process is not None:
                    left = max(0.0, deadline - time.monotonic())
                    await asyncio.to_thread(select.select, [process.pidfd], [], [], left)
                    process.close()


def _memory_mib(pid: int) -> tuple[float, float]:
    """Proportional and resident set size."""
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Pss", "Rss"):
            found[name] = int(rest.split()[0]) / 1024
    return found["Pss"], found["Rss"]


def _processor_ms(pid: int) -> float:
    """User and system time so far, of all its threads: sum_exec_runtime is in nanoseconds."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e6
