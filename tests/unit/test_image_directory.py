"""Images on disk: whole or not there, cheap to open, and every alteration found."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qemu_postcopy._native import check, lib, new_error
from qemu_postcopy.errors import HostError, ImageError, UsageError
from qemu_postcopy.image import page_data
from qemu_postcopy.image.commands import image_commands
from qemu_postcopy.image.convert import export
from qemu_postcopy.image.device_state import open_device_state
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.memory_file import MemoryFile
from qemu_postcopy.image.page_data import SEGMENT_BYTES
from qemu_postcopy.image.stream import BlockSummary, StreamSummary
from qemu_postcopy.image.writer import ImageWriter, find_leftovers

RAM = SEGMENT_BYTES * 2 + (4 << 20)
PAGE = 4096


def fill(directory: Path, ram: bytes | None = None) -> StreamSummary:
    """What demultiplex leaves behind, with a block of two and a bit segments."""
    (directory / "ram").mkdir()
    (directory / "state.bin").write_bytes(b"QEVL\0\0\0\3 and the rest" * 100)
    with (directory / "ram/m0").open("wb") as file:
        file.truncate(RAM)
        content = random.Random(5)
        for page in (0, 2, 3, SEGMENT_BYTES // PAGE - 1, SEGMENT_BYTES // PAGE, RAM // PAGE - 1):
            file.seek(page * PAGE)
            file.write(content.randbytes(PAGE))
    block = BlockSummary("m0", RAM, True, 6, RAM // PAGE - 6, 6, None, "ram/m0")
    return StreamSummary("plain", False, "pc-i440fx-7.2", PAGE, (), (block,), (), (), 0)


def make(path: Path, **values: Any) -> Image:
    with ImageWriter(path) as writer:
        summary = fill(writer.directory)
        return writer.finish(summary, architecture="x86_64", source="a test", **values)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make(tmp_path / "image", qemu_version="7.2.22", launch={"argv": ["qemu"]})


def test_image_opens_with_what_it_was_made_with(image: Image) -> None:
    opened = Image.open(image.path)
    assert opened.manifest == image.manifest
    assert opened.manifest.launch == {"argv": ["qemu"]}
    assert opened.manifest.block("m0").data_bytes == 6 * PAGE
    opened.verify()
    fd, offset = opened.open_block("m0")
    assert (os.fstat(fd).st_size, offset) == (RAM, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)


def test_verify_reports_every_byte_once(image: Image) -> None:
    seen: list[tuple[int, int]] = []
    image.verify(lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == RAM + image.manifest.state.size_bytes


def test_data_bitmap_has_a_bit_for_each_page_with_data(image: Image) -> None:
    bitmap = image.data_bitmap("m0")
    pages = {page for page in range(RAM // PAGE) if bitmap[page // 8] >> page % 8 & 1}
    assert {0, 2, 3, RAM // PAGE - 1} <= pages
    # A file system may keep data in larger units, but not everything.
    assert len(pages) < 100
    assert image.data_bitmap("m0") == bitmap


def test_huge_page_of_a_bitmap_has_data_if_any_of_its_part_has(tmp_path: Path) -> None:
    made = make(tmp_path / "image", page_sizes_bytes={"m0": 2 << 20})
    assert made.manifest.block("m0").page_size_bytes == 2 << 20
    bitmap = made.data_bitmap("m0")
    pages = {page for page in range(RAM >> 21) if bitmap[page // 8] >> page % 8 & 1}
    assert pages == {0, 31, 32, (RAM >> 21) - 1}


def punch(path: Path, offset: int, length: int) -> None:
    with path.open("r+b") as file:
        error = new_error()
        check(lib.qpc_page_file_punch(file.fileno(), offset, length, error), error)


@pytest.mark.parametrize("page_size", [PAGE, 2 << 20])
def test_page_file_that_has_lost_data_and_kept_its_size_is_found(
    image: Image, tmp_path: Path, page_size: int
) -> None:
    """Its pages would be known to be zero."""
    punch(image.path / "ram/m0", 0, SEGMENT_BYTES + (4 << 20))
    opened = Image.open(image.path)
    fd, offset = opened.open_block("m0")
    lost = "ram/m0 has lost data of RAM block m0"
    with pytest.raises(ImageError, match=lost):
        opened.data_bitmap_of(fd, offset, "m0", page_size)
    punch(image.path / "ram/m0", 0, RAM)
    with pytest.raises(ImageError, match=lost):
        opened.data_bitmap_of(fd, offset, "m0", page_size)
    os.close(fd)
    with pytest.raises(ImageError, match=lost):
        MemoryFile.open(image.path)
    with pytest.raises(ImageError, match=lost):
        export(opened, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_page_file_with_zeros_stored_or_left_out_has_lost_nothing(
    image: Image, tmp_path: Path
) -> None:
    ram = image.path / "ram/m0"
    for how in ("never", "always"):
        subprocess.run(["cp", f"--sparse={how}", ram, tmp_path / "copy"], check=True)
        (tmp_path / "copy").replace(ram)
        Image.open(image.path).check_data()


# ---- checksums ----


def test_checksum_does_not_depend_on_how_zeros_are_kept(image: Image, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    dense.write_bytes((image.path / "ram/m0").read_bytes())
    sparse_hash = page_data.hash_segment(os.open(image.path / "ram/m0", os.O_RDONLY), 0, 0, RAM)
    assert page_data.hash_segment(os.open(dense, os.O_RDONLY), 0, 0, RAM) == sparse_hash


@pytest.mark.parametrize("page", [1, SEGMENT_BYTES // PAGE + 5])
def test_page_that_moved_changes_the_checksum(image: Image, page: int) -> None:
    with (image.path / "ram/m0").open("r+b") as file:
        content = file.read(PAGE)
        file.seek(0)
        file.write(bytes(PAGE))
        file.seek(page * PAGE)
        file.write(content)
    with pytest.raises(ImageError, match="m0"):
        image.verify()


@pytest.mark.parametrize(
    ("file", "position", "words"),
    [
        ("state.bin", 100, r"state\.bin was altered"),
        ("ram/m0", 10, f"between 0 and {SEGMENT_BYTES} bytes"),
        ("ram/m0", SEGMENT_BYTES - 1, f"between 0 and {SEGMENT_BYTES} bytes"),
        ("ram/m0", SEGMENT_BYTES, f"between {SEGMENT_BYTES} and"),
        ("ram/m0", RAM // 2, "m0 differs"),
        ("ram/m0", RAM - 1, f"between {2 * SEGMENT_BYTES} and {RAM} bytes"),
    ],
)
def test_one_changed_bit_is_found_and_placed(
    file: str, position: int, words: str, image: Image
) -> None:
    with (image.path / file).open("r+b") as handle:
        handle.seek(position)
        old = handle.read(1)[0]
        handle.seek(position)
        handle.write(bytes([old ^ 1]))
    opened = Image.open(image.path)
    with pytest.raises(ImageError, match=words):
        opened.verify()


# ---- opening what is not whole ----


@pytest.mark.parametrize("file", ["state.bin", "ram/m0"])
def test_truncated_file_is_named_with_both_sizes(file: str, image: Image) -> None:
    size = (image.path / file).stat().st_size
    os.truncate(image.path / file, size - 1)
    with pytest.raises(ImageError, match=f"{file} is truncated: {size - 1} bytes.*have {size}"):
        Image.open(image.path)
    os.truncate(image.path / file, size + 1)
    with pytest.raises(ImageError, match=f"{file} is too long"):
        Image.open(image.path)


@pytest.mark.parametrize("file", ["manifest.json", "state.bin", "ram/m0"])
def test_missing_file_is_named(file: str, image: Image) -> None:
    (image.path / file).unlink()
    with pytest.raises(ImageError, match=file):
        Image.open(image.path)


@pytest.mark.parametrize("file", ["manifest.json", "state.bin", "ram/m0", "ram"])
def test_symbolic_link_out_of_the_image_is_not_followed(
    file: str, image: Image, tmp_path: Path
) -> None:
    (image.path / file).rename(tmp_path / "elsewhere")
    (image.path / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="cannot be opened"):
        Image.open(image.path)


def test_fifo_in_place_of_a_file_is_refused_at_once(image: Image) -> None:
    (image.path / "state.bin").unlink()
    os.mkfifo(image.path / "state.bin")
    with pytest.raises(ImageError, match="no ordinary file"):
        Image.open(image.path)


def test_page_file_that_shrinks_while_it_is_checked_is_an_error_of_ours(image: Image) -> None:
    os.truncate(image.path / "ram/m0", PAGE)
    with pytest.raises(ImageError):
        image.verify()


# ---- making ----


def test_existing_target_is_never_touched(image: Image) -> None:
    with pytest.raises(UsageError, match="there already"), ImageWriter(image.path):
        pytest.fail("must not be entered")
    Image.open(image.path).verify()


def test_failure_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ImageWriter(tmp_path / "image") as writer:
        fill(writer.directory)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_target_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "image"
    with pytest.raises(HostError, match="cannot be finished"), ImageWriter(target) as writer:
        summary = fill(writer.directory)
        target.mkdir()
        (target / "other").write_text("somebody else's")
        writer.finish(summary, architecture="x86_64", source="a test")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["image", "other"]


def test_killed_writer_leaves_what_is_recognised_and_the_next_removes(tmp_path: Path) -> None:
    target = tmp_path / "image"
    program = (
        "import sys, time\n"
        "from qemu_postcopy.image.writer import ImageWriter\n"
        "with ImageWriter(sys.argv[1]) as writer:\n"
        "    (writer.directory / 'state.bin').write_bytes(b'half')\n"
        "    print('made', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(target)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        assert find_leftovers(target) == []  # its writer is alive
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not target.exists()
    (leftover,) = find_leftovers(target)
    assert (leftover / "state.bin").read_bytes() == b"half"
    make(target).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_two_writers_of_one_target_do_not_remove_each_other(tmp_path: Path) -> None:
    with ImageWriter(tmp_path / "image") as first, ImageWriter(tmp_path / "image") as second:
        assert first.directory.is_dir()
        assert second.directory.is_dir()
        assert find_leftovers(tmp_path / "image") == []


def test_parent_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such"), ImageWriter(tmp_path / "no-such/image"):
        pytest.fail("must not be entered")


# ---- what QEMU gets ----


def test_device_state_is_sealed_with_the_magic_restored(image: Image) -> None:
    fd = open_device_state(image)
    try:
        content = os.pread(fd, 1 << 20, 0)
        assert os.lseek(fd, 0, os.SEEK_CUR) == 0
        assert content == b"QEVM" + (image.path / "state.bin").read_bytes()[4:]
        with pytest.raises(PermissionError):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_altered_device_state_never_reaches_qemu(image: Image) -> None:
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    with (image.path / "state.bin").open("r+b") as file:
        file.seek(50)
        file.write(b"!")
    with pytest.raises(ImageError, match="altered"):
        open_device_state(image)
    assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


# ---- the command line ----


def test_verify_command_says_intact_or_raises(image: Image) -> None:
    result = CliRunner().invoke(image_commands, ["verify", str(image.path), "--json"])
    assert json.loads(result.stdout) == {
        "image": str(image.path),
        "ok": True,
        "data_bytes": 6 * PAGE,
    }
    with (image.path / "ram/m0").open("r+b") as file:
        file.write(b"!")
    result = CliRunner().invoke(image_commands, ["verify", str(image.path)])
    assert isinstance(result.exception, ImageError)
