"""The guests of tests/vm, and micro guests under each accelerator."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kvm.micro import KVM, TCG, Accelerator
from vm.conftest import lab

from qemu_postcopy.images.micro_guest import MicroGuest, build_micro_guest

__all__ = ["lab"]


@pytest.fixture(scope="session")
def micro_cache() -> Path | None:
    """Where ROMs are kept; None for the usual place."""
    cache = os.environ.get("QPC_CACHE")
    return Path(cache) if cache else None


@pytest.fixture(scope="session")
def micro_guest(micro_cache: Path | None) -> MicroGuest:
    """The ROM, built on first use; ``needs("cc")`` goes with it."""
    return build_micro_guest(micro_cache)


@pytest.fixture(
    params=[
        pytest.param(KVM, marks=pytest.mark.needs("kvm")),
        TCG,
    ],
    ids=lambda accelerator: accelerator.name,
)
def accelerator(request: pytest.FixtureRequest) -> Accelerator:
    """Each way to run the guest's instructions."""
    made = request.param
    assert isinstance(made, Accelerator)
    return made
