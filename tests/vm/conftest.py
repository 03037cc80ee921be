"""The fixtures of guests; see guests.py for what can be done with them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, shared_snapshots


@pytest.fixture
def lab(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    reserve_huge_pages: Callable[[int], None],
) -> Iterator[Lab]:
    """Boots and restores guests whose run directories lie in the test's own directory."""
    monkeypatch.setenv("QEMU_POSTCOPY_RUN_DIR", str(run_dir / "run"))
    # What other tests' guests wanted first must not be filled ahead in this one's.
    monkeypatch.setenv("QEMU_POSTCOPY_CACHE_DIR", str(run_dir / "cache"))
    made = Lab(run_dir, reserve_huge_pages)
    yield made
    made.close()


@pytest.fixture
def snapshots(request: pytest.FixtureRequest) -> SharedSnapshots:
    """Snapshots that tests share; not to be written to."""
    return shared_snapshots(request.config)


@pytest.fixture
def qemu() -> Path:
    """The host's own QEMU, for what does not depend on the version."""
    return Path(shutil.which("qemu-system-x86_64") or "qemu-system-x86_64")
