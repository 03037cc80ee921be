"""What pyproject.toml cannot say: cffi compiles the C core, the preload library is plain C, and two
packages lie elsewhere.

``qemu_postcopy.images`` is the directory vm-images, ``qemu_postcopy.baseline`` is tests/bench: so
their place in the tree tells what they are for, and the wheel has them all the same.
"""

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ELSEWHERE = {"qemu_postcopy.images": "vm-images", "qemu_postcopy.baseline": "tests/bench"}

#: Loaded into QEMU, not into Python; it lies beside the core.
PRELOAD = Extension(
    "qemu_postcopy._native.preload",
    sources=["qemu_postcopy/_native/preload/preload.c"],
    extra_compile_args=[
        "-std=gnu11",
        "-O2",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fvisibility=hidden",
    ],
)


class BuildLibraries(build_ext):
    """Gives the preload library a plain name, without the mark of a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        *folders, name = fullname.split(".")
        if name == "preload":
            return "/".join([*folders, "qemu-postcopy-preload.so"])
        return super().get_ext_filename(fullname)


setup(
    ext_modules=[PRELOAD],
    cmdclass={"build_ext": BuildLibraries},
    cffi_modules=["qemu_postcopy/_native/build.py:ffibuilder"],
    packages=sorted({*find_packages(include=["qemu_postcopy", "qemu_postcopy.*"]), *ELSEWHERE}),
    package_dir=ELSEWHERE,
    # cffi builds against Python's stable interface: one wheel for this version and all later ones.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
