"""Where its blocks lie a QEMU shows by the faults of what it is given; real faults, played QEMU."""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from qemu_postcopy.errors import AttachError, ImageError, TargetGoneError
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.manifest import Block
from qemu_postcopy.image.records import (
    MAGIC,
    BlockHeader,
    Configuration,
    SectionHeader,
    SectionType,
    pack_block_list,
    pack_end_of_records,
    pack_name,
)
from qemu_postcopy.libvirt import places
from qemu_postcopy.libvirt.places import StreamBegin, ask_places, in_question, read_begin
from qemu_postcopy.paging.source import FileSource
from qemu_postcopy.region import PAGE_BYTES, Region
from qemu_postcopy.userfaultfd import Userfaultfd
from qemu_postcopy.vm.preload import MappedRam
from qemu_postcopy.vm.process import ProcessIdentity

pytestmark = pytest.mark.needs("uffd")

SIZE = 64 * PAGE_BYTES
NAMES = ("ram-node0", "ram-node1", "ram-node2")
RAM = SectionHeader(SectionType.START, 2, "ram", 0, 4)
BEGIN = StreamBegin(0, RAM, True, PAGE_BYTES)


def first_page(number: int) -> bytes:
    return bytes([number + 1]) * PAGE_BYTES


class Asked:
    """Regions of one size under one userfaultfd, and a thread that writes into them what it is
    given: for each page of the block NAMES[i] into region `order[i]`."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.userfaultfd = stack.enter_context(Userfaultfd.open())
        self.regions = [stack.enter_context(Region.memfd(SIZE)) for _ in NAMES]
        self.pieces = [
            MappedRam(region.address, SIZE, True, region.descriptor, 0) for region in self.regions
        ]
        for region in self.regions:
            self.userfaultfd.register(region.address, SIZE)
        self.identity = stack.enter_context(ProcessIdentity.open(os.getpid()))
        self.order = list(range(len(NAMES)))
        self.offset = 0
        self.threads: list[threading.Thread] = []
        for number, name in enumerate(NAMES):
            (directory / name).write_bytes(first_page(number) * (SIZE // PAGE_BYTES))
        self.image = cast(
            Image,
            SimpleNamespace(
                open_source=lambda name, _: (
                    FileSource(os.open(directory / name, os.O_RDONLY)),
                    0,
                    bytearray(b"\xff"),
                )
            ),
        )

    def give(self, data: bytes) -> None:
        head = RAM.pack(SectionType.PART) + struct.pack(">Q", 8)
        assert data.startswith(head)
        number = next(n for n, name in enumerate(NAMES) if pack_name(name) in data[len(head) :])
        at = len(head) + len(pack_name(NAMES[number]))
        page = data[at : at + PAGE_BYTES]
        assert data[at + PAGE_BYTES :] == pack_end_of_records() + RAM.pack_footer()
        region = self.regions[self.order[number]]
        # A write by C without the GIL, as it would wait for the other thread.
        self.threads.append(threading.Thread(target=region.write, args=(self.offset, page)))
        self.threads[-1].start()

    def ask(self) -> dict[str, int]:
        blocks = [cast(Block, SimpleNamespace(name=name, size_bytes=SIZE)) for name in NAMES]
        return ask_places(
            self.image, blocks, BEGIN, self.give, self.userfaultfd.fileno(), self.pieces,
            self.identity,
        )  # fmt: skip


@pytest.fixture
def asked(run_dir: Path) -> Iterator[Asked]:
    with ExitStack() as stack:
        made = Asked(run_dir, stack)
        yield made
        for region in made.regions:
            made.userfaultfd.unregister(region.address, SIZE)  # wakes who waits
        for thread in made.threads:
            thread.join(30)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_every_block_is_where_its_first_page_is_written(asked: Asked, order: list[int]) -> None:
    asked.order = order
    assert asked.ask() == {
        name: asked.regions[region].address for name, region in zip(NAMES, order, strict=True)
    }
    for number, region in enumerate(order):
        asked.threads[number].join(30)
        assert asked.regions[region].read(0, PAGE_BYTES) == first_page(number)


def test_a_page_that_is_not_written_to_missing_memory_ends_it(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "ANSWER_SECONDS", 0.5)
    asked.order = [1, 1, 0]  # the second is written where the first is there already
    with pytest.raises(AttachError, match="does not write"):
        asked.ask()


def test_a_page_that_is_written_inside_of_a_block_ends_it(asked: Asked) -> None:
    asked.offset = 8 * PAGE_BYTES
    with pytest.raises(AttachError, match="where no memory of that size begins"):
        asked.ask()


def test_a_qemu_that_has_ended_is_not_waited_for(asked: Asked) -> None:
    process = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    identity = ProcessIdentity.open(process.pid)
    process.communicate()
    asked.identity.close()
    asked.identity = identity
    asked.give = lambda data: None  # type: ignore[method-assign]
    with pytest.raises(TargetGoneError):
        asked.ask()


def state_of(blocks: list[BlockHeader], *, first: bytes = b"", footer: bool = True) -> int:
    descriptor = os.memfd_create("state")
    head = MAGIC + struct.pack(">I", 3) + Configuration("pc-i440fx-7.2").pack() + first
    section = RAM.pack() + pack_block_list(blocks) + pack_end_of_records()
    section += RAM.pack_footer() if footer else b""
    os.write(descriptor, head + section + b"\x03rest")
    return descriptor


@pytest.mark.parametrize("footer", [True, False])
def test_the_stream_is_given_up_to_the_end_of_the_list_of_blocks(footer: bool) -> None:
    state = state_of([BlockHeader("a", 1 << 24), BlockHeader("b", 1 << 24)], footer=footer)
    begin = read_begin(state)
    assert os.pread(state, 5, begin.size_bytes) == b"\x03rest"
    assert (begin.ram, begin.has_footer, begin.page_size_bytes) == (RAM, footer, 4096)
    os.close(state)


def test_a_device_before_the_list_of_blocks_is_not_passed_over() -> None:
    early = SectionHeader(SectionType.FULL, 1, "early", 0, 1).pack()
    state = state_of([BlockHeader("a", 1 << 24)], first=early)
    with pytest.raises(ImageError, match="before the list"):
        read_begin(state)
    os.close(state)


def test_only_blocks_whose_sizes_come_twice_are_in_question() -> None:
    blocks = [
        cast(Block, SimpleNamespace(name=name, size_bytes=size))
        for name, size in (("a", 1), ("b", 2), ("c", 1))
    ]
    assert [block.name for block in in_question(blocks, [1, 2, 1])] == ["a", "c"]
    assert in_question(blocks, [1, 2]) == []
