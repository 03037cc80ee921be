"""Sources of page data, as the control plane holds them; the pager's threads read them in C.

The contract (who may read when, what an error means) is in ``_native/source.h``.  An object here is
only a handle: made before the pager, closed after it.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from qemu_postcopy._native import ffi, lib, new_error, raise_error


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
