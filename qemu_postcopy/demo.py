"""``qemu-postcopy demo``: the main job on a real guest, checked from inside the guest.

Builds the test guest, lets it fill its memory with a pattern that it can verify, snapshots it,
resumes it eagerly with stock QEMU and lazily with the sidecar, and ends well only if the guest went
on in both and found not one wrong word.  Everything lies in a temporary directory.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from qemu_postcopy.cli import size
from qemu_postcopy.errors import (
    ContentError,
    HostError,
    PostcopyError,
    SidecarError,
    TargetGoneError,
)
from qemu_postcopy.image.convert import export
from qemu_postcopy.image.image import Image
from qemu_postcopy.images.builder import build
from qemu_postcopy.images.console import Bad, ConsoleParser, Failure, Ready, Tick
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.paging.pager import TIMELINE_BUCKET_SECONDS
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.snapshot import SnapshotOptions, snapshot
from qemu_postcopy.vm.async_page_faults import launch_offering
from qemu_postcopy.vm.console import Console
from qemu_postcopy.vm.launch import QemuProcess, launch
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec, restore_arguments

FILL_SECONDS = 120.0
#: A slow machine needs seconds for each pass over the memory.
VERIFY_SECONDS = 180.0
PASSES = 2
CHART_COLUMNS = 64
CHART_ROWS = 6


class Verdict:
    """What the guest said of its memory so far."""

    def __init__(self) -> None:
        self._parser = ConsoleParser()
        self._complaint = ""
        self.ready: Ready | None = None
        self.first: Tick | None = None
        self.last: Tick | None = None

    def feed(self, piece: bytes) -> None:
        """Takes a piece of the console; what is wrong with it is raised by :meth:`check`."""
        for record in self._parser.feed(piece):
            if isinstance(record, Ready):
                self.ready = record
            elif isinstance(record, Tick):
                self.first = self.first or record
                self.last = record
                if record.bad_words:
                    self._complain(f"the guest counts {record.bad_words} wrong words")
            elif isinstance(record, Bad):
                self._complain(
                    f"page {record.page_index} of the guest holds {record.got:#018x}, "
                    f"not {record.want:#018x}"
                )
            elif isinstance(record, Failure):
                self._complain(f"the guest failed: {record.reason}")

    def _complain(self, message: str) -> None:
        # Raised in a reader's callback it would reach nobody.
        self._complaint = self._complaint or message

    @property
    def bad_words(self) -> int:
        """As the guest has counted them up to its last tick."""
        return self.last.bad_words if self.last is not None else 0

    def check(self) -> None:
        """Raises ContentError if the guest found a wrong word, or failed."""
        if self._complaint:
            raise ContentError(self._complaint)

    def passes_since_first(self) -> int:
        """Whole passes over the memory that began after the first tick seen."""
        if self.first is None or self.last is None:
            return 0
        # The pass that the first tick fell into had begun before it.
        return max(0, self.last.passes - self.first.passes - 1)


@dataclass(frozen=True)
class Outcome:
    """One way to resume: times in seconds from the start of QEMU, or of the command."""

    way: str
    first_output: float
    first_output_from_command: float | None
    faults: int
    bytes_read: int
    passes_verified: int
    bad_words: int
    ticks: tuple[int, int]


class Demo:
    """The steps, in order; each tells what it does through ``say``."""

    def __init__(
        self, directory: Path, memory_bytes: int, qemu: str, say: Callable[[str], None]
    ) -> None:
        self.directory = directory
        self.memory_mib = memory_bytes >> 20
        self.qemu = qemu
        self.say = say
        self.image = directory / "guest.qpc"
        self.fifo = directory / "console.fifo"

    async def run(self) -> dict[str, Any]:
        """All of it; the result as JSON has it."""
        self.say("building the test guest (kernel and busybox of this distribution)")
        guest = await asyncio.to_thread(build)
        before = await self.boot_and_snapshot(guest)
        stream = self.directory / "guest.stream"
        image = Image.open(self.image)
        await asyncio.to_thread(export, image, stream)
        self.say("resuming it eagerly: stock QEMU reads all of the memory first")
        eager = await self.resume_eagerly(image, stream, before)
        stream.unlink()
        self.say("resuming it lazily: QEMU starts with empty memory, the sidecar serves faults")
        lazy, statistics = await self.resume_lazily(before)
        return {
            "memory_mib": self.memory_mib,
            "ram_bytes": sum(block.size_bytes for block in image.manifest.blocks),
            "outcomes": [asdict(eager), asdict(lazy)],
            "statistics": statistics,
            "bad_words": sum(outcome.bad_words for outcome in (eager, lazy)),
        }

    def spec(self, guest: GuestImage) -> VmSpec:
        """The guest: one memfd back-end, a serial line, nothing else."""
        ram = MemoryBackend("memfd", "m0", guest.ram_mib(self.memory_mib) << 20)
        return VmSpec(
            binary=self.qemu,
            memory=(ram,),
            kernel=str(guest.kernel),
            initrd=str(guest.initramfs),
            append=guest.kernel_command_line(
                "check", fill_mib=self.memory_mib, zero_percent=10, tick_ms=10
            ),
            serial=str(self.fifo),
        )

    async def boot_and_snapshot(self, guest: GuestImage) -> int:
        """Returns the number of the last tick seen before the snapshot."""
        self.say(f"booting it and letting it fill {self.memory_mib} MiB")
        verdict = Verdict()
        with self.console(verdict, "boot") as console:
            argv = self.spec(guest).argv(self.directory)
            qemu, qmp = await launch_offering(argv, self.directory / "original")
            try:
                await qmp.close()
                await self.until(console, qemu, verdict, lambda: bool(verdict.last), FILL_SECONDS)
                self.say("snapshotting it while it verifies and rewrites, then ending it")
                await snapshot(SnapshotOptions(qmp=qemu.qmp_path, image=self.image, then="stop"))
            finally:
                qemu.kill()
                qemu.close()
        assert verdict.last is not None
        return verdict.last.number

    async def resume_eagerly(self, image: Image, stream: Path, before: int) -> Outcome:
        """Stock QEMU, the whole stream, no sidecar."""
        verdict = Verdict()
        with self.console(verdict, "eager") as console, stream.open("rb") as file:
            os.set_inheritable(file.fileno(), True)
            words = restore_arguments(list(image.manifest.launch["argv"]), image.manifest.machine)
            words[words.index("defer")] = f"fd:{file.fileno()}"
            words.remove("-S")
            read_bytes = os.fstat(file.fileno()).st_size
            began = time.monotonic_ns()
            qemu = launch(words, self.directory / "eager", pass_descriptors=[file.fileno()])
            try:
                await self.verify(console, qemu, verdict, before)
            finally:
                qemu.kill()
                qemu.close()
        return Outcome(
            "eager (stock)",
            (console.first_line_ns - began) / 1e9,
            None,
            0,
            read_bytes,
            verdict.passes_since_first(),
            verdict.bad_words,
            _ticks(verdict),
        )

    async def resume_lazily(self, before: int) -> tuple[Outcome, dict[str, Any]]:
        """The command that a user types, in a run directory of our own."""
        verdict = Verdict()
        environment = {**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(self.directory / "run")}
        words = [
            sys.executable,
            "-P",
            "-m",
            "qemu_postcopy",
            "restore",
            "--json",
            "--wait",
            "complete",
        ]
        with self.console(verdict, "lazy") as console:
            began = time.monotonic_ns()
            command = await asyncio.create_subprocess_exec(
                *words,
                "--name",
                "demo",
                str(self.image),
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                output, errors = await command.communicate()
            except BaseException:  # Ctrl-C: a guest that the command leaves running is the demo's
                with suppress(ProcessLookupError):
                    command.terminate()
                await command.wait()
                self._end_lazy()
                raise
            if command.returncode:
                raise SidecarError(
                    f"the lazy restore failed ({command.returncode}): {errors.decode().strip()}"
                )
            result = json.loads(output)
            with QemuHandle(result["pid"]) as qemu:
                await self.verify(console, qemu, verdict, before)
        statistics = result["statistics"]
        outcome = Outcome(
            "lazy (ours)",
            (console.first_line_ns - result["launched_ns"]) / 1e9,
            (console.first_line_ns - began) / 1e9,
            statistics["faults"],
            statistics["bytes_read"],
            verdict.passes_since_first(),
            verdict.bad_words,
            _ticks(verdict),
        )
        return outcome, statistics

    def _end_lazy(self) -> None:
        """Ends what a restore that was interrupted has come to."""
        record = RunDirectory(self.directory / "run" / "demo").read_record(missing_ok=True)
        if record is None:
            return
        with suppress(TargetGoneError, ProcessLookupError):
            if record.pid:
                with QemuHandle(record.pid):
                    pass  # it is killed at the end of the block, and its sidecar ends with it
            elif record.sidecar_pid:
                os.kill(record.sidecar_pid, signal.SIGTERM)

    async def verify(
        self, console: Console, qemu: QemuProcess | QemuHandle, verdict: Verdict, before: int
    ) -> None:
        """Waits until the guest has verified all of its memory ``PASSES`` times since it resumed.

        Raises:
            ContentError: a wrong word, or the guest is not the one that was snapshotted.
        """
        await self.until(
            console, qemu, verdict, lambda: verdict.passes_since_first() >= PASSES, VERIFY_SECONDS
        )
        assert verdict.first is not None
        if verdict.ready is not None or verdict.first.number < before:
            raise ContentError("the guest did not go on from where it was snapshotted")

    def console(self, verdict: Verdict, name: str) -> Console:
        """A console that feeds the verdict; what a failed one leaves is in NAME.log."""
        return Console(self.fifo, self.directory / f"{name}.log", verdict.feed)

    async def until(
        self,
        console: Console,
        qemu: QemuProcess | QemuHandle,
        verdict: Verdict,
        condition: Callable[[], bool],
        seconds: float,
    ) -> None:
        """Waits for ``condition``, which console output brings about.

        Raises:
            ContentError: a wrong word, the guest ended, or the time is up.
        """

        def met(_: bytes) -> bool:
            verdict.check()
            return condition()

        waiting = asyncio.ensure_future(console.wait_for(met, seconds))
        ended = asyncio.ensure_future(qemu.wait_exit())
        try:
            await asyncio.wait({waiting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                raise ContentError(
                    "the guest ended on its own", hint=f"its console: {console.output[-400:]!r}"
                )
            await waiting
        except TimeoutError:
            raise ContentError(
                f"the guest did not get there within {seconds:.0f} s",
                hint=f"its console: {console.output[-400:]!r}",
            ) from None
        finally:
            waiting.cancel()
            ended.cancel()
            await asyncio.wait({waiting, ended})


class QemuHandle:
    """A QEMU that the sidecar started: waited for by pidfd, killed at the end."""

    def __init__(self, pid: int) -> None:
        from qemu_postcopy.vm.process import ProcessIdentity

        self._identity = ProcessIdentity.open(pid)

    async def wait_exit(self) -> int:
        """Returns when it has ended; the status is its parent's to know."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._identity.pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._identity.pidfd)
        return 0

    def __enter__(self) -> QemuHandle:
        return self

    def __exit__(self, *_: object) -> None:
        if self._identity.is_alive():
            signal.pidfd_send_signal(self._identity.pidfd, signal.SIGKILL)
        self._identity.close()


def _ticks(verdict: Verdict) -> tuple[int, int]:
    assert verdict.first is not None and verdict.last is not None
    return verdict.first.number, verdict.last.number


def chart(timeline: list[int], columns: int = CHART_COLUMNS, rows: int = CHART_ROWS) -> list[str]:
    """Faults over time as lines of plain text; each column is the same stretch of time."""
    if not timeline:
        return ["(no faults)"]
    stretch = -(-len(timeline) // columns)
    sums = [sum(timeline[i : i + stretch]) for i in range(0, len(timeline), stretch)]
    highest = max(sums)
    lines = []
    for row in range(rows, 0, -1):
        bar = "".join("#" if value * rows > highest * (row - 1) else " " for value in sums)
        label = str(highest) if row == rows else ""
        lines.append(f"{label:>7} |{bar}")
    seconds = len(timeline) * TIMELINE_BUCKET_SECONDS
    lines.append(f"{'0':>7} +{'-' * len(sums)}")
    lines.append(
        f"{'':>8} 0 s{'':{max(0, len(sums) - 10)}}{seconds:.2f} s   "
        f"(faults in each {stretch * TIMELINE_BUCKET_SECONDS * 1000:.0f} ms)"
    )
    return lines


def show(result: dict[str, Any]) -> None:
    """The table and the chart, to stdout."""
    from rich.console import Console as Terminal
    from rich.table import Table

    table = Table(title=f"a guest with {result['ram_bytes'] >> 20} MiB of RAM, resumed")
    for name in ("", "first line", "by command", "faults", "read", "passes"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for outcome in result["outcomes"]:
        from_command = outcome["first_output_from_command"]
        table.add_row(
            outcome["way"],
            f"{outcome['first_output'] * 1000:.0f} ms",
            "" if from_command is None else f"{from_command * 1000:.0f} ms",
            str(outcome["faults"]),
            f"{outcome['bytes_read'] >> 20} MiB",
            str(outcome["passes_verified"]),
        )
    terminal = Terminal()
    terminal.print(table)
    terminal.print("first line: of the guest's output, from the start of QEMU, or of our command.")
    terminal.print("faults over time, from the first page served:")
    for line in chart(result["statistics"]["timeline"]):
        terminal.print(line, highlight=False, markup=False, soft_wrap=True)
    terminal.print(
        f"{result['bad_words']} wrong words: the guest verified every page, in both ways."
    )


@click.command("demo")
@click.option(
    "--memory", callback=size, default="512M", show_default=True, help="What the guest fills."
)
@click.option("--qemu", default="", help="QEMU binary; default: this architecture's.")
@click.option("--keep", is_flag=True, help="Keep the working directory (image, consoles, logs).")
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
def demo_command(memory: int, qemu: str, keep: bool, as_json: bool) -> None:
    """Snapshot a real guest and resume it, eagerly and lazily, its memory verified.

    The exit status is 0 only if the guest went on in both ways and found no wrong word.

    \b
    Examples:
      qemu-postcopy demo
      qemu-postcopy demo --memory 2G --keep
    """
    if not 16 << 20 <= memory <= 1 << 40:
        raise click.BadParameter("from 16M to 1T", param_hint="--memory")
    binary = qemu or f"qemu-system-{os.uname().machine}"
    if shutil.which(binary) is None:
        raise HostError(
            f"{binary} is not installed", hint="run: qemu-postcopy doctor --install, or give --qemu"
        )
    directory = Path(tempfile.mkdtemp(prefix="qpc-demo-"))
    began = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - began:5.1f} s] {text}", err=True)

    try:
        result = asyncio.run(Demo(directory, memory, binary, say).run())
    except PostcopyError:
        keep = True
        raise
    finally:
        if keep:
            say(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        show(result)
