"""A save file of libvirt's that is served in place: what stands for an image of it.

A directory beside the file, of one guest only, that goes with it: the device state, where in the
file each page lies, and the file itself by a name of our own (``saved``).  That is a private copy
where the file system shares data between files (FICLONE), or a hard link.  The file behind a hard
link is the operator's: it is leased, so that whoever writes to it waits until the guest has all of
its memory, and what is read is refused once it was written to.  Read-only; any thread.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.image import Image, Progress, open_below, read_manifest
from qemu_postcopy.image.manifest import Manifest, SavedFile
from qemu_postcopy.paging.lease import Lease
from qemu_postcopy.paging.source import SavedSource, Source

#: The name of the file that pages are read from.
SAVED = "saved"
#: sizeof(struct qpc_saved_run)
RUN_BYTES = 24


class InPlaceImage(Image):
    """See :meth:`open`; made by :func:`qemu_postcopy.image.in_place_writer.serve_in_place`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        assert manifest.saved is not None
        super().__init__(path, manifest)
        self.saved: SavedFile = manifest.saved

    @property
    def shown_path(self) -> Path:
        """The operator's file."""
        return Path(self.saved.path)

    def put_back(self) -> str:
        """Its content by whoever has a copy; the time of its last change as it was."""
        seconds, nanoseconds = divmod(self.saved.mtime_ns, 10**9)
        path = self.path / SAVED
        when = f"touch -d @{seconds}.{nanoseconds:09} {path}"
        return f"write its content back, if that was changed, and then: {when}"

    def take_lease(self) -> Lease | None:
        """On the operator's file; None where pages are read from a private copy of it.

        Raises:
            LeaseRefusedError: it is being written to, or its file system gives none any more.
        """
        if self.saved.way != "lease":
            return None
        descriptor = open_below(self.path, SAVED)
        try:
            return Lease(descriptor, self.saved.path)
        finally:
            os.close(descriptor)

    def open_source(self, name: str, page_size_bytes: int) -> tuple[Source, int, bytearray]:
        """See :meth:`Image.open_source`.

        Raises:
            ImageError: the file was written to, cut short or replaced since it was looked through.
        """
        block = self.manifest.block(name)
        runs = self._read_runs(name)
        descriptor = open_below(self.path, SAVED)
        try:
            self._require_same(descriptor)
            source = SavedSource(
                descriptor,
                runs,
                block.size_bytes,
                self.manifest.target_page_size_bytes,
                self.saved.size_bytes,
                self.saved.mtime_ns,
            )
        except BaseException:
            os.close(descriptor)
            raise
        return source, 0, source.data_bitmap(page_size_bytes)

    def open_block(self, name: str) -> tuple[int, int]:
        """There is no page file."""
        raise ImageError(
            f"the pages of {self.saved.path} are not in an image",
            hint="make one: qemu-postcopy image import",
            block=name,
        )

    def verify(self, progress: Progress | None = None) -> None:
        """A save file has no checksums; all of its records were looked at when it was opened."""

    def _read_runs(self, name: str) -> bytes:
        block = self.manifest.block(name)
        pages = block.size_bytes // self.manifest.target_page_size_bytes
        with os.fdopen(open_below(self.path, block.file), "rb") as file:
            runs = file.read(pages * RUN_BYTES + 1)
        if len(runs) % RUN_BYTES or hashlib.sha256(runs).hexdigest() != block.segment_sha256[0]:
            raise ImageError(
                f"{self.path / block.file} was altered",
                hint="restore the save file again",
                block=name,
            )
        return runs

    def _require_same(self, descriptor: int) -> None:
        found, saved = os.fstat(descriptor), self.saved
        if (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns) != (
            saved.device,
            saved.inode,
            saved.size_bytes,
            saved.mtime_ns,
        ):
            raise ImageError(
                f"{saved.path} was written to since it is served: pages cannot be read from it",
                hint=f"a guest that lacks some waits: {self.put_back()}",
            )


def open_image(path: Path) -> Image:
    """An image, or a directory in which a save file is served in place.

    Raises:
        ImageError: it is neither, or is damaged.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        if manifest.saved is not None:
            return InPlaceImage(path, manifest)
    return Image.open(path)
