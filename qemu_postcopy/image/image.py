"""An image on disk, opened for serving or to be checked.

Opening is cheap: the manifest and all sizes; contents only :meth:`Image.verify` reads.  Nothing of
an image is trusted, and nothing here writes one (see ``writer.py``).  Images may be shared between
threads.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.manifest import (
    MANIFEST_BYTES_MAX,
    MANIFEST_FILE,
    STATE_FILE,
    Manifest,
    parse_manifest,
)
from qemu_postcopy.image.page_data import (
    HASH_PAGE_BYTES,
    SEGMENT_BYTES,
    counted_bitmap,
    hash_file,
    hash_segment,
)

if TYPE_CHECKING:
    from qemu_postcopy.paging.lease import Lease
    from qemu_postcopy.paging.source import Source

#: Bytes done, bytes in all.  Called from several threads, one at a time; what it raises ends the
#: operation.
Progress = Callable[[int, int], None]

_HASH_THREADS = 2
_COPY_AGAIN = "the image is damaged; copy it again from a good one, or take a new snapshot"


class Image:
    """A finished image; see :meth:`open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Image:
        """Opens an image: reads the manifest and checks that every file is there in full length.

        Raises:
            ImageError: not an image, or a file is missing, truncated or too long.
        """
        path = Path(path)
        if not path.is_dir():
            raise ImageError(
                f"{path} is no image: it is not a directory",
                hint="give the directory that snapshot wrote; import other formats first",
            )
        image = cls(path, read_manifest(path))
        if image.manifest.saved is not None:
            raise ImageError(
                f"{path} is no image: {image.manifest.saved.path} is served in place there",
                hint="give that file; this directory goes with the guest it was made for",
            )
        ends: dict[str, int] = {}
        for block in image.manifest.blocks:
            end = block.offset_bytes + block.size_bytes
            ends[block.file] = max(end, ends.get(block.file, 0))
        ends[STATE_FILE] = image.manifest.state.size_bytes
        for file, size_bytes in ends.items():
            fd = image._open_file(file)
            try:
                found = os.fstat(fd).st_size
            finally:
                os.close(fd)
            if found != size_bytes:
                what = "truncated" if found < size_bytes else "too long"
                raise ImageError(
                    f"{path / file} is {what}: {found} bytes, and should have {size_bytes}",
                    hint=_COPY_AGAIN,
                )
        return image

    def _open_file(self, file: str) -> int:
        """Opens a file of the image, following no symbolic link out of it."""
        return open_below(self.path, file)

    @property
    def shown_path(self) -> Path:
        """What the operator knows it by."""
        return self.path

    def put_back(self) -> str:
        """How page data that was changed by others becomes what it was, in words."""
        return "put its data back"

    def take_lease(self) -> Lease | None:
        """Keeps page data from being written to by others, where it is not ours; the caller's."""
        return None

    def open_source(self, name: str, page_size_bytes: int) -> tuple[Source, int, bytearray]:
        """The page data of a lazy block, for a pager.

        Args:
            page_size_bytes: of the memory that it is for.

        Returns:
            the source, which is the caller's, the offset of the block's first byte in it, and one
            bit per page, least significant first: whether it has data, or is known to be zero.

        Raises:
            ImageError: no such block, or the file is not there any more, or has lost data.
        """
        from qemu_postcopy.paging.source import FileSource

        descriptor, offset = self.open_block(name)
        try:
            bitmap = self.data_bitmap_of(descriptor, offset, name, page_size_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return FileSource(descriptor), offset, bitmap

    def open_state(self) -> io.BufferedReader:
        """The stored ``state.bin``, with its changed magic; see ``open_device_state``."""
        return os.fdopen(self._open_file(self.manifest.state.file), "rb")

    def open_block(self, name: str) -> tuple[int, int]:
        """Opens the page file of a lazy block.

        Returns:
            a read-only descriptor, which is the caller's, and the offset of the block's first byte.

        Raises:
            ImageError: no such block, or the file is not there any more.
        """
        block = self.manifest.block(name)
        return self._open_file(block.file), block.offset_bytes

    def data_bitmap(self, name: str) -> bytearray:
        """One bit per page (of the block's page size) of a lazy block, least significant first.

        A clear bit is a hole: a page known to be zero.  Where the file system has no holes, or an
        image was copied without them, all bits are set.

        Raises:
            ImageError: the file has holes where data must be.
        """
        fd, offset = self.open_block(name)
        try:
            return self.data_bitmap_of(fd, offset, name, self.manifest.block(name).page_size_bytes)
        finally:
            os.close(fd)

    def data_bitmap_of(
        self, fd: int, offset_bytes: int, name: str, page_size_bytes: int
    ) -> bytearray:
        """The same of a block that is opened already, for pages of another size.

        A copy that was interrupted after its space was reserved, or a file with a hole punched into
        it, has its full length, and the data that it has lost would be taken for zeros.  A sound
        file has as much as was counted when it was made, or more, since a file system keeps holes
        in units of its own.
        """
        block = self.manifest.block(name)
        bitmap, found = counted_bitmap(fd, offset_bytes, block.size_bytes, page_size_bytes)
        if page_size_bytes != HASH_PAGE_BYTES:  # what was written is counted in those
            _, found = counted_bitmap(fd, offset_bytes, block.size_bytes, HASH_PAGE_BYTES)
        if found < block.data_bytes:
            raise ImageError(
                f"{self.path / block.file} has lost data of RAM block {name}: {found} bytes are "
                f"there, and {block.data_bytes} were written",
                hint=_COPY_AGAIN,
                block=name,
            )
        return bitmap

    def check_data(self) -> None:
        """ImageError where a page file has holes where data must be; reads no page."""
        for block in self.manifest.blocks:
            self.data_bitmap(block.name)

    def verify(self, progress: Progress | None = None) -> None:
        """Reads everything and compares all checksums, in two threads.

        Args:
            progress: called with the bytes done and the bytes in all (holes count as done).

        Raises:
            ImageError: a checksum differs; names the file, the block and the range.
        """
        state = self.manifest.state
        total = state.size_bytes + sum(block.size_bytes for block in self.manifest.blocks)
        step = Steps(total, progress)
        with self.open_state() as file:
            if hash_file(file.fileno(), step) != state.sha256:
                raise ImageError(
                    f"{self.path / state.file} was altered: its SHA-256 is not the manifest's",
                    hint=_COPY_AGAIN,
                )
        for block in self.manifest.blocks:
            fd, offset = self.open_block(block.name)
            try:
                hashes, data_bytes = hash_block(fd, offset, block.size_bytes, step)
            finally:
                os.close(fd)
            for index, (found, wanted) in enumerate(zip(hashes, block.segment_sha256, strict=True)):
                if found != wanted:
                    begin = index * SEGMENT_BYTES
                    raise ImageError(
                        f"{self.path / block.file} was altered: RAM block {block.name} differs "
                        f"between {begin} and {min(begin + SEGMENT_BYTES, block.size_bytes)} bytes",
                        hint=_COPY_AGAIN,
                        block=block.name,
                    )
            if data_bytes != block.data_bytes:
                raise ImageError(
                    f"{MANIFEST_FILE}: RAM block {block.name} has {data_bytes} bytes of data, "
                    f"not {block.data_bytes}",
                    hint=_COPY_AGAIN,
                    block=block.name,
                )


def open_below(directory: Path, file: str) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    parent = -1
    try:
        parent = os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)
        *folders, name = file.split("/")
        for folder in folders:
            below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=parent)
            os.close(parent)
            parent = below
        fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=parent)
    except OSError as error:
        raise ImageError(
            f"{directory / file} cannot be opened: {error.strerror}",
            hint=_COPY_AGAIN if isinstance(error, FileNotFoundError) else "look at its permissions",
        ) from error
    finally:
        if parent >= 0:
            os.close(parent)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ImageError(f"{directory / file} is no ordinary file", hint=_COPY_AGAIN)
    return fd


def read_manifest(path: Path) -> Manifest:
    """Of an image, or of a directory in which a save file is served in place.

    Raises:
        ImageError: there is none, or it is damaged.
    """
    with os.fdopen(open_below(path, MANIFEST_FILE), "rb") as file:
        text = file.read(MANIFEST_BYTES_MAX + 1)
    if len(text) > MANIFEST_BYTES_MAX:
        raise ImageError(f"{path / MANIFEST_FILE} is too long", hint=_COPY_AGAIN)
    return parse_manifest(text)


class Steps:
    """Adds up what several threads have done and reports it."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self._total = total_bytes
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, size_bytes: int) -> None:
        with self._lock:
            self._done += size_bytes
            if self._progress:
                self._progress(self._done, self._total)


def hash_block(
    fd: int, offset_bytes: int, size_bytes: int, step: Callable[[int], None]
) -> tuple[list[str], int]:
    """Checksums of all segments of a block, and the bytes of its pages that are not zero."""

    # Imported here: opening an image for a restore, which must be quick, does not need it.
    from concurrent.futures import ThreadPoolExecutor

    def one(begin: int) -> tuple[str, int]:
        length = min(SEGMENT_BYTES, size_bytes - begin)
        result = hash_segment(fd, offset_bytes, begin, length)
        step(length)
        return result

    pool = ThreadPoolExecutor(_HASH_THREADS)
    try:
        results = list(pool.map(one, range(0, size_bytes, SEGMENT_BYTES)))
    finally:
        pool.shutdown(cancel_futures=True)
    return [digest for digest, _ in results], sum(data for _, data in results)
