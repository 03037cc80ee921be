"""Sources of page data, as the control plane holds them; the pager's threads read them in C.

The contract (who may read when, what an error means) is in ``_native/source.h``.  An object here is
only a handle: made before the pager, closed after it.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

from qemu_postcopy._native import ffi, lib, new_error, raise_error
from qemu_postcopy.errors import HostError


class Source:
    """Something that page data can be read from.  Close it after every pager that uses it.

    Args:
        handle: a ``struct qpc_source *``, owned by the new object.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    @property
    def handle(self) -> Any:
        """The C object.

        Raises:
            ValueError: it was closed.
        """
        if self._handle == ffi.NULL:
            raise ValueError("the source is closed")
        return self._handle

    def disown(self) -> None:
        """Another source has taken it over, and closes it."""
        self._handle = ffi.NULL

    def read(self, offset_bytes: int, size_bytes: int) -> bytes:
        """All of a range in which there is data; blocks.

        Raises:
            HostError: it cannot be had.
        """
        data = bytearray(size_bytes)
        buffer = ffi.from_buffer(data)
        number = lib.qpc_source_read_once(self.handle, offset_bytes, size_bytes, buffer)
        if number:
            raise HostError(
                f"page data cannot be read at {offset_bytes}: {os.strerror(number)}",
                hint="look at the file system that it is on",
            )
        return bytes(data)

    def close(self) -> None:
        """Frees it and what it holds; may be called twice."""
        lib.qpc_source_close(self._handle)
        self._handle = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class FileSource(Source):
    """A regular file.  Takes the descriptor over: it is closed with the source.

    Raises:
        UsageError: that cannot be a descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        error = new_error()
        handle = lib.qpc_source_open_file(descriptor, error)
        if handle == ffi.NULL:
            raise_error(error)
        super().__init__(handle)


class SavedSource(Source):
    """One block of a save file that is served in place.  Takes the descriptor over.

    Args:
        runs: packed ``struct qpc_saved_run``, see ``_native/saved_pages.h``.
        size_bytes, page_size_bytes: of the block, and of the stream's pages.
        file_size_bytes, mtime_ns: what the file must be still.

    Raises:
        ImageError: the runs are damaged.
    """

    def __init__(
        self,
        descriptor: int,
        runs: bytes,
        size_bytes: int,
        page_size_bytes: int,
        file_size_bytes: int,
        mtime_ns: int,
    ) -> None:
        error = new_error()
        identity = ffi.new("struct qpc_saved_identity *")
        identity.size = file_size_bytes
        identity.mtime_seconds, identity.mtime_nanoseconds = divmod(mtime_ns, 10**9)
        self._runs = ffi.from_buffer("struct qpc_saved_run[]", runs)
        self._page_size_bytes = page_size_bytes
        self._size_bytes = size_bytes
        handle = lib.qpc_source_open_saved(
            descriptor, self._runs, len(self._runs), size_bytes, page_size_bytes, identity, error
        )
        if handle == ffi.NULL:
            raise_error(error, hint="restore the save file again")
        super().__init__(handle)

    def data_bitmap(self, page_size_bytes: int) -> bytearray:
        """One bit per page of that size, least significant first: whether any of it has data."""
        bitmap = bytearray((self._size_bytes // page_size_bytes + 7) // 8)
        lib.qpc_saved_data_bitmap(
            self._runs,
            len(self._runs),
            self._page_size_bytes,
            page_size_bytes,
            ffi.from_buffer(bitmap),
        )
        return bitmap
