"""Builds the C core as the extension module ``qemu_postcopy._native._core`` (cffi, API mode).

Every ``*.c`` of this folder is compiled; the declarations that Python sees are cut out of the
``*.h`` files, between ``/* cdef-begin */`` and ``/* cdef-end */``, so they exist once only.
"""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
CDEF = re.compile(r"/\* cdef-begin \*/(.*?)/\* cdef-end \*/", re.DOTALL)
# Those whose types the others use come first.
FIRST = ("error.h", "source.h")
HEADERS = sorted(HERE.glob("*.h"), key=lambda path: (path.name not in FIRST, path.name))
SOURCES = sorted(path for path in HERE.glob("*.c") if path.name != "_core.c")
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]


def declarations() -> str:
    """The C declarations of all headers, as ``FFI.cdef`` takes them."""
    return "\n".join(part for path in HEADERS for part in CDEF.findall(path.read_text()))


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "qemu_postcopy._native._core",
    "\n".join(f'#include "{path.name}"' for path in HEADERS),
    sources=[f"qemu_postcopy/_native/{path.name}" for path in SOURCES],
    include_dirs=[str(HERE)],
    depends=[str(path) for path in HEADERS],
    extra_compile_args=FLAGS,
    libraries=["pthread"],
)
