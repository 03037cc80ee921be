"""Prepares a save file of libvirt's to be served in place: one pass over it, no copy of its pages.

The step that takes the place of a conversion.  The stream in a raw file is walked record by record,
with page data stepped over; a sparse file (mapped-ram) says itself where its pages are.  Nothing in
either is trusted.  What is made is described in ``in_place.py``.  One thread.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qemu_postcopy import __version__
from qemu_postcopy._native import ffi, lib, raise_error
from qemu_postcopy.errors import HostError, ImageError, InPlaceRefusedError
from qemu_postcopy.image.convert import guess_architecture, noted_launch, read_domain
from qemu_postcopy.image.image import Progress
from qemu_postcopy.image.in_place import SAVED, InPlaceImage
from qemu_postcopy.image.libvirt_save import SaveHeader, read_save_header
from qemu_postcopy.image.manifest import (
    DEFAULT_CHUNK_BYTES,
    MANIFEST_FILE,
    RAM_DIRECTORY,
    STATE_FILE,
    Block,
    Manifest,
    Provenance,
    SavedFile,
    StateFile,
)
from qemu_postcopy.image.page_data import hash_file
from qemu_postcopy.image.records import BlockHeader, StreamReader
from qemu_postcopy.image.stream import (
    INDEXED,
    StreamSummary,
    Walk,
    block_file_name,
    is_lazy_by_default,
)
from qemu_postcopy.image.writer import ImageWriter
from qemu_postcopy.paging.lease import Lease, break_seconds

#: ioctl_ficlone(2)
FICLONE = 0x40049409
#: Formats whose pages lie in the file as they are.
FORMATS = ("raw", "sparse")
#: Of the time that the kernel keeps a writer waiting, so much may be planned with.
LEASE_SHARE = 0.7
#: What a guest is filled with at most, whatever the disk gives: pages are copied one by one.
FILL_BYTES_PER_SECOND = 500e6
_SAMPLES = 16
_SAMPLE_BYTES = 1 << 20


def serve_in_place(
    path: Path, target: Path, *, by_lease: bool, progress: Progress | None = None
) -> InPlaceImage:
    """Makes what stands for an image of a save file.

    Args:
        target: the directory, on the file's own file system; must not be there.
        by_lease: where the file system cannot share data between files, the operator's file itself
            may be read from, under a lease.
        progress: bytes of the file that were looked through, and in all.

    Raises:
        InPlaceRefusedError: compressed, no private copy can be made, or no lease be had that holds
            for long enough.
        ImageError: malformed, truncated, or written to meanwhile.
        UsageError: the target is there.
        HostError: the file cannot be read, or the directory not be written.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"{path} cannot be read: {error.strerror}", hint="look at the path and its permissions"
        ) from error
    try:
        header = read_save_header(descriptor)
        if header.format not in FORMATS:
            raise InPlaceRefusedError(
                f"{path} is compressed ({header.format})",
                hint="save domains uncompressed (raw, or sparse with libvirt 11) to serve their "
                "files in place",
            )
        with ImageWriter(target) as writer:
            try:
                return _make(path, descriptor, header, writer, by_lease, progress)
            except OSError as error:
                raise HostError(
                    f"{target} cannot be written: {error.strerror}",
                    hint="look at the file's directory and its file system",
                ) from error
    finally:
        os.close(descriptor)


def _make(
    path: Path,
    descriptor: int,
    header: SaveHeader,
    writer: ImageWriter,
    by_lease: bool,
    progress: Progress | None,
) -> InPlaceImage:
    before = _identity(descriptor)
    way = _get_file(path, descriptor, writer.directory / SAVED, by_lease=by_lease)
    # Looked through in the original: its data are in the page cache, if anywhere.
    summary, runs = _scan(descriptor, header, writer.directory, progress)
    if way == "lease":
        _require_time(path, descriptor, summary)
    if _identity(descriptor) != before:
        raise ImageError(f"{path} was written to meanwhile", hint="try again when it is finished")
    saved_fd = os.open(writer.directory / SAVED, os.O_RDONLY | os.O_CLOEXEC)
    try:
        found = os.fstat(saved_fd)
    finally:
        os.close(saved_fd)
    saved = SavedFile(
        str(path.absolute()), way, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
    )
    manifest = _manifest(path, header, summary, runs, saved, writer.directory)
    (writer.directory / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    writer.put_in_place(durable=False)
    return InPlaceImage(writer.target, manifest)


def _identity(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def _get_file(path: Path, descriptor: int, name: Path, *, by_lease: bool) -> str:
    """Gives the file's content a name of our own; returns the way."""
    out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.ioctl(out, FICLONE, descriptor)
        return "clone"
    except OSError as error:
        refused = error
    finally:
        os.close(out)
    name.unlink()
    if not by_lease:
        raise InPlaceRefusedError(
            f"the file system of {path} cannot share its data with a private copy: "
            f"{refused.strerror}",
            hint="restore --in-place reads from the file itself, under a lease",
        )
    try:
        Lease(descriptor, str(path)).release()
        _link(descriptor, name)
    except HostError as error:
        raise InPlaceRefusedError(error.message, hint=error.hint) from error
    except OSError as error:
        why = "no hard link may be made of it" if error.errno == errno.EPERM else error.strerror
        raise InPlaceRefusedError(
            f"{path} cannot be kept from being removed: {why}",
            hint="put the file on a local file system",
        ) from error
    return "lease"


def _link(descriptor: int, name: Path) -> None:
    """Of the very file that is open, whatever has its name by now."""
    descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # With a directory given Python uses linkat(2) with AT_SYMLINK_FOLLOW, else link(2).
        os.link(str(descriptor), name, src_dir_fd=descriptors)
    finally:
        os.close(descriptors)


def _require_time(path: Path, descriptor: int, summary: StreamSummary) -> None:
    """Whether what the guest may lack can be read in the time that a writer waits for."""
    size = sum(b.pages_written for b in summary.blocks if b.lazy) * summary.target_page_size_bytes
    rate = min(FILL_BYTES_PER_SECOND, _measure(descriptor))
    seconds = break_seconds()
    if size > rate * seconds * LEASE_SHARE:
        needed = int(size / rate / LEASE_SHARE) + 1
        raise InPlaceRefusedError(
            f"the {size >> 20} MiB of {path} cannot be read in the {seconds:g} s that the kernel "
            "keeps whoever overwrites it waiting",
            hint=f"raise that, if you want: sysctl fs.lease-break-time={needed}",
        )


def _measure(descriptor: int) -> float:
    """Bytes per second that the file is read with."""
    size = os.fstat(descriptor).st_size
    began = time.monotonic()
    done = sum(
        len(os.pread(descriptor, _SAMPLE_BYTES, size * index // _SAMPLES))
        for index in range(_SAMPLES)
    )
    return done / max(time.monotonic() - began, 1e-6)


class IndexingReader(StreamReader):
    """Reads a stream in a file and notes where the pages of indexed blocks lie.

    Args: as of ``StreamReader``; the descriptor is of a file, and its own offset is used.
    """

    def __init__(self, fd: int, offset: int, progress: Progress | None = None) -> None:
        super().__init__(fd, offset)
        self._progress = progress
        self._scan: Any = lib.qpc_saved_scan_create(fd, self._error)
        if self._scan == ffi.NULL:
            super().close()
            raise_error(self._error, hint="give a regular file")

    def close(self) -> None:
        """Frees the reader."""
        super().close()
        scan, self._scan = self._scan, ffi.NULL
        lib.qpc_saved_scan_destroy(scan)

    def add_block(
        self,
        block: BlockHeader,
        page_size_bytes: int,
        page_fd: int = -1,
        page_offset_bytes: int = 0,
    ) -> int:
        """Declares a block of the list; ``page_fd`` is INDEXED, or -1."""
        return self._check(
            lib.qpc_saved_scan_add_block(
                self._scan,
                block.name.encode(),
                block.size_bytes,
                page_size_bytes,
                page_fd == INDEXED,
                self._error,
            )
        )

    def ram_section(self, records_fd: int) -> None:
        """See ``qpc_saved_scan_section``."""
        end = ffi.new("uint64_t *", self.offset)
        total = os.fstat(self.fd).st_size
        while self._check(
            lib.qpc_saved_scan_section(self._scan, end[0], records_fd, end, self._error)
        ):
            if self._progress:
                self._progress(end[0], total)
        self.seek(end[0])

    def block_counts(self, index: int) -> tuple[int, int, int]:
        """Data records, zero records, and pages that have data."""
        ret = ffi.new("struct qpc_saved_counts *")
        self._check(lib.qpc_saved_scan_counts(self._scan, index, ret, self._error))
        return ret.pages_data, ret.pages_zero, ret.pages_known

    def runs(self, index: int) -> bytes:
        """Packed ``struct qpc_saved_run`` of an indexed block."""
        count = lib.qpc_saved_scan_runs(self._scan, index, ffi.NULL, 0)
        runs = ffi.new("struct qpc_saved_run[]", count)
        lib.qpc_saved_scan_runs(self._scan, index, runs, count)
        return bytes(ffi.buffer(runs))


def bitmap_runs(bitmap: bytes, pages: int, offset_bytes: int, page_size_bytes: int) -> bytes:
    """The same of a mapped-ram block."""
    arguments = (ffi.from_buffer("uint8_t[]", bitmap), pages, offset_bytes, page_size_bytes)
    count = lib.qpc_saved_bitmap_runs(*arguments, ffi.NULL, 0)
    runs = ffi.new("struct qpc_saved_run[]", count)
    lib.qpc_saved_bitmap_runs(*arguments, runs, count)
    return bytes(ffi.buffer(runs))


def _scan(
    descriptor: int, header: SaveHeader, directory: Path, progress: Progress | None
) -> tuple[StreamSummary, dict[str, bytes]]:
    """The stream's structure and each lazy block's runs; writes ``state.bin``."""
    os.lseek(descriptor, header.stream_offset_bytes, os.SEEK_SET)
    state_fd = os.open(
        directory / STATE_FILE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
    )
    try:
        with IndexingReader(descriptor, header.stream_offset_bytes, progress) as reader:
            walk = Walk(
                reader, state_fd, lambda block: INDEXED if is_lazy_by_default(block) else None
            )
            summary = walk.run(devices=False)
            page_size = summary.target_page_size_bytes
            runs = {}
            for index, block in enumerate(summary.blocks):
                if block.lazy and block.name in walk.mapped:
                    offset, bitmap = walk.mapped[block.name]
                    pages = block.size_bytes // page_size
                    runs[block.name] = bitmap_runs(bitmap, pages, offset, page_size)
                elif block.lazy:
                    runs[block.name] = reader.runs(index)
    finally:
        os.close(state_fd)
    return summary, runs


def _manifest(
    path: Path,
    header: SaveHeader,
    summary: StreamSummary,
    runs: dict[str, bytes],
    saved: SavedFile,
    directory: Path,
) -> Manifest:
    (directory / RAM_DIRECTORY).mkdir(mode=0o700)
    blocks = []
    for block in summary.blocks:
        if not block.lazy:
            continue
        file = f"{RAM_DIRECTORY}/{block_file_name(block.name)}"
        (directory / file).write_bytes(runs[block.name])
        blocks.append(
            Block(
                block.name,
                block.size_bytes,
                block.page_size_bytes or 4096,
                file,
                0,
                block.pages_written * summary.target_page_size_bytes,
                (hashlib.sha256(runs[block.name]).hexdigest(),),
            )
        )
    with (directory / STATE_FILE).open("rb") as state:
        digest = hash_file(state.fileno())
        size = os.fstat(state.fileno()).st_size
    architecture, guest_name = read_domain(header.domain_xml)
    return Manifest(
        qemu_version=None,
        machine=summary.machine,
        architecture=architecture or guess_architecture(summary.machine),
        target_page_size_bytes=summary.target_page_size_bytes,
        chunk_size_bytes=DEFAULT_CHUNK_BYTES,
        state=StateFile(STATE_FILE, size, digest),
        blocks=tuple(blocks),
        provenance=Provenance(
            datetime.now(UTC).isoformat(timespec="seconds"),
            f"qemu-postcopy {__version__}",
            f"{header.format} save file {path.name}",
            guest_name,
        ),
        launch=noted_launch(header),
        domain_xml=header.domain_xml,
        saved=saved,
    )
