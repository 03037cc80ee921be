"""What rules a guest out: devices that pin its memory, and memory that nobody else may fill.

Asked by QMP before anything is changed; runs in the caller's event loop.

Not refused, since they reach guest memory through QEMU's own address space, where a missing page is
waited for: vhost in the kernel (vhost-net, vhost-scsi, vhost-vsock), 9p, every block driver but
those below.  The memory of an ivshmem-plain device is a back-end like another: it is refused only
if somebody else maps it (see emptiness.py); that of an ivshmem-doorbell device is not paged.
"""

from __future__ import annotations

import asyncio

from qemu_postcopy.vm.monitor import CommandError, Monitor

#: Prefixes of QOM types whose devices pin all guest memory for DMA (vfio_dma_map, vhost_vdpa).
PINNING_TYPES = ("vfio-", "vhost-vdpa-")
PINNED = (
    "it pins all guest memory at once, so nothing can be left to be paged in later: "
    "unplug it before the snapshot and plug it in again after the restore"
)
#: Prefixes of QOM types whose devices are served by another process that maps guest memory.
SHARING_TYPES = ("vhost-user-", "x-pci-proxy-dev")
#: The same for objects without a device: cryptodev-vhost-user serves a virtio-crypto device, the
#: others hand guest memory to another process (hw/remote/ of QEMU).
SHARING_OBJECTS = ("cryptodev-vhost-user", "vhost-user-backend", "x-remote-object", "x-vfio-user-")
SHARED = (
    "its back-end process maps guest memory too, and would read zeros where a page is missing: "
    "unplug it before the snapshot and plug it in again when the guest has all of its memory"
)
#: Block drivers that reach their disk by DMA of their own: QEMU maps each RAM block for it as it
#: appears (qemu_vfio_ram_block_added in util/vfio-helpers.c; block/blkio.c).
PINNING_DRIVERS = ("nvme", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa")
SHARING_DRIVERS = ("virtio-blk-vhost-user",)
REMAPPING_TYPES = ("pvrdma",)
REMAPPED = (
    "it maps guest memory a second time for RDMA, where a missing page would not be noticed: "
    "unplug it before the snapshot and plug it in again when the guest has all of its memory"
)
#: Prefixes of QOM types that may hand guest memory to the host's graphics as it lies in its file
#: (blob=on, hw/display/virtio-gpu-udmabuf.c); the kernel makes missing pages there, with no fault.
BLOB_TYPES = ("virtio-gpu", "virtio-vga")
BLOB = (
    "blob=on has the kernel take guest memory out of its file (udmabuf), where a missing page "
    "would become zeros unnoticed: leave blob=on out"
)
ENCRYPTED = "the guest's memory is encrypted: only the guest itself can fill it"


async def refusals(qmp: Monitor) -> list[str]:
    """Why this guest's memory cannot be paged on demand, a sentence each; empty if it can."""
    # Asked all at once: QEMU answers in order, and each answer alone costs a round trip.
    plugged, built_in, objects, nodes, network, guard = await asyncio.gather(
        qmp.execute("qom-list", {"path": "/machine/peripheral"}),
        qmp.execute("qom-list", {"path": "/machine/peripheral-anon"}),
        qmp.execute("qom-list", {"path": "/objects"}),
        qmp.execute("query-named-block-nodes", {"flat": True}),
        qmp.human("info network"),
        _confidential_guest_support(qmp),
    )
    reasons = []
    for folder, entry in [("peripheral", e) for e in plugged] + [
        ("peripheral-anon", e) for e in built_in
    ]:
        kind = entry["type"].removeprefix("child<").removesuffix(">")
        if kind.startswith(PINNING_TYPES):
            reasons.append(f"device {entry['name']} ({kind}): {PINNED}")
        elif kind.startswith(SHARING_TYPES):
            reasons.append(f"device {entry['name']} ({kind}): {SHARED}")
        elif kind.startswith(REMAPPING_TYPES):
            reasons.append(f"device {entry['name']} ({kind}): {REMAPPED}")
        elif kind.startswith(BLOB_TYPES) and await _has_blob(qmp, f"{folder}/{entry['name']}"):
            reasons.append(f"device {entry['name']} ({kind}): {BLOB}")
    for entry in objects:
        kind = entry["type"].removeprefix("child<").removesuffix(">")
        if kind.startswith(SHARING_OBJECTS):
            reasons.append(f"object {entry['name']} ({kind}): {SHARED}")
    for node in nodes:
        if node["drv"] in PINNING_DRIVERS:
            reasons.append(f"disk {node['node-name']} (driver {node['drv']}): {PINNED}")
        elif node["drv"] in SHARING_DRIVERS:
            reasons.append(f"disk {node['node-name']} (driver {node['drv']}): {SHARED}")
    # Network back-ends are no QOM objects; the human monitor alone lists them.
    if "type=vhost-vdpa" in network:
        reasons.append(f"a vhost-vdpa network back-end: {PINNED}")
    if "type=vhost-user" in network:
        reasons.append(f"a vhost-user network back-end: {SHARED}")
    if guard:
        reasons.append(f"confidential guest ({guard}): {ENCRYPTED}")
    return reasons


async def _has_blob(qmp: Monitor, device: str) -> bool:
    try:
        return bool(
            await qmp.execute("qom-get", {"path": f"/machine/{device}", "property": "blob"})
        )
    except CommandError:
        return False  # a device without that property


async def _confidential_guest_support(qmp: Monitor) -> str:
    """The type of the machine's guard object (`sev-guest`, `tdx-guest`), or ''.

    Every encrypted guest has one since QEMU 6.0; `memory-encryption=` is another word for it.
    """
    try:
        path = await qmp.execute(
            "qom-get", {"path": "/machine", "property": "confidential-guest-support"}
        )
    except CommandError:
        return ""  # a machine without that property
    if not path:
        return ""
    kind: str = await qmp.execute("qom-get", {"path": path, "property": "type"})
    return kind
