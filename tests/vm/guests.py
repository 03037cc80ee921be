"""Guests for tests: configured, booted, snapshotted, restored, each step a method to be combined.

Everything is done by the command line tool, as a user does it; what the guest says of its memory is
read from its console.  Snapshots that are only read are made once for a whole run and shared.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qemu_postcopy.errors import TargetGoneError
from qemu_postcopy.images.console import Bad, ConsoleParser, Failure, Ready, Record, Tick
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.async_page_faults import launch_offering
from qemu_postcopy.vm.launch import QemuProcess, launch
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.qmp import Qmp
from qemu_postcopy.vm.spec import MemoryBackend, MemoryKind, VmSpec

MIB = 1 << 20
#: How long anything may take that a busy machine makes slow.
PATIENCE = 120.0
POLL_SECONDS = 0.01
TICK_MS = 20
#: How long a guest is watched that must not move: fifty of its ticks.
STANDSTILL_SECONDS = 1.0
INCOMING = ("-incoming", "defer", "-S")
SHARED = pytest.StashKey["SharedSnapshots"]()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Asks again and again until the answer is true, and returns it.

    For what tells nobody when it changes: a growing file, /proc.
    """
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(POLL_SECONDS)
    return answer


def cli_command(*arguments: object) -> list[str]:
    """The tool as it is installed beside this Python."""
    return [sys.executable, "-m", "qemu_postcopy", *map(str, arguments)]


def cli(*arguments: object, status: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs the tool and checks its exit status."""
    done = subprocess.run(
        cli_command(*arguments), capture_output=True, text=True, timeout=PATIENCE, **options
    )
    assert done.returncode == status, (
        f"qemu-postcopy {' '.join(map(str, arguments))}: exit {done.returncode}, not {status}\n"
        f"{done.stdout}{done.stderr}"
    )
    return done


def refused(*arguments: object, status: int, words: Sequence[str], **options: Any) -> str:
    """Runs the tool, which must fail with this status, these words and a hint; returns its words.

    What to do next stands on a line of its own below the error.
    """
    said = cli(*arguments, status=status, **options).stderr
    assert "Traceback" not in said, said
    assert re.search(r"^error: .", said, re.MULTILINE), said
    assert re.search(r"^  \S", said, re.MULTILINE), f"no hint: {said}"
    for word in words:
        assert word.lower() in said.lower(), f"{word!r} is not in: {said}"
    return said


def status_of(name: str) -> dict[str, Any]:
    """What `qemu-postcopy status NAME --json` says."""
    (entry,) = json.loads(cli("status", name, "--json").stdout)
    assert isinstance(entry, dict)
    return entry


class GuestConsole:
    """The file that a guest's serial line writes, read as it grows; a bad word fails the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self._parser = ConsoleParser()
        self._read_bytes = 0

    def read(self) -> None:
        """Takes in what is new."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
        except FileNotFoundError:
            return
        self._read_bytes += len(text)
        new = self._parser.feed(text)
        self.records += new
        wrong = [
            record
            for record in new
            if isinstance(record, Bad | Failure) or (isinstance(record, Tick) and record.bad_words)
        ]
        assert not wrong, f"the guest found its memory damaged: {wrong[:5]}"

    @property
    def ticks(self) -> list[Tick]:
        """All reports so far."""
        self.read()
        return [record for record in self.records if isinstance(record, Tick)]

    @property
    def ready(self) -> bool:
        self.read()
        return any(isinstance(record, Ready) for record in self.records)

    def wait_more_ticks(self, count: int) -> list[Tick]:
        """Until so many more have come."""
        wanted = len(self.ticks) + count
        wait_until(lambda: len(self.ticks) >= wanted, f"{count} ticks in {self.path}")
        return self.ticks

    def wait_passes(self, count: int) -> None:
        """Until the guest has verified all of its memory so many times more, from begin to end."""
        self.wait_more_ticks(1)
        # The pass that is under way now counts for nothing.
        wanted = self.ticks[-1].passes + 1 + count
        wait_until(lambda: self.ticks[-1].passes >= wanted, f"{count} passes in {self.path}", 240)

    def stands_still(self) -> bool:
        """Whether not one tick comes while it is watched."""
        before = len(self.ticks)
        time.sleep(STANDSTILL_SECONDS)
        return len(self.ticks) == before


class Guest:
    """A QEMU with or without a guest in it, and what a test asks of it."""

    def __init__(self, pid: int, directory: Path, name: str, sidecar_pid: int = 0) -> None:
        self.identity = ProcessIdentity.open(pid)
        self.sidecar: ProcessIdentity | None = None
        if sidecar_pid:
            with suppress(TargetGoneError):  # it has done its work already
                self.sidecar = ProcessIdentity.open(sidecar_pid)
        self.directory = directory
        self.name = name
        self.qmp_path = directory / "qmp.sock"
        self.console = GuestConsole(directory / "console.log")
        self.process: QemuProcess | None = None
        #: what the command that restored it printed
        self.result: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self.identity.pid

    def alive(self) -> bool:
        return self.identity.is_alive()

    def ask(self, command: str, **arguments: Any) -> Any:
        """Runs one command of the monitor."""

        async def talk() -> Any:
            async with await Qmp.connect(self.qmp_path) as qmp:
                return await qmp.execute(command, arguments or None)

        return asyncio.run(talk())

    def run_state(self) -> str:
        """As query-status names it."""
        state = self.ask("query-status")["status"]
        assert isinstance(state, str)
        return state

    def status(self) -> dict[str, Any]:
        """What the tool says of it."""
        return status_of(self.name)

    def registered_ranges(self) -> int:
        """Mappings of QEMU whose missing pages a userfaultfd answers for (proc(5): VmFlags um)."""
        text = Path(f"/proc/{self.pid}/smaps").read_text()
        flags = re.findall(r"^VmFlags:(.*)$", text, re.MULTILINE)
        return sum("um" in line.split() for line in flags)

    def wait_sidecar_gone(self) -> None:
        """Until the serving process has ended, by its own decision."""
        if self.sidecar is not None:
            assert ends_within(self.sidecar, PATIENCE), "the sidecar has not ended"

    def kill(self) -> None:
        """Ends QEMU and waits for that, and for its sidecar to notice."""
        if self.process is not None:
            self.process.kill()
        else:
            send(self.identity, signal.SIGKILL)
            assert ends_within(self.identity, PATIENCE)
        if self.sidecar is not None:
            # One that a test has stopped would never notice.
            send(self.sidecar, signal.SIGCONT)
            assert ends_within(self.sidecar, PATIENCE), "the sidecar outlives its guest"

    def close(self) -> None:
        """Ends it and lets go of it."""
        self.kill()
        if self.process is not None:
            self.process.close()
        self.identity.close()
        if self.sidecar is not None:
            self.sidecar.close()


def free_huge_bytes() -> int:
    """What a new guest can still get of the pool of 2 MiB pages."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free, promised = (
        int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages")
    )
    return (free - promised) * 2 * MIB


def ends_within(process: ProcessIdentity, seconds: float) -> bool:
    """Waits for the end of any process."""
    return bool(select.select([process.pidfd], [], [], seconds)[0])


def send(process: ProcessIdentity, number: signal.Signals) -> None:
    """Sends a signal to that very process, if it lives."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process.pidfd, number)


@dataclass(frozen=True)
class Snapshot:
    """An image, the QEMU that fits it, and the number of the last tick seen before it."""

    image: Path
    qemu: Path
    kind: MemoryKind
    ram_bytes: int
    last_tick: int

    def copy(self, target: Path) -> Snapshot:
        """One of its own for a test that damages it; holes stay holes."""
        subprocess.run(["cp", "-a", "--sparse=always", self.image, target], check=True)
        return Snapshot(target, self.qemu, self.kind, self.ram_bytes, self.last_tick)


async def launched_offering(argv: Sequence[str], directory: Path) -> QemuProcess:
    process, qmp = await launch_offering(argv, directory)
    await qmp.close()
    return process


class Lab:
    """Boots, snapshots and restores the guests of one test; ends them all afterwards."""

    def __init__(self, directory: Path, reserve_huge_pages: Callable[[int], None]) -> None:
        self.directory = directory
        self._reserve_huge_pages = reserve_huge_pages
        self._reserved_bytes = 0
        self._guests: list[Guest] = []
        self._memory_files: set[Path] = set()

    def memory(self, kind: MemoryKind, size_bytes: int, name: str = "m0") -> MemoryBackend:
        """A back-end of that kind; huge pages are reserved, a file is removed at the end."""
        if kind == "hugetlb":
            self.need_huge_pages(size_bytes)
        path = None
        if kind == "file":
            path = Path("/dev/shm", f"{self.directory.name}-{name}")
            self._memory_files.add(path)
        return MemoryBackend(
            kind,
            name,
            size_bytes,
            share=kind != "anonymous",
            path=str(path) if path else None,
        )

    def need_huge_pages(self, size_bytes: int) -> None:
        """Makes the pool large enough for one guest of this size at a time."""
        if size_bytes > self._reserved_bytes:
            self._reserve_huge_pages(size_bytes - self._reserved_bytes)
            self._reserved_bytes = size_bytes
        # Whoever else uses the pool (another test run) takes from the same pages.
        wait_until(lambda: free_huge_bytes() >= size_bytes, "free huge pages", 20)

    def launch(self, spec: VmSpec, name: str = "", *, offering: bool = False) -> Guest:
        """Starts QEMU and waits until its monitor answers.

        ``offering``: as a new guest of our own is started, with asynchronous page faults.
        """
        directory = self.directory / (name or f"q{len(self._guests)}")
        if offering:
            return self._started(asyncio.run(launched_offering(spec.argv(directory), directory)))
        process = launch(spec.argv(directory), directory)
        try:

            async def ready() -> None:
                await (await process.connect()).close()

            asyncio.run(ready())
        except BaseException:
            process.kill()
            process.close()
            raise
        return self._started(process)

    def _started(self, process: QemuProcess) -> Guest:
        directory = process.run_dir
        guest = Guest(process.pid, directory, directory.name)
        guest.process = process
        self._guests.append(guest)
        return guest

    def boot(
        self,
        guest_image: GuestImage,
        qemu: Path,
        kind: MemoryKind = "memfd",
        fill_mib: int = 64,
        *extra: str,
    ) -> Guest:
        """The memory checker, so far that it has verified for some ticks."""
        spec = VmSpec(
            str(qemu),
            memory=(self.memory(kind, guest_image.ram_mib(fill_mib) * MIB),),
            kernel=str(guest_image.kernel),
            initrd=str(guest_image.initramfs),
            append=guest_image.kernel_command_line(
                "check", fill_mib=fill_mib, zero_percent=10, tick_ms=TICK_MS
            ),
            extra_arguments=("-no-reboot", *extra),
        )
        guest = self.launch(spec)
        wait_until(lambda: guest.console.ready, "the guest has filled its memory", 240)
        guest.console.wait_more_ticks(5)
        return guest

    def waiting(self, snapshot: Snapshot, *extra: str, size_bytes: int = 0, **spec: Any) -> Guest:
        """A QEMU that somebody else started for an image of :meth:`SharedSnapshots.bare`."""
        return self.launch(
            VmSpec(
                str(spec.pop("binary", snapshot.qemu)),
                memory=(self.memory("memfd", size_bytes or snapshot.ram_bytes),),
                extra_arguments=(*INCOMING, *extra),
                **spec,
            )
        )

    def restore(self, snapshot: Snapshot, *options: object, name: str = "r") -> Guest:
        """By the tool, in the snapshot's own QEMU."""
        if snapshot.kind == "hugetlb":
            self.need_huge_pages(snapshot.ram_bytes)
        return self.follow(
            cli("restore", "--json", "--name", name, "--qemu", snapshot.qemu, *options,
                snapshot.image)
        )  # fmt: skip

    def attach(self, waiting: Guest, image: Path, *options: object, name: str = "a") -> Guest:
        """By the tool; the guest that comes back is the same QEMU with a sidecar."""
        guest = self.follow(
            cli("attach", "--json", "--name", name, *options, waiting.qmp_path, image)
        )
        guest.qmp_path = waiting.qmp_path
        guest.console = waiting.console
        return guest

    def follow(self, done: subprocess.CompletedProcess[str]) -> Guest:
        """The guest that a restore or attach with --json has reported."""
        result = json.loads(done.stdout)
        guest = Guest(
            result["pid"], Path(result["run_directory"]), result["name"], result["sidecar_pid"]
        )
        guest.result = result
        return self.adopt(guest)

    def adopt(self, guest: Guest) -> Guest:
        """Has it ended with the others."""
        self._guests.append(guest)
        return guest

    def close(self) -> None:
        """Ends every guest and sidecar."""
        for guest in reversed(self._guests):
            guest.close()
        for path in self._memory_files:
            path.unlink(missing_ok=True)


class SharedSnapshots:
    """Snapshots made at their first use and kept until the end of the run."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="qpcs-"))
        self._made: dict[tuple[object, ...], Snapshot] = {}

    def checker(
        self,
        lab: Lab,
        guest_image: GuestImage,
        qemu: Path,
        kind: MemoryKind = "memfd",
        fill_mib: int = 64,
    ) -> Snapshot:
        """Of a booted memory checker in the middle of its work."""
        key = (qemu, kind, fill_mib)
        if key not in self._made:
            guest = lab.boot(guest_image, qemu, kind, fill_mib)
            self._made[key] = take_snapshot(guest, self._path(), qemu, kind)
            guest.kill()
        return self._made[key]

    def bare(self, lab: Lab, qemu: Path, *extra: str, **spec_values: Any) -> Snapshot:
        """Of a machine with no guest in it yet, which takes no time; memfd, 64 MiB."""
        key = (qemu, extra, *sorted(spec_values.items()))
        if key not in self._made:
            spec = VmSpec(
                str(qemu),
                memory=(lab.memory("memfd", 64 * MIB),),
                extra_arguments=("-S", *extra),
                **spec_values,
            )
            machine = lab.launch(spec)
            self._made[key] = take_snapshot(machine, self._path(), qemu, "memfd")
            machine.kill()
        return self._made[key]

    def once(self, key: tuple[object, ...], make: Callable[[Path], Snapshot]) -> Snapshot:
        """Another kind, made by ``make`` in the place that it is given."""
        if key not in self._made:
            self._made[key] = make(self._path())
        return self._made[key]

    def _path(self) -> Path:
        return self.directory / f"{len(self._made)}.qpc"

    def close(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def shared_snapshots(config: pytest.Config) -> SharedSnapshots:
    """One for the whole run, whichever directory's tests ask first."""
    if SHARED not in config.stash:
        config.stash[SHARED] = SharedSnapshots()
        config.add_cleanup(config.stash[SHARED].close)
    return config.stash[SHARED]


def take_snapshot(
    guest: Guest, image: Path, qemu: Path, kind: MemoryKind, *options: object
) -> Snapshot:
    """By the tool; the guest stands still afterwards, so that its last tick is known."""
    result = json.loads(
        cli("snapshot", "--json", "--then", "stop", *options, guest.qmp_path, image).stdout
    )
    ticks = guest.console.ticks
    return Snapshot(image, qemu, kind, result["ram_bytes"], ticks[-1].number if ticks else 0)


def goes_on_from(guest: Guest, snapshot: Snapshot) -> None:
    """The first tick is the one that was due.

    The guest may have been stopped in the middle of a line: its first part is on the old console,
    its end on the new one, and the number on neither.
    """
    guest.console.wait_more_ticks(2)
    first = guest.console.ticks[0].number
    assert first in (snapshot.last_tick + 1, snapshot.last_tick + 2)
    numbers = [tick.number for tick in guest.console.ticks]
    assert numbers == list(range(first, first + len(numbers)))


def edit_manifest(image: Path, **changes: Any) -> None:
    """Replaces top-level entries of an image's manifest."""
    path = image / "manifest.json"
    document: Mapping[str, Any] = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def environment(run_base: Path) -> dict[str, str]:
    """That of a tool whose run directories lie there."""
    return {**os.environ, "QEMU_POSTCOPY_RUN_DIR": str(run_base)}
