"""What pyproject.toml cannot say: cffi compiles the C core, and two packages lie elsewhere.

``qemu_postcopy.images`` is the directory vm-images, ``qemu_postcopy.baseline`` is tests/bench: so
their place in the tree tells what they are for, and the wheel has them all the same.
"""

from setuptools import find_packages, setup

ELSEWHERE = {"qemu_postcopy.images": "vm-images", "qemu_postcopy.baseline": "tests/bench"}

setup(
    cffi_modules=["qemu_postcopy/_native/build.py:ffibuilder"],
    packages=sorted({*find_packages(include=["qemu_postcopy", "qemu_postcopy.*"]), *ELSEWHERE}),
    package_dir=ELSEWHERE,
    # cffi builds against Python's stable interface: one wheel for this version and all later ones.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
