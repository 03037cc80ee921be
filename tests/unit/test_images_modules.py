"""Which kernel modules a guest loads, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_postcopy.errors import HostError
from qemu_postcopy.images.modules import load_list, load_order


def module(directory: Path, name: str, *needs: str) -> None:
    (directory / name).write_bytes(b"\0license=GPL\0depends=" + ",".join(needs).encode() + b"\0")


def test_a_module_comes_after_all_that_it_needs_and_each_once(tmp_path: Path) -> None:
    module(tmp_path, "net.ko", "ring", "bus-core", "failover")
    module(tmp_path, "ring.ko", "bus_core")
    module(tmp_path, "bus-core.ko")
    order = load_order(tmp_path, ["net", "bus_core", "failover"])
    assert load_list(order) == b"net bus-core.ko ring.ko net.ko\nbus_core bus-core.ko\nfailover\n"


@pytest.mark.parametrize("content", [b"\xfd7zXZ", b"\0depends=self\0"])
def test_a_module_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "self.ko").write_bytes(content)
    with pytest.raises(HostError, match=r"self\.ko"):
        load_order(tmp_path, ["self"])
