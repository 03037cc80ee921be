"""The test guest in a real QEMU: it boots, keeps its rate, and finds every kind of wrong page."""

from __future__ import annotations

import itertools
import mmap
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_postcopy.images.console import Bad, ConsoleParser, Failure, Ready, Record, Tick, Walk
from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("qemu", "guest")

PAGE_BYTES = 4096
WORD_STEP = 0x9E3779B97F4A7C15  # guest/pattern.h
#: a loaded machine boots the guest in 10 s; this only ends a test that would hang
LIMIT_SECONDS = 120.0


class Guest:
    """One QEMU with the test guest; its RAM is a file that the test may read and spoil."""

    def __init__(self, binary: Path, image: GuestImage, append: str, ram_mib: int, where: Path):
        self.ram_path = where / "ram"
        self.console_path = where / "console"
        backend = f"memory-backend-file,id=m0,share=on,mem-path={self.ram_path},size={ram_mib}M"
        command = [
            *(str(binary), "-accel", "tcg", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-m", str(ram_mib), "-object", backend, "-machine", "pc,memory-backend=m0"),
            *("-serial", "stdio", "-kernel", str(image.kernel), "-initrd", str(image.initramfs)),
            *("-append", append),
        ]
        with (where / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0
            )
        self.records: list[Record] = []
        self._parser = ConsoleParser()

    def read(self, deadline: float) -> list[Record] | None:
        """The records of the next piece of output; None at its end."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], deadline - time.monotonic())[0]:
            raise TimeoutError(f"silent, or not what was waited for: {self.records[-5:]}")
        data = os.read(self.process.stdout.fileno(), 65536)
        with self.console_path.open("ab") as console:
            console.write(data)
        if not data:
            return None
        records = self._parser.feed(data)
        self.records += records
        return records

    def wait_for(self, wanted: Callable[[Record], bool]) -> Record:
        """The first record from now on that is wanted."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while (records := self.read(deadline)) is not None:
            for record in records:
                if wanted(record):
                    return record
        raise EOFError(f"QEMU ended: {self.process.wait()}, {self.records[-5:]}")

    def wait_ready(self) -> Ready:
        ready = self.wait_for(lambda record: isinstance(record, Ready | Failure))
        assert isinstance(ready, Ready), ready
        return ready

    def wait_passes(self, count: int) -> Tick:
        """A report at or after the end of `count` passes more than now."""
        now = self.wait_for(lambda record: isinstance(record, Tick))
        assert isinstance(now, Tick)
        goal = now.passes + count
        later = self.wait_for(lambda record: isinstance(record, Tick) and record.passes >= goal)
        assert isinstance(later, Tick)
        return later

    def wait_end(self) -> int:
        deadline = time.monotonic() + LIMIT_SECONDS
        while self.read(deadline) is not None:
            pass
        return self.process.wait(LIMIT_SECONDS)

    def console_bytes(self) -> bytes:
        return self.console_path.read_bytes() if self.console_path.exists() else b""

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Boot = Callable[..., Guest]


@pytest.fixture
def boot(qemu_binary: Path, guest_image: GuestImage, run_dir: Path) -> Iterator[Boot]:
    guests = []

    def boot_guest(append: str, ram_mib: int = 192) -> Guest:
        guests.append(Guest(qemu_binary, guest_image, append, ram_mib, run_dir))
        return guests[-1]

    yield boot_guest
    for guest in guests:
        guest.close()


def mix(value: int) -> int:
    """As guest/pattern.h has it."""
    value ^= value >> 30
    value = value * 0xBF58476D1CE4E5B9 % 2**64
    value ^= value >> 27
    value = value * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def page_seed(index: int, generation: int) -> int:
    """The first word of a page, zero pages aside."""
    return mix((mix(index + 1) + generation * 0xD6E8FEB86659FD93) % 2**64)


def pattern_pages(ram: mmap.mmap) -> dict[int, list[int]]:
    """Offsets in bytes of the pages of RAM that hold the pattern, zero pages aside, by their first
    word: where the guest's kernel has moved a page, its old place may still hold it."""
    found: dict[int, list[int]] = {}
    for offset in range(0, len(ram), PAGE_BYTES):
        first, second, third = memoryview(ram[offset : offset + 24]).cast("Q")
        step = (second - first) % 2**64
        if step == WORD_STEP and (third - second) % 2**64 == WORD_STEP:
            found.setdefault(first, []).append(offset)
    return found


def test_memory_is_filled_verified_and_rewritten(boot: Boot, guest_image: GuestImage) -> None:
    append = guest_image.kernel_command_line("check", fill_mib=64, zero_percent=20)
    guest = boot(append, guest_image.ram_mib(64))
    ready = guest.wait_ready()
    assert (ready.fill_mib, ready.pages) == (64, 64 * 256)
    assert 0.18 < ready.zero_pages / ready.pages < 0.22
    last = guest.wait_passes(20)
    assert last.bad_words == 0 and last.generation == last.passes
    assert last.pages >= 20 * ready.pages
    ticks = [record for record in guest.records if isinstance(record, Tick)]
    assert [tick.number for tick in ticks] == list(range(1, len(ticks) + 1))
    assert len({tick.passes for tick in ticks}) >= 20, "each pass end is reported"


def test_ticks_come_at_the_interval_asked_for(boot: Boot, guest_image: GuestImage) -> None:
    guest = boot(guest_image.kernel_command_line("idle", tick_ms=10), 128)
    guest.wait_ready()
    guest.wait_for(lambda record: isinstance(record, Tick) and record.number == 101)
    ticks = [record for record in guest.records if isinstance(record, Tick)][:101]
    # guest time: late ticks are skipped over, never caught up, so it can only be longer
    assert ticks[100].time_ms - ticks[0].time_ms >= 990
    gaps = sorted(b.time_ms - a.time_ms for a, b in itertools.pairwise(ticks))
    assert 9 <= gaps[50] <= 15, "the median; a starved host delays single ones"


@pytest.mark.parametrize("kind", ["zeroed", "shifted", "swapped", "one word"])
def test_each_kind_of_wrong_page_is_found(boot: Boot, guest_image: GuestImage, kind: str) -> None:
    append = guest_image.kernel_command_line("check", fill_mib=16, rewrite=False)
    guest = boot(append, 128)
    guest.wait_ready()
    with guest.ram_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
        pages = pattern_pages(ram)
        # What the guest is filled with at first, and of that what lies in one place only.
        places = [pages[page_seed(index, generation=0)] for index in range(16 * 256)]
        offsets = [place[0] for place in places if len(place) == 1]
        assert len(offsets) > 2000
        here, there = slice(offsets[7], offsets[7] + PAGE_BYTES), offsets[2000]
        wrong_words = 512
        match kind:
            case "zeroed":
                ram[here] = bytes(PAGE_BYTES)
            case "shifted":
                ram[here] = ram[offsets[7] + 8 : offsets[7] + PAGE_BYTES] + ram[here][:8]
            case "swapped":
                other = slice(there, there + PAGE_BYTES)
                ram[here], ram[other] = ram[other], ram[here]
                wrong_words = 1024
            case "one word":
                ram[offsets[7] + 4088] ^= 1
                wrong_words = 1
    found = guest.wait_for(lambda record: isinstance(record, Bad))
    assert isinstance(found, Bad) and found.want != found.got
    # nothing heals without rewriting: each whole pass finds the same number of words again
    passes = guest.wait_passes(2)
    later = guest.wait_passes(4)
    assert (later.bad_words - passes.bad_words) % wrong_words == 0
    assert later.bad_words > passes.bad_words


def test_a_page_of_an_older_generation_is_found(boot: Boot, guest_image: GuestImage) -> None:
    append = guest_image.kernel_command_line("check", fill_mib=16, zero_percent=20)
    guest = boot(append, 128)
    guest.wait_ready()
    with guest.ram_path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as ram:
        # Over all of memory: some may be what the guest's kernel left behind where it moved a page.
        offsets = [offset for places in pattern_pages(ram).values() for offset in places][::16]
        older = {offset: ram[offset : offset + PAGE_BYTES] for offset in offsets}
        assert guest.wait_passes(2).bad_words == 0
        for offset, page in older.items():
            ram[offset : offset + PAGE_BYTES] = page
    found = guest.wait_for(lambda record: isinstance(record, Bad))
    assert isinstance(found, Bad) and found.generation >= 2
    healed = guest.wait_passes(2)
    assert healed.bad_words > 0
    assert guest.wait_passes(2).bad_words == healed.bad_words, "rewriting heals"


@pytest.mark.parametrize("walk", ["sequential", "random", "stride:7"])
def test_every_walk_visits_each_page_once_in_a_pass(
    boot: Boot, guest_image: GuestImage, walk: str
) -> None:
    # Each visit rewrites: a page visited twice or left out in a pass is of a wrong generation.
    append = guest_image.kernel_command_line("walk", fill_mib=5, walk=walk, rewrite=True)
    guest = boot(append, 128)
    guest.wait_ready()
    last = guest.wait_passes(10)
    assert last.bad_words == 0
    at_pass_end = [r for r in guest.records if isinstance(r, Walk) and r.pages % (5 * 256) == 0]
    assert any(record.pages == record.passes * 5 * 256 for record in at_pass_end)


def test_a_walk_keeps_its_rate(boot: Boot, guest_image: GuestImage) -> None:
    append = guest_image.kernel_command_line(
        "walk", fill_mib=16, walk="random", pages_per_second=2000
    )
    guest = boot(append, 128)
    guest.wait_ready()
    guest.wait_for(lambda record: isinstance(record, Walk) and record.pages >= 4000)
    first, *_, last = [record for record in guest.records if isinstance(record, Walk)]
    assert isinstance(first, Walk) and isinstance(last, Walk)
    rate = (last.pages - first.pages) * 1000 / (last.time_ms - first.time_ms)
    # up to 100 ms are caught up after a delay (LATE_LIMIT_NS), of about two seconds
    assert rate < 2200, "never faster; on a starved host it may be slower"
    assert sum(r.touched_pages for r in guest.records if isinstance(r, Walk)) == last.pages


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("qpc.mode=check qpc.fill=many", "qpc.fill=many"),
        ("qpc.mode=walk qpc.walk=stride:0", "qpc.walk=stride:0"),
        ("qpc.mode=dance", "qpc.mode=dance"),
    ],
)
def test_a_wrong_option_is_named_and_ends_qemu(
    boot: Boot, guest_image: GuestImage, words: str, reason: str
) -> None:
    guest = boot(guest_image.kernel_command_line("idle", extra=words), 128)
    assert guest.wait_end() == 0
    failures = [record.reason for record in guest.records if isinstance(record, Failure)]
    assert reason in failures[0]


def test_more_memory_than_the_guest_has_ends_qemu(boot: Boot, guest_image: GuestImage) -> None:
    guest = boot(guest_image.kernel_command_line("check", fill_mib=500), 128)
    assert guest.wait_end() == 0
    assert any(isinstance(record, Failure) for record in guest.records)


def test_the_shell_answers_and_ends_the_guest(boot: Boot, guest_image: GuestImage) -> None:
    guest = boot(guest_image.kernel_command_line("shell"), 128)
    deadline = time.monotonic() + LIMIT_SECONDS
    while b"QPC shell ready" not in guest.console_bytes():
        assert guest.read(deadline) is not None
    guest.send("echo $((6 * 7))-done; poweroff -f\n")
    assert guest.wait_end() == 0
    assert b"42-done" in guest.console_bytes()
