"""Fixtures of the binding's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest


@pytest.fixture
def background() -> Iterator[Callable[..., Future[Any]]]:
    """Runs a call in a thread; a test's descriptor is closed before this waits for the threads."""
    with ThreadPoolExecutor(8) as threads:
        yield threads.submit
