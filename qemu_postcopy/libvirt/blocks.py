"""Where a QEMU's memory lies, while its monitor is libvirt's and closed to everybody else.

Step "attach" of a restore by libvirt.  QEMU's command line names the memory back-ends, the kernel
its mappings; from both follows a presumption, which is registered and served.  Before the guest
runs :func:`qemu_postcopy.vm.layout.confirm` asks QEMU, whose monitor can be had by then, and a
guest whose memory was presumed wrongly never runs.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qemu_postcopy.errors import AttachError
from qemu_postcopy.image.manifest import Block
from qemu_postcopy.vm.layout import ListedBlock, RamBlock, describe_block
from qemu_postcopy.vm.process import Mapping, ProcessIdentity
from qemu_postcopy.vm.spec import bytes_of

KINDS = ("memory-backend-ram", "memory-backend-memfd", "memory-backend-file")


@dataclass(frozen=True)
class Backend:
    """A memory back-end on QEMU's command line; ``path`` is its file, or where QEMU makes one."""

    backend_id: str
    kind: str
    size_bytes: int
    path: str = ""


def backends_of(command_line: Sequence[str]) -> list[Backend]:
    """The memory back-ends of a QEMU command line, in its order.

    Raises:
        AttachError: one has no size that is understood.
    """
    found = []
    for option, text in itertools.pairwise(command_line):
        if option != "-object":
            continue
        values = _properties(text)
        if values.get("qom-type") not in KINDS:
            continue
        size = bytes_of(values.get("size"))
        if size is None:
            raise AttachError(
                f"the size of memory back-end {values.get('id')} is not understood: {text}",
                hint="restore this guest eagerly, by virsh restore",
            )
        path = str(values.get("mem-path", ""))
        found.append(Backend(str(values.get("id")), str(values["qom-type"]), size, path))
    return found


def _properties(text: str) -> dict[str, object]:
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}
    kind, *rest = text.split(",")
    return {"qom-type": kind, **dict(part.partition("=")[::2] for part in rest)}


def presume_layout(
    identity: ProcessIdentity, wanted: Sequence[Block], places: dict[str, int] | None = None
) -> list[RamBlock]:
    """The blocks of an image as they seem to lie in QEMU.

    Blocks that QEMU has beyond those of the image come with the device state, eagerly.

    Args:
        places: addresses of blocks, as far as they are known and need no presumption.

    Raises:
        AttachError: a block has no back-end, or no mapping can be its memory.
    """
    backends = {backend.backend_id: backend for backend in backends_of(identity.cmdline())}
    mappings = identity.maps()
    taken: set[int] = set()
    blocks = []
    for block in wanted:
        backend = backends.get(block.name.removeprefix("/objects/"))
        if backend is None and block.name.rpartition("/")[2] in backends:
            raise AttachError(
                f"memory {block.name} is behind a device on a bus, such as virtio-mem, and is not "
                "paged in domains of libvirt",
                hint="restore this guest eagerly, by virsh restore",
                block=block.name,
            )
        if backend is None or backend.size_bytes != block.size_bytes:
            have = ", ".join(f"{b.backend_id} {b.size_bytes >> 20} MiB" for b in backends.values())
            raise AttachError(
                f"QEMU has no memory back-end {block.name} of {block.size_bytes >> 20} MiB, as the "
                f"image wants it; it has {have or 'none'}",
                hint="the memory in the domain's XML must be as it was when the domain was saved",
                block=block.name,
            )
        place = (places or {}).get(block.name)
        known = [m for m in mappings if m.start == place] if place is not None else mappings
        mapping = _mapping_of(backend, known, taken)
        if mapping is None:
            raise AttachError(
                f"no mapping of QEMU's (PID {identity.pid}) can be the memory {block.name}",
                hint="restore this guest eagerly, by virsh restore",
                block=block.name,
            )
        taken.add(mapping.start)
        page_size = _page_size(mapping, identity)
        listed = ListedBlock(block.name, page_size, block.size_bytes, mapping.start)
        blocks.append(describe_block(listed, backend.backend_id, mapping.start, mappings, identity))
    return sorted(blocks, key=lambda block: block.name)


def _mapping_of(backend: Backend, mappings: Iterable[Mapping], taken: set[int]) -> Mapping | None:
    """The first mapping of that size and kind that no other block has.

    QEMU maps back-ends in the order of its command line, and the kernel maps each below the last.
    """
    fitting = [
        mapping
        for mapping in mappings
        if mapping.end - mapping.start == backend.size_bytes
        and mapping.permissions[:2] == "rw"
        and mapping.start not in taken
        and _is_of(backend, mapping)
    ]
    return max(fitting, key=lambda mapping: mapping.start, default=None)


def _is_of(backend: Backend, mapping: Mapping) -> bool:
    if backend.kind == "memory-backend-memfd":
        return mapping.path.startswith("/memfd:")
    if backend.kind == "memory-backend-file":
        return mapping.file_key is not None and not mapping.path.startswith("/memfd:")
    # Shared anonymous memory is a file of the kernel's own (shmem_zero_setup).
    return mapping.file_key is None or mapping.path.startswith(("/dev/zero", "/memfd:"))


def _page_size(mapping: Mapping, identity: ProcessIdentity) -> int:
    """Of the pages of that mapping, in bytes (KernelPageSize in proc_pid_smaps(5))."""
    begin = f"{mapping.start:x}-{mapping.end:x} "
    inside = False
    for line in identity.smaps().splitlines():
        if line.startswith(begin):
            inside = True
        elif inside and line.startswith("KernelPageSize:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE")
