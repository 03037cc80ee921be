"""Fixtures of the pager's tests: a real userfaultfd, and another process that does the faulting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from paging.handed_over import compile_vmm, make_memory_file
from paging.mapper_process import compile_mapper
from paging.served_guest import ServedGuest

HUGE_PAGE_BYTES = 2 << 20


@pytest.fixture(scope="session")
def mapper_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mapper.c, compiled once."""
    return compile_mapper(tmp_path_factory.mktemp("mapper"))


@pytest.fixture(scope="session")
def memory_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What serves a VMM of vmm.c."""
    return make_memory_file(tmp_path_factory.mktemp("memory") / "mem")


@pytest.fixture(scope="session")
def vmm_binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vmm.c, compiled once."""
    return compile_vmm(tmp_path_factory.mktemp("vmm"))


@pytest.fixture
def serve(
    mapper_binary: Path, run_dir: Path, reserve_huge_pages: Callable[[int], None]
) -> Iterator[Callable[..., ServedGuest]]:
    """Makes a guest that is served; see ServedGuest for the arguments."""
    with ExitStack() as stack:

        def make(**arguments: Any) -> ServedGuest:
            if arguments.get("memory") == "hugetlb":
                reserve_huge_pages(arguments["pages"] * HUGE_PAGE_BYTES)
            return stack.enter_context(ServedGuest(mapper_binary, run_dir, **arguments))

        yield make
