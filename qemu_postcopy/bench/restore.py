"""``bench restore``: how long until a guest says something again, by each way to resume it.

For each size a guest is booted, fills its memory, and is snapshotted once; then the ways take
turns, so that a machine whose speed drifts treats all alike.  Measured is the time from the start
of QEMU (or of the command) to the first whole line on the guest's console, with a warm page cache.
A guest that was stopped in the middle of a line ends that one from the device's buffer, with no
instruction run, so it does not count.

Our own restore is measured twice: of an image that was restored before, whose working set is known,
and of one that never was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from qemu_postcopy.bench.report import Ratio, Report, Result, describe_host
from qemu_postcopy.errors import GuestEndedError, HostError
from qemu_postcopy.image.convert import export
from qemu_postcopy.image.device_state import open_device_state
from qemu_postcopy.image.image import Image
from qemu_postcopy.images.builder import build
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.paging.prefetch import WorkingSet
from qemu_postcopy.restore import RestoreOptions, restore
from qemu_postcopy.session import SessionOptions
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.snapshot import SnapshotOptions, snapshot
from qemu_postcopy.vm.async_page_faults import launch_offering
from qemu_postcopy.vm.console import Console
from qemu_postcopy.vm.launch import launch
from qemu_postcopy.vm.qmp import Qmp
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec, restore_arguments

FILL_SECONDS = 900.0
OUTPUT_SECONDS = 120.0
#: mapped-ram came with QEMU 9.0
MAPPED_RAM_VERSION = (9, 0)

#: Freeing the memory of a guest that was just killed goes on for a while.
SETTLE_SECONDS = 0.3

#: How often the guest speaks: the resolution of what is measured.
TICK_MS = 2

OURS = "lazy"
FIRST = "lazy, the first time"
COMMAND = "lazy, from the command"
PRIVATE = "kernel private mapping"
Times = dict[tuple[str, int], list[float]]

PLAIN = "eager, plain stream"
MAPPED = "eager, mapped-ram"


@dataclass(frozen=True)
class RestoreBench:
    """What to measure: sizes in MiB of filled memory, eager ways up to ``eager_mib``.

    ``directory`` gets the images and streams (twice to three times the largest size).
    """

    sizes_mib: tuple[int, ...]
    runs: int
    directory: Path
    qemu: str
    eager_mib: int
    background: bool = True
    chunk_size: int | None = None
    say: Callable[[str], None] = field(default=lambda text: None)

    async def run(self) -> Report:
        """All sizes; times in milliseconds, ratios round by round.

        Raises:
            PostcopyError: a guest could not be resumed by one of the ways.
        """
        if shutil.which(self.qemu) is None:
            raise HostError(f"{self.qemu} is not installed", hint="run: qemu-postcopy doctor")
        guest = await asyncio.to_thread(build)
        times: Times = {}
        for size in self.sizes_mib:
            place = self.directory / f"bench-{size}"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            try:
                await self._measure(_Guest(self, guest, size, place), times)
            finally:
                shutil.rmtree(place)
        return self._report(times)

    def _report(self, times: Times) -> Report:
        report = Report("restore", describe_host())
        report.notes.append(
            "from the start of QEMU (or of the command) to the guest's first whole line"
        )
        for (way, size), values in sorted(times.items(), key=lambda entry: entry[0][1]):
            report.results.append(Result(f"{way}, {size} MiB", "ms", [1000 * v for v in values]))
        for (way, size), values in sorted(times.items(), key=lambda entry: entry[0][1]):
            if way != OURS:
                ours = times[OURS, size]
                name = f"lazy to {way}, {size} MiB"
                report.ratios.append(Ratio.by_round(name, OURS, way, ours, values))
        smallest, largest = min(self.sizes_mib), max(self.sizes_mib)
        if smallest != largest:
            report.ratios.append(
                Ratio.by_round(
                    f"lazy, {largest} MiB to {smallest} MiB",
                    f"{largest} MiB",
                    f"{smallest} MiB",
                    # Sizes do not take turns: the medians are compared.
                    [median(times[OURS, largest])],
                    [median(times[OURS, smallest])],
                )
            )
        return report

    def session_options(self) -> SessionOptions:
        """How our own restores serve."""
        return SessionOptions(chunk_size=self.chunk_size, background=self.background)

    async def _measure(self, guest: _Guest, times: Times) -> None:
        self.say(f"{guest.size_mib} MiB: booting, filling, snapshotting")
        version = await guest.prepare()
        if not self.session_options().uses_working_set():
            self.say("no working set: every restore is like the first")
        else:
            await guest.record_working_set()
        ways: dict[str, Callable[[], Awaitable[float]]] = {
            OURS: guest.resume_lazily,
            FIRST: guest.resume_for_the_first_time,
            PRIVATE: guest.resume_privately,
            COMMAND: guest.resume_by_command,
        }
        if guest.size_mib <= self.eager_mib:
            await asyncio.to_thread(export, guest.image, guest.plain)
            ways[PLAIN] = guest.resume_from_plain
            if version >= MAPPED_RAM_VERSION:
                await asyncio.to_thread(export, guest.image, guest.mapped, "mapped-ram")
                ways[MAPPED] = guest.resume_from_mapped
        for number in range(self.runs + 1):
            self.say(
                f"{guest.size_mib} MiB: "
                + (f"round {number} of {self.runs}" if number else "warming up")
            )
            # Each way follows each other one in turn: what the run before left behind (memory being
            # freed, caches) is shared fairly.
            order = list(ways.items())
            turn = number % len(order)
            for way, resume in order[turn:] + order[:turn]:
                await asyncio.sleep(SETTLE_SECONDS)
                seconds = await resume()
                if number:
                    times.setdefault((way, guest.size_mib), []).append(seconds)


class _Guest:
    """One size's guest: its image, and each way to resume it once."""

    def __init__(
        self, bench: RestoreBench, guest: GuestImage, size_mib: int, directory: Path
    ) -> None:
        self.size_mib = size_mib
        self.plain = directory / "plain"
        self.mapped = directory / "mapped"
        self._bench = bench
        self._guest = guest
        self._directory = directory
        self._fifo = directory / "console"
        self._image_path = directory / "guest.qpc"
        self.image: Image

    def _console(self) -> Console:
        return Console(self._fifo, self._directory / "console.log")

    async def prepare(self) -> tuple[int, ...]:
        """Boots, fills, snapshots; returns QEMU's version."""
        spec = VmSpec(
            binary=self._bench.qemu,
            memory=(MemoryBackend("memfd", "m0", self._guest.ram_mib(self.size_mib) << 20),),
            kernel=str(self._guest.kernel),
            initrd=str(self._guest.initramfs),
            append=self._guest.kernel_command_line(
                "check", fill_mib=self.size_mib, zero_percent=0, tick_ms=TICK_MS
            ),
            serial=str(self._fifo),
        )
        with self._console() as console:
            argv = spec.argv(self._directory)
            qemu, qmp = await launch_offering(argv, self._directory / "original")
            try:
                async with qmp:
                    version = qmp.version
                await console.wait_for(lambda output: b"QPC tick" in output, FILL_SECONDS)
                await snapshot(
                    SnapshotOptions(qmp=qemu.qmp_path, image=self._image_path, then="stop")
                )
            finally:
                qemu.kill()
                qemu.close()
        self.image = Image.open(self._image_path)
        return version

    def _words(self, incoming: str) -> list[str]:
        manifest = self.image.manifest
        words = restore_arguments(list(manifest.launch["argv"]), manifest.machine)
        words[words.index("defer")] = incoming
        words.remove("-S")
        return words

    async def _time(
        self, words: list[str], descriptor: int, prepare: Callable[[Qmp], Awaitable[None]] | None
    ) -> float:
        """Starts stock QEMU, and waits for the guest's first output."""
        with self._console() as console:
            console.forget()
            began = time.monotonic_ns()
            passed = [descriptor] if descriptor >= 0 else []
            qemu = launch(words, self._directory / "stock", pass_descriptors=passed)
            try:
                if prepare is not None:
                    async with await qemu.connect() as qmp:
                        await prepare(qmp)
                await console.wait_for(_whole_line(console), OUTPUT_SECONDS)
            finally:
                qemu.kill()
                qemu.close()
            return (console.first_line_ns - began) / 1e9

    async def resume_from_plain(self) -> float:
        """`-incoming fd:` of the whole stream."""
        with self.plain.open("rb") as file:
            os.set_inheritable(file.fileno(), True)
            return await self._time(self._words(f"fd:{file.fileno()}"), file.fileno(), None)

    async def resume_from_mapped(self) -> float:
        """`migrate-incoming file:` with the mapped-ram capability."""

        async def load(qmp: Qmp) -> None:
            capability = {"capability": "mapped-ram", "state": True}
            await qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})
            await qmp.execute("migrate-incoming", {"uri": f"file:{self.mapped}"})

        return await self._time(self._words("defer"), -1, load)

    async def resume_privately(self) -> float:
        """The page file mapped privately by QEMU itself: the kernel pages it in."""
        block = self.image.manifest.blocks[0]
        words = self._words("")
        state = open_device_state(self.image)
        try:
            words[words.index("-incoming") + 1] = f"fd:{state}"
            index = next(i for i, word in enumerate(words) if word.startswith("memory-backend-"))
            words[index] = (
                f"memory-backend-file,id={block.name},size={block.size_bytes},share=off,"
                f"mem-path={self.image.path / block.file}"
            )
            return await self._time(words, state, None)
        finally:
            os.close(state)

    async def resume_lazily(self) -> float:
        """This process serves; measured from the start of QEMU."""
        with _cache(self._directory / "known"):
            return await self._resume()

    async def resume_for_the_first_time(self) -> float:
        """The same where nothing is known of the image."""
        shutil.rmtree(self._directory / "unknown", ignore_errors=True)
        with _cache(self._directory / "unknown"):
            return await self._resume()

    async def record_working_set(self) -> None:
        """One restore that lasts until what the guest wanted first has been noted."""
        with _cache(self._directory / "known"):
            await self._resume(until_noted=True)

    async def _resume(self, *, until_noted: bool = False) -> float:
        run = RunDirectory.create("bench", self._directory)
        with self._console() as console:
            console.forget()
            options = RestoreOptions(image=self._image_path, session=self._bench.session_options())
            serving = asyncio.ensure_future(restore(options, run))
            output = asyncio.ensure_future(console.wait_for(_whole_line(console), OUTPUT_SECONDS))
            await asyncio.wait({serving, output}, return_when=asyncio.FIRST_COMPLETED)
            if not output.done():
                output.cancel()
                await serving  # raises what went wrong
                raise HostError("the guest said nothing")
            key = self.image.manifest.state.sha256
            async with asyncio.timeout(OUTPUT_SECONDS):
                # A file tells nobody when it is made.
                while until_noted and WorkingSet.read(key) is None:  # noqa: ASYNC110
                    await asyncio.sleep(SETTLE_SECONDS)
            record = run.read_record()
            assert record is not None
            _kill(record.pid, record.start_time)
            with suppress(GuestEndedError):
                await serving
            return (console.first_line_ns - record.launched_ns) / 1e9

    async def resume_by_command(self) -> float:
        """`qemu-postcopy restore`, measured from its start."""
        base = self._directory / "run"
        words = [sys.executable, "-P", "-m", "qemu_postcopy", "restore", "--name", "bench"]
        if self._bench.chunk_size:
            words += ["--chunk", str(self._bench.chunk_size)]
        if not self._bench.background:
            words.append("--no-background")
        with self._console() as console:
            console.forget()
            began = time.monotonic_ns()
            command = await asyncio.create_subprocess_exec(
                *words,
                str(self._image_path),
                env={
                    **os.environ,
                    "QEMU_POSTCOPY_RUN_DIR": str(base),
                    "QEMU_POSTCOPY_CACHE_DIR": str(self._directory / "known"),
                },
                stdout=asyncio.subprocess.DEVNULL,
            )
            status = await command.wait()
            if status:
                raise HostError(f"the restore failed with exit status {status}")
            await console.wait_for(_whole_line(console), OUTPUT_SECONDS)
            record = RunDirectory.find("bench", base).read_record()
            assert record is not None
            _kill(record.pid, record.start_time)
            await _wait_gone(record.sidecar_pid)
            return (console.first_line_ns - began) / 1e9


@contextmanager
def _cache(directory: Path) -> Iterator[None]:
    """Working sets are kept there meanwhile."""
    name = "QEMU_POSTCOPY_CACHE_DIR"
    before = os.environ.get(name)
    os.environ[name] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _whole_line(console: Console) -> Callable[[bytes], bool]:
    return lambda _: console.first_line_ns > 0


def _kill(pid: int, start_time: int) -> None:
    import signal

    from qemu_postcopy.vm.process import ProcessIdentity

    with ProcessIdentity.open(pid, start_time) as identity:
        signal.pidfd_send_signal(identity.pidfd, signal.SIGKILL)


async def _wait_gone(pid: int) -> None:
    """Returns when that process has ended: the next run must not share the machine with it."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    await gone.wait()
    loop.remove_reader(pidfd)
    os.close(pidfd)
