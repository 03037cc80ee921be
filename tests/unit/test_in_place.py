"""Save files that are to be served in place: what is made of good ones, and what is refused."""

from __future__ import annotations

import errno
import gzip
import os
import struct
from pathlib import Path

import pytest
from unit.streams import HOSTILE, PAGE, RAM, XML, Stream, page_record, save_file, zero_record

from qemu_postcopy.errors import ImageError, InPlaceRefusedError, LeaseRefusedError, UsageError
from qemu_postcopy.image import in_place_writer
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.in_place import RUN_BYTES, InPlaceImage, open_image
from qemu_postcopy.image.in_place_writer import serve_in_place

RUN = struct.Struct("=QQII")


def made(tmp_path: Path, data: bytes) -> InPlaceImage:
    (tmp_path / "saved").write_bytes(data)
    return serve_in_place(tmp_path / "saved", tmp_path / ".served", by_lease=True)


def runs_of(image: Image) -> list[tuple[int, ...]]:
    return list(RUN.iter_unpack((image.path / "ram/m0").read_bytes()))


def test_a_raw_file_is_looked_through_and_not_copied(tmp_path: Path) -> None:
    data = save_file(0, Stream().pack())
    image = made(tmp_path, data)
    assert (tmp_path / "saved").read_bytes() == data
    first = data.index(b"\7" * PAGE)
    assert RUN.size == RUN_BYTES
    # Both records have the block's name in them.
    head = 8 + 1 + len("m0")
    assert runs_of(image) == [(0, first, 1, head), (5, first + PAGE + head, 1, head)]
    assert (image.path / "saved").samefile(tmp_path / "saved")
    assert image.shown_path == tmp_path / "saved"
    manifest = image.manifest
    assert (manifest.domain_xml, manifest.architecture) == (XML, "x86_64")
    assert manifest.block("m0").data_bytes == 2 * PAGE
    source, offset, bitmap = image.open_source("m0", PAGE)
    assert source.read(0, PAGE) == b"\7" * PAGE
    source.close()
    assert offset == 0 and bitmap == bytes([0b100001]) + bytes(RAM // PAGE // 8 - 1)
    source, _, bitmap = image.open_source("m0", 2 << 20)
    source.close()
    assert bitmap == b"\1"

    again = open_image(image.path)
    assert isinstance(again, InPlaceImage) and again.manifest == manifest
    with pytest.raises(ImageError, match="served in place"):
        Image.open(image.path)
    with pytest.raises(UsageError, match="there already"):
        serve_in_place(tmp_path / "saved", image.path, by_lease=True)


def test_the_last_of_a_page_that_comes_twice_counts(tmp_path: Path) -> None:
    records = (
        page_record(3, "m0", 1)
        + page_record(4, "m0", 2)
        + page_record(3, "m0", 3)
        + zero_record(4, "m0")
        + struct.pack(">Q", 0x10)
    )
    image = made(tmp_path, save_file(0, Stream(last_records=records).pack()))
    ((page, offset, count, _),) = runs_of(image)
    assert (page, count) == (3, 1)
    assert (tmp_path / "saved").read_bytes()[offset : offset + PAGE] == b"\3" * PAGE


@pytest.mark.parametrize("name", HOSTILE)
def test_a_lie_is_refused_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    data = save_file(0, HOSTILE[name][0].pack())
    with pytest.raises(ImageError) as caught:
        made(tmp_path, data)
    assert caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert (tmp_path / "saved").stat().st_nlink == 1


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = save_file(0, Stream().pack())
    stream = whole.index(b"QEVM")
    for length in [*range(stream, len(whole), 97), *range(len(whole) - 150, len(whole))]:
        with pytest.raises(ImageError):
            made(tmp_path, whole[:length])


def test_compressed_files_are_left_to_a_conversion(tmp_path: Path) -> None:
    with pytest.raises(InPlaceRefusedError, match="gzip"):
        made(tmp_path, save_file(1, gzip.compress(Stream().pack())))


def test_without_a_private_copy_the_file_itself_is_served_only_if_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("fcntl.ioctl", refuse)
    (tmp_path / "saved").write_bytes(save_file(0, Stream().pack()))
    with pytest.raises(InPlaceRefusedError) as caught:
        serve_in_place(tmp_path / "saved", tmp_path / ".served", by_lease=False)
    assert "--in-place" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    data = save_file(0, Stream().pack())
    (tmp_path / "saved").write_bytes(data)
    with (tmp_path / "saved").open("r+b"), pytest.raises(InPlaceRefusedError, match="writing"):
        serve_in_place(tmp_path / "saved", tmp_path / ".served", by_lease=True)


def test_more_than_can_be_read_while_a_writer_waits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place_writer, "FILL_BYTES_PER_SECOND", 1.0)
    with pytest.raises(InPlaceRefusedError) as caught:
        made(tmp_path, save_file(0, Stream().pack()))
    assert "fs.lease-break-time" in caught.value.hint


def test_a_file_that_was_written_to_since_is_not_read_from(tmp_path: Path) -> None:
    data = save_file(0, Stream().pack())
    image = made(tmp_path, data)
    status = (tmp_path / "saved").stat()
    lease = image.take_lease()
    assert lease is not None
    lease.release()
    with (tmp_path / "saved").open("r+b") as file:
        file.write(b"L")
        with pytest.raises(LeaseRefusedError):
            image.take_lease()
    for times in ((status.st_atime_ns, status.st_mtime_ns + 1), (0, status.st_mtime_ns - 1)):
        os.utime(tmp_path / "saved", ns=times)
        with pytest.raises(ImageError, match="written to"):
            image.open_source("m0", PAGE)
    os.utime(tmp_path / "saved", ns=(0, status.st_mtime_ns))
    image.open_source("m0", PAGE)[0].close()
    os.truncate(tmp_path / "saved", len(data) - 1)
    os.utime(tmp_path / "saved", ns=(0, status.st_mtime_ns))
    with pytest.raises(ImageError, match="written to"):
        image.open_source("m0", PAGE)


def test_a_removed_or_replaced_file_is_there_still(tmp_path: Path) -> None:
    image = made(tmp_path, save_file(0, Stream().pack()))
    (tmp_path / "saved").unlink()
    (tmp_path / "saved").write_bytes(b"another")
    image.open_source("m0", PAGE)[0].close()


@pytest.mark.parametrize("change", ["altered", "longer", "shorter"])
def test_a_damaged_index_is_refused(tmp_path: Path, change: str) -> None:
    image = made(tmp_path, save_file(0, Stream().pack()))
    index = image.path / "ram/m0"
    data = index.read_bytes()
    index.write_bytes(
        {"altered": data[:-1] + b"\x08", "longer": data * 2, "shorter": data[:-1]}[change]
    )
    with pytest.raises(ImageError, match="altered"):
        image.open_source("m0", PAGE)
