"""Where the memory of libvirt's QEMU is presumed to be; what is not presumed says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from qemu_postcopy.errors import AttachError
from qemu_postcopy.image.manifest import Block
from qemu_postcopy.libvirt.blocks import presume_layout
from qemu_postcopy.vm.process import ProcessIdentity

BACKEND = '{"qom-type":"memory-backend-memfd","id":"memvirtiomem0","size":134217728}'


def test_memory_behind_a_device_on_a_bus_is_refused_as_such() -> None:
    argv = ["qemu", "-object", BACKEND]
    identity = cast(ProcessIdentity, SimpleNamespace(cmdline=lambda: argv, maps=list))
    block = cast(
        Block, SimpleNamespace(name="0000:00:04.0//objects/memvirtiomem0", size_bytes=1 << 27)
    )
    with pytest.raises(AttachError, match="such as virtio-mem") as refused:
        presume_layout(identity, [block])
    assert "virsh restore" in (refused.value.hint or "")
