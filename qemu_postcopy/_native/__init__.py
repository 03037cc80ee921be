"""The C core, as Python sees it: the one module that imports the extension.

``ffi`` and ``lib`` are cffi's; :func:`check` turns a failed call into an exception by one table.
Calls release the GIL (cffi API mode does so for every function).
"""

from __future__ import annotations

import os
from typing import Any, NoReturn

from qemu_postcopy import errors
from qemu_postcopy._native import _core  # type: ignore[attr-defined]

ffi: Any = _core.ffi
lib: Any = _core.lib

#: enum qpc_code -> exception; tests/unit/test_native_table.py proves it complete.
EXCEPTIONS: dict[int, type[errors.PostcopyError]] = {
    lib.QPC_SYSTEM: errors.HostError,
    lib.QPC_INVALID: errors.UsageError,
    lib.QPC_FORMAT: errors.ImageError,
    lib.QPC_TIMEOUT: errors.AttachTimeoutError,
    lib.QPC_GONE: errors.TargetGoneError,
    lib.QPC_REFUSED: errors.AttachError,
    lib.QPC_UNSUPPORTED: errors.HostError,
}


def new_error() -> Any:
    """A fresh ``struct qpc_error *`` to hand to a call."""
    return ffi.new("struct qpc_error *")


def raise_error(error: Any, hint: str = "") -> NoReturn:
    """Raises the exception that ``error`` stands for.

    A failed system call keeps its OSError as the cause, so ``__cause__.errno`` tells which.
    """
    message = ffi.string(error.message).decode(errors="replace")
    cause = OSError(error.errnum, os.strerror(error.errnum)) if error.errnum else None
    if cause is not None:
        message = f"{message}: {cause.strerror}"
    raise EXCEPTIONS[error.code](message, hint=hint) from cause


def check(result: int, error: Any, hint: str = "") -> int:
    """Returns ``result`` unless it is negative; then raises what ``error`` says."""
    if result < 0:
        raise_error(error, hint)
    return result
