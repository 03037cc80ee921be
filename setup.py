"""The one thing pyproject.toml cannot say: cffi compiles the C core (API mode)."""

from setuptools import setup

setup(cffi_modules=["qemu_postcopy/_native/build.py:ffibuilder"])
