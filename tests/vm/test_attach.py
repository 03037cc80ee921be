"""Taking a userfaultfd out of a real QEMU, which notices nothing."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qemu_postcopy._native import ffi, lib, new_error
from qemu_postcopy.errors import AttachError, PostcopyError, TargetGoneError
from qemu_postcopy.vm.attach import TakenDescriptor, take_userfaultfd, thread_order
from qemu_postcopy.vm.launch import QemuProcess, launch
from qemu_postcopy.vm.layout import RamBlock, read_layout
from qemu_postcopy.vm.process import ProcessIdentity, Thread
from qemu_postcopy.vm.spec import MemoryBackend, MemoryKind, VmSpec

if TYPE_CHECKING:
    from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("qemu", "uffd", "ptrace")

MIB = 1 << 20
NOBODY = 65534
INCOMING = ("-incoming", "defer", "-S")
Start = Callable[[VmSpec], QemuProcess]


@pytest.fixture
def start(run_dir: Path) -> Iterator[Start]:
    started: list[QemuProcess] = []

    def run(spec: VmSpec) -> QemuProcess:
        directory = run_dir / str(len(started))
        started.append(launch(spec.argv(directory), directory))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.close()


def backend(kind: MemoryKind, run_dir: Path, size_bytes: int = 64 * MIB) -> MemoryBackend:
    path = f"/dev/shm/{run_dir.name}" if kind == "file" else None
    return MemoryBackend(kind, "m0", size_bytes, share=kind != "anonymous", path=path)


def fill_first_page(taken: TakenDescriptor, block: RamBlock) -> None:
    """Registers the block and puts a page of 0x5a at its begin: the descriptor is QEMU's own."""
    error = new_error()
    wanted = ffi.new("uint64_t *")
    assert lib.qpc_uffd_features(wanted, error) == 0
    features = lib.qpc_uffd_wanted_features(wanted[0])
    assert lib.qpc_uffd_api(taken.descriptor, features, error) == 0
    mode = lib.qpc_uffd_register(taken.descriptor, block.address, block.size_bytes, error)
    assert mode > 0, ffi.string(error.message)
    page = mmap.mmap(-1, block.page_size_bytes)
    page[:] = b"\x5a" * block.page_size_bytes
    source = int(ffi.cast("uintptr_t", ffi.from_buffer(page)))
    copy = bytearray(struct.pack("QQQQq", block.address, source, block.page_size_bytes, 0, 0))
    fcntl.ioctl(taken.descriptor, 0xC028AA03, copy)  # UFFDIO_COPY


def memory_of(identity: ProcessIdentity, address: int, length: int) -> bytes:
    descriptor = os.open(f"/proc/{identity.pid}/mem", os.O_RDONLY)
    try:
        return os.pread(descriptor, length, address)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", ["memfd", "file", "hugetlb", "anonymous"])
def test_descriptor_controls_the_memory_of_qemu(
    kind: MemoryKind,
    qemu_binary: Path,
    run_dir: Path,
    start: Start,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "hugetlb":
        request.getfixturevalue("reserve_huge_pages")(64 * MIB)
    memory = backend(kind, run_dir)
    try:
        qemu = start(VmSpec(str(qemu_binary), memory=(memory,), extra_arguments=INCOMING))

        async def talk() -> None:
            async with await qemu.connect() as qmp:
                (block,) = await read_layout(qmp, qemu.identity)
                taken = take_userfaultfd(qemu.identity)
                try:
                    fill_first_page(taken, block)
                    found = memory_of(qemu.identity, block.address, block.page_size_bytes)
                    assert found == b"\x5a" * block.page_size_bytes
                    target = os.readlink(f"/proc/{qemu.pid}/fd/{taken.remote_descriptor}")  # noqa: PTH115
                    assert target == "anon_inode:[userfaultfd]"
                    assert await qmp.status() == "inmigrate"
                finally:
                    os.close(taken.descriptor)

        asyncio.run(talk())
    finally:
        if memory.path is not None:
            Path(memory.path).unlink(missing_ok=True)


def test_qemu_answers_through_200_attaches(qemu_binary: Path, run_dir: Path, start: Start) -> None:
    memory = backend("memfd", run_dir)
    qemu = start(VmSpec(str(qemu_binary), memory=(memory,), extra_arguments=INCOMING))

    async def talk() -> None:
        async with await qemu.connect() as qmp:
            stops = []
            for _ in range(200):
                attach = asyncio.create_task(asyncio.to_thread(take_userfaultfd, qemu.identity))
                while not attach.done():
                    assert await qmp.status() == "inmigrate"
                taken = await attach
                os.close(taken.descriptor)
                stops.append(taken.stop_ns)
            stops.sort()
            print(f"stopped: p50 {stops[100] / 1000:.0f} us, p99 {stops[198] / 1000:.0f} us")

    asyncio.run(talk())


@pytest.mark.needs("guest")
def test_running_guest_finds_no_bad_word_through_200_attaches(
    qemu_binary: Path, run_dir: Path, start: Start, guest_image: GuestImage
) -> None:
    """Each thread of QEMU in turn, the vCPU too, while the guest checks its own memory."""
    ram_bytes = guest_image.ram_mib(16) * MIB
    qemu = start(
        VmSpec(
            str(qemu_binary),
            memory=(backend("memfd", run_dir, ram_bytes),),
            kernel=str(guest_image.kernel),
            initrd=str(guest_image.initramfs),
            append=guest_image.kernel_command_line("check", fill_mib=16, tick_ms=10),
            extra_arguments=("-no-reboot",),
        )
    )
    console = qemu.run_dir / "console.log"

    async def wait_pass(number: int) -> None:
        """Until the guest has verified all of its memory so many times, by its own word."""
        while True:
            text = console.read_text(errors="replace") if console.exists() else ""
            assert "QPC BAD" not in text
            assert "QPC FAIL" not in text
            passes = [int(value) for value in re.findall(r"QPC tick=\d+ pass=(\d+)", text)]
            if passes and passes[-1] >= number:
                assert re.findall(r" bad=[1-9]", text) == []
                return
            assert qemu.poll() is None, qemu.output()
            await asyncio.sleep(0.02)

    async def talk() -> None:
        async with await qemu.connect() as qmp:
            await asyncio.wait_for(wait_pass(1), 120)
            for number in range(200):
                threads = qemu.identity.threads()
                tid = threads[number % len(threads)].tid
                injection, error = ffi.new("struct qpc_injection *"), new_error()
                result = lib.qpc_inject_userfaultfd(
                    qemu.pid, qemu.identity.pidfd, [tid], 1, 2000, 2000, -1, injection, error
                )
                # A worker thread may have ended since it was listed; then nothing happens.
                assert result == 0 or tid not in [t.tid for t in qemu.identity.threads()]
                assert await qmp.status() == "running"
            text = console.read_text(errors="replace")
            reached = int(re.findall(r"QPC tick=\d+ pass=(\d+)", text)[-1])
            await asyncio.wait_for(wait_pass(reached + 2), 120)

    asyncio.run(talk())


def test_stopped_guest_process_stays_stopped(
    qemu_binary: Path, run_dir: Path, start: Start
) -> None:
    qemu = start(
        VmSpec(str(qemu_binary), memory=(backend("memfd", run_dir),), extra_arguments=INCOMING)
    )

    def attach_while_stopped() -> None:
        os.kill(qemu.pid, signal.SIGSTOP)
        os.waitid(os.P_PIDFD, qemu.identity.pidfd, os.WSTOPPED)
        os.close(take_userfaultfd(qemu.identity).descriptor)
        state = Path(f"/proc/{qemu.pid}/stat").read_text().rpartition(") ")[2][0]
        os.kill(qemu.pid, signal.SIGCONT)
        assert state == "T"

    async def talk() -> None:
        async with await qemu.connect() as qmp:
            await asyncio.to_thread(attach_while_stopped)
            assert await qmp.status() == "inmigrate"

    asyncio.run(talk())


def test_dead_process_is_gone(qemu_binary: Path, run_dir: Path, start: Start) -> None:
    qemu = start(
        VmSpec(str(qemu_binary), memory=(backend("memfd", run_dir),), extra_arguments=INCOMING)
    )
    with ProcessIdentity.open(qemu.pid) as identity:
        qemu.kill()
        with pytest.raises(TargetGoneError, match="no process"):
            take_userfaultfd(identity)
    with pytest.raises(TargetGoneError):
        ProcessIdentity.open(qemu.pid)


def test_reused_pid_is_gone(qemu_binary: Path, run_dir: Path, start: Start) -> None:
    """The PID is alive, but the pidfd, or the start time noted earlier, is another process's."""
    spec = VmSpec(str(qemu_binary), memory=(backend("memfd", run_dir),), extra_arguments=INCOMING)
    old, new = start(spec), start(spec)
    noted = old.identity.start_time
    with pytest.raises(TargetGoneError, match="belongs to another process now"):
        ProcessIdentity.open(new.pid, start_time=noted - 1)
    mixed = ProcessIdentity(new.pid, noted, os.dup(old.identity.pidfd))
    old.kill()
    with mixed, pytest.raises(TargetGoneError):
        take_userfaultfd(mixed)
    assert new.poll() is None


def test_process_that_is_no_qemu_is_refused() -> None:
    sleeper = subprocess.Popen([shutil.which("sleep") or "sleep", "60"])
    try:
        with (
            ProcessIdentity.open(sleeper.pid) as identity,
            pytest.raises(AttachError, match="is no QEMU: it runs 'sleep'"),
        ):
            take_userfaultfd(identity)
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.needs("root")
def test_missing_right_is_named_and_qemu_runs_on(
    qemu_binary: Path, run_dir: Path, start: Start
) -> None:
    """As nobody: the reason and what to do, and no change."""
    qemu = start(
        VmSpec(str(qemu_binary), memory=(backend("memfd", run_dir),), extra_arguments=INCOMING)
    )

    async def talk() -> None:
        async with await qemu.connect() as qmp:
            failure = in_child(lambda: take_userfaultfd(qemu.identity), NOBODY)
            assert failure.startswith("AttachError: no right to look at process")
            assert "Run as root, or as the user that QEMU runs as" in failure
            assert await qmp.status() == "inmigrate"

    asyncio.run(talk())


def in_child(body: Callable[[], object], user_id: int = 0) -> str:
    """Runs it in a forked child of that user; returns how it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if user_id:
                os.setgid(user_id)
                os.setuid(user_id)
            body()
            text = "no failure"
        except PostcopyError as failure:
            text = f"{type(failure).__name__}: {failure}"
        except BaseException as failure:  # noqa: BLE001  reported by the parent
            text = f"unexpected {failure!r}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return text


def test_dropped_capability_is_gone_and_the_descriptor_still_works(
    qemu_binary: Path, run_dir: Path, start: Start
) -> None:
    """Attach, layout, drop, register and fill: the order in which the restore does it."""
    qemu = start(
        VmSpec(str(qemu_binary), memory=(backend("memfd", run_dir),), extra_arguments=INCOMING)
    )

    async def look() -> RamBlock:
        async with await qemu.connect() as qmp:
            return (await read_layout(qmp, qemu.identity))[0]

    block = asyncio.run(look())

    def attach_and_fill() -> None:
        taken = take_userfaultfd(qemu.identity)
        lib.qpc_capability_drop_ptrace(new_error())
        fill_first_page(taken, block)
        status = Path("/proc/self/status").read_text()
        held = int(re.findall(r"CapEff:\s*(\w+)", status)[0], 16)
        assert held >> 19 & 1 == 0, "CAP_SYS_PTRACE is still there"

    assert in_child(attach_and_fill) == "no failure"
    assert memory_of(qemu.identity, block.address, 4) == b"\x5a" * 4


def test_helpers_come_before_the_main_thread_and_vcpus_last() -> None:
    named = [
        Thread(10, "qemu-system-x86"),
        Thread(11, "call_rcu"),
        Thread(12, "CPU 0/KVM"),
        Thread(13, "IO mon_iothread"),
        Thread(14, "vnc"),
    ]
    assert thread_order(named, 10) == [11, 13, 10, 14, 12]
    unnamed = [Thread(tid, "qemu-system-x86") for tid in (13, 12, 11, 10)]
    assert thread_order(unnamed, 10) == [11, 10, 12, 13]


def test_start_time_names_a_process_for_good() -> None:
    with ProcessIdentity.open(os.getpid()) as identity:
        assert identity.cmdline()[0] == sys.orig_argv[0]
        with ProcessIdentity.open(os.getpid(), identity.start_time) as again:
            assert again.start_time == identity.start_time
