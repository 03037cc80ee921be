"""Guest memory as one run of bytes, for a VMM that names its parts by offsets.

Step "open the image" of serving a VMM that hands its own userfaultfd over: it says which bytes it
wants at which address, so what serves it is either a raw memory file (Firecracker's
``mem_file_path``) or the RAM blocks of an image one after the other, in the manifest's order.
Nothing is written.  May be used by one thread at a time.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.manifest import (
    DEFAULT_CHUNK_BYTES,
    STATE_FILE,
    Block,
    Manifest,
    Provenance,
    StateFile,
)
from qemu_postcopy.vm.handshake import Region


class MemoryFile:
    """Where the bytes are; see :meth:`open`.

    Attributes: path; pieces, the sizes in bytes of what follows each other.
    """

    def __init__(self, path: Path, image: Image | None, pieces: list[int]) -> None:
        self.path = path
        self.pieces = pieces
        self._image = image

    @classmethod
    def open(cls, path: Path) -> MemoryFile:
        """An image's directory, or a raw memory file.

        Raises:
            ImageError: it is neither, or is damaged.
        """
        if path.is_dir():
            image = Image.open(path)
            image.check_data()
            return cls(path, image, [block.size_bytes for block in image.manifest.blocks])
        try:
            status = path.stat()
        except OSError as error:
            raise ImageError(
                f"{path} cannot be opened: {error.strerror}", hint="look at the path"
            ) from error
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise ImageError(
                f"{path} is no memory file: it is empty, or no ordinary file",
                hint="give an image's directory, or the memory file of the VMM's snapshot",
            )
        return cls(path, None, [status.st_size])

    def open_bytes(self, offset_bytes: int) -> tuple[int, int]:
        """A descriptor, the caller's, and where in it the byte of that offset is.

        Raises:
            ImageError: it cannot be opened any more.
        """
        ends = list(itertools.accumulate(self.pieces))
        index = next(i for i, end in enumerate(ends) if offset_bytes < end)
        within = offset_bytes - (ends[index] - self.pieces[index])
        if self._image is not None:
            descriptor, begin = self._image.open_block(self._image.manifest.blocks[index].name)
            return descriptor, begin + within
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), within
        except OSError as error:
            raise ImageError(
                f"{self.path} cannot be opened: {error.strerror}",
                hint="look at its permissions",
            ) from error

    def key(self) -> str:
        """Which file it is: another one, or one that was written to since, has another key."""
        if self._image is not None:
            return self._image.manifest.state.sha256
        status = self.path.stat()
        return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"

    def view(self, regions: Sequence[Region]) -> RegionImage:
        """The regions as the blocks of an image, named by :func:`region_name`."""
        blocks = [
            Block(
                name=region_name(index),
                size_bytes=region.size_bytes,
                page_size_bytes=region.page_size_bytes,
                file=str(self.path),
                offset_bytes=region.offset_bytes,
                data_bytes=0,
                segment_sha256=(),
            )
            for index, region in enumerate(regions)
        ]
        return RegionImage(self, tuple(blocks))


def region_name(index: int) -> str:
    """What a region of a handshake is called, by its place in the order of the addresses."""
    return f"region{index}"


class RegionImage(Image):
    """The parts of a memory file that a VMM has asked for, as the session serves them.

    There is no device state in it: the VMM loads its own.
    """

    def __init__(self, memory: MemoryFile, blocks: tuple[Block, ...]) -> None:
        manifest = Manifest(
            qemu_version=None,
            machine="none",
            architecture=os.uname().machine,
            target_page_size_bytes=4096,
            chunk_size_bytes=DEFAULT_CHUNK_BYTES,
            state=StateFile(STATE_FILE, 0, memory.key()),
            blocks=blocks,
            provenance=Provenance("", "", str(memory.path)),
        )
        super().__init__(memory.path, manifest)
        self._memory = memory

    def open_block(self, name: str) -> tuple[int, int]:
        """See :meth:`MemoryFile.open_bytes`."""
        return self._memory.open_bytes(self.manifest.block(name).offset_bytes)
