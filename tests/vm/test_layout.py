"""Where guest memory lies in a real QEMU, and emptying it."""

from __future__ import annotations

import asyncio
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_postcopy.errors import AttachError
from qemu_postcopy.vm.emptiness import Emptied, ensure_empty, require_empty
from qemu_postcopy.vm.launch import QemuProcess, launch
from qemu_postcopy.vm.layout import RamBlock, read_layout
from qemu_postcopy.vm.spec import MemoryBackend, MemoryKind, VmSpec

pytestmark = pytest.mark.needs("qemu", "root")

MIB = 1 << 20
GIB = 1 << 30
Look = Callable[..., list[RamBlock]]


class Guest:
    """A QEMU that waits in -incoming defer, and its layout."""

    def __init__(self, process: QemuProcess, blocks: list[RamBlock]) -> None:
        self.process = process
        self.blocks = blocks

    def empty(self) -> list[Emptied]:
        return [ensure_empty(block, self.process.identity) for block in self.blocks]


Start = Callable[..., Guest]


@pytest.fixture
def start(qemu_binary: Path, run_dir: Path) -> Iterator[Start]:
    started: list[QemuProcess] = []

    def run(*memory: MemoryBackend, extra: tuple[str, ...] = ()) -> Guest:
        directory = run_dir / str(len(started))
        arguments = ("-incoming", "defer", "-S", *extra)
        spec = VmSpec(str(qemu_binary), memory=memory, extra_arguments=arguments)
        process = launch(spec.argv(directory), directory)
        started.append(process)

        async def look() -> list[RamBlock]:
            async with await process.connect() as qmp:
                return await read_layout(qmp, process.identity)

        return Guest(process, asyncio.run(look()))

    yield run
    for process in started:
        process.kill()
        process.close()


@pytest.fixture
def memory_file() -> Iterator[Path]:
    path = Path(f"/dev/shm/qpc-layout-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def write_through_file(block: RamBlock, offset_bytes: int, data: bytes) -> None:
    assert block.file_path is not None
    descriptor = os.open(block.file_path, os.O_RDWR)
    try:
        os.pwrite(descriptor, data, block.file_offset_bytes + offset_bytes)
    finally:
        os.close(descriptor)


def read_from_qemu(guest: Guest, address: int, length: int) -> bytes:
    descriptor = os.open(f"/proc/{guest.process.pid}/mem", os.O_RDONLY)
    try:
        return os.pread(descriptor, length, address)
    finally:
        os.close(descriptor)


def test_memory_above_the_pci_hole_is_found_at_one_address(start: Start) -> None:
    """4 GiB lie in three parts of the guest's address space; a word at the end proves the place."""
    guest = start(MemoryBackend("memfd", "m0", 4 * GIB))
    (block,) = guest.blocks
    assert (block.name, block.size_bytes, block.page_size_bytes) == ("m0", 4 * GIB, 4096)
    assert (block.backing, block.shared, block.file_offset_bytes) == ("memfd", True, 0)
    write_through_file(block, 4 * GIB - 8, b"the end.")
    assert read_from_qemu(guest, block.address + 4 * GIB - 8, 8) == b"the end."


def test_numa_guest_has_a_block_for_each_node(start: Start) -> None:
    guest = start(
        MemoryBackend("memfd", "left", 64 * MIB), MemoryBackend("memfd", "right", 32 * MIB)
    )
    assert [(block.name, block.size_bytes) for block in guest.blocks] == [
        ("left", 64 * MIB),
        ("right", 32 * MIB),
    ]
    for block in guest.blocks:
        write_through_file(block, 0, block.name.encode())
        found = read_from_qemu(guest, block.address, len(block.name))
        assert found == block.name.encode()


def test_memory_without_a_backend_of_its_own_is_found(qemu_binary: Path, run_dir: Path) -> None:
    """`-m` alone: QEMU makes the back-end pc.ram."""
    argv = [str(qemu_binary), "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]
    process = launch([*argv, "-incoming", "defer", "-S"], run_dir / "q")

    async def look() -> list[RamBlock]:
        async with await process.connect() as qmp:
            return await read_layout(qmp, process.identity)

    try:
        (block,) = asyncio.run(look())
        assert (block.name, block.size_bytes, block.backing) == ("pc.ram", 64 * MIB, "anonymous")
    finally:
        process.kill()
        process.close()


@pytest.mark.parametrize("kind", ["memfd", "file", "hugetlb"])
def test_prefilled_memory_is_emptied(
    kind: MemoryKind, start: Start, memory_file: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "hugetlb":
        request.getfixturevalue("reserve_huge_pages")(64 * MIB)
    path = str(memory_file) if kind == "file" else None
    guest = start(MemoryBackend(kind, "m0", 64 * MIB, path=path, prealloc=True))
    assert guest.blocks[0].backing == kind
    assert guest.empty() == [Emptied("m0", 64 * MIB)]
    assert guest.empty() == [Emptied("m0", 0)]


@pytest.mark.parametrize("kind", ["memfd", "file", "hugetlb", "anonymous"])
def test_fresh_memory_is_empty_already(
    kind: MemoryKind, start: Start, memory_file: Path, request: pytest.FixtureRequest
) -> None:
    if kind == "hugetlb":
        request.getfixturevalue("reserve_huge_pages")(64 * MIB)
    path = str(memory_file) if kind == "file" else None
    guest = start(MemoryBackend(kind, "m0", 64 * MIB, share=kind != "anonymous", path=path))
    assert guest.blocks[0].backing == kind
    assert guest.empty() == [Emptied("m0", 0)]


def test_what_an_earlier_guest_left_in_the_file_is_removed(start: Start, memory_file: Path) -> None:
    memory_file.write_bytes(b"old guest" * 1000)
    os.truncate(memory_file, 64 * MIB)
    guest = start(MemoryBackend("file", "m0", 64 * MIB, path=str(memory_file)))
    assert guest.empty()[0].removed_bytes > 0
    assert read_from_qemu(guest, guest.blocks[0].address, 9) == bytes(9)


def test_shared_memory_without_a_descriptor_is_emptied(start: Start) -> None:
    guest = start(MemoryBackend("anonymous", "m0", 64 * MIB, share=True, prealloc=True))
    assert guest.blocks[0].backing == "memfd"
    assert guest.empty() == [Emptied("m0", 64 * MIB)]


@pytest.mark.parametrize("lock", [False, True], ids=["unlocked", "mem-lock"])
@pytest.mark.parametrize("kind", ["memfd", "file", "hugetlb", "anonymous"])
def test_prefilled_private_memory_is_emptied_by_qemu_itself(
    kind: MemoryKind,
    lock: bool,
    start: Start,
    memory_file: Path,
    request: pytest.FixtureRequest,
) -> None:
    """All of QEMU's own pages go, and those of a memfd below them; a file's are not ours."""
    if kind == "hugetlb":
        request.getfixturevalue("reserve_huge_pages")(64 * MIB)
    path = str(memory_file) if kind == "file" else None
    extra = ("-overcommit", "mem-lock=on") if lock else ()
    memory = MemoryBackend(kind, "m0", 64 * MIB, share=False, path=path, prealloc=not lock)
    guest = start(memory, extra=extra)
    (block,) = guest.blocks
    assert (block.backing, block.shared) == (kind, False)
    if kind == "file":
        with pytest.raises(AttachError, match="show through"):
            guest.empty()
        return
    with pytest.raises(AttachError, match=r"written to|again and again"):
        require_empty(block, guest.process.identity)
    assert guest.empty()[0].removed_bytes >= 64 * MIB
    assert guest.empty() == [Emptied("m0", 0)]
    require_empty(block, guest.process.identity)


def test_pages_that_fallocate_made_are_removed(start: Start, memory_file: Path) -> None:
    """lseek(2) calls them a hole, and yet no fault would come for them."""
    with memory_file.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)
    guest = start(MemoryBackend("file", "m0", 64 * MIB, path=str(memory_file)))
    assert guest.empty() == [Emptied("m0", 64 * MIB)]
    assert memory_file.stat().st_blocks == 0


def test_two_backends_in_one_part_of_a_file_are_refused(start: Start, memory_file: Path) -> None:
    same = [MemoryBackend("file", name, 32 * MIB, path=str(memory_file)) for name in ("a", "b")]
    with pytest.raises(AttachError, match="a second time"):
        start(*same)


def test_file_that_another_process_maps_is_left_alone(start: Start, memory_file: Path) -> None:
    """As if the old guest still ran: it is named, and its memory stays as it is."""
    memory_file.write_bytes(b"alive" + bytes(64 * MIB - 5))
    program = (
        "import mmap, sys\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "memory = mmap.mmap(file.fileno(), 0)\n"
        "print('mapped', flush=True)\n"
        "sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(memory_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"mapped\n"
        guest = start(MemoryBackend("file", "m0", 64 * MIB, path=str(memory_file)))
        with pytest.raises(AttachError, match=rf"another process too: .*PID {other.pid}\)"):
            guest.empty()
        assert memory_file.read_bytes()[:5] == b"alive"
    finally:
        other.communicate()
    assert guest.empty()[0].removed_bytes > 0


@pytest.mark.parametrize("fill", ["data", "fallocate"])
def test_private_mapping_of_a_file_with_data_is_refused(
    fill: str, start: Start, memory_file: Path
) -> None:
    with memory_file.open("wb") as file:
        if fill == "data":
            file.write(b"template")
        else:
            os.posix_fallocate(file.fileno(), 0, 4096)
    memory = MemoryBackend("file", "m0", 64 * MIB, share=False, path=str(memory_file))
    os.truncate(memory_file, 64 * MIB)
    guest = start(memory)
    with pytest.raises(AttachError, match="show through"):
        guest.empty()
    assert memory_file.stat().st_blocks


@pytest.mark.needs("disk")
def test_memory_on_a_disk_file_system_is_refused(start: Start, run_dir: Path) -> None:
    with pytest.raises(AttachError, match="only memory on tmpfs"):
        start(MemoryBackend("file", "m0", 64 * MIB, path=str(run_dir / "ram")))


def test_backend_that_no_device_uses_is_none_of_the_guest(start: Start) -> None:
    """A QEMU migrates nothing of it either: its block has no name until a device takes it."""
    extra = ("-object", "memory-backend-memfd,id=spare,size=16M")
    guest = start(MemoryBackend("memfd", "m0", 64 * MIB), extra=extra)
    assert [block.name for block in guest.blocks] == ["m0"]


def test_page_size_is_that_of_the_backend(
    start: Start, reserve_huge_pages: Callable[[int], None]
) -> None:
    reserve_huge_pages(64 * MIB)
    guest = start(MemoryBackend("hugetlb", "m0", 64 * MIB))
    assert guest.blocks[0].page_size_bytes == 2 * MIB
    assert guest.blocks[0].address % (2 * MIB) == 0
    assert mmap.PAGESIZE < 2 * MIB
