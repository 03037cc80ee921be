"""What rules a guest out: devices that pin its memory, and memory that nobody else may fill.

Asked by QMP before anything is changed; runs in the caller's event loop.
"""

from __future__ import annotations

from qemu_postcopy.vm.qmp import CommandError, Qmp

#: Prefixes of QOM types whose devices pin all guest memory for DMA (vfio_dma_map, vhost_vdpa).
PINNING_TYPES = ("vfio-", "vhost-vdpa-")
PINNED = (
    "it pins all guest memory at once, so nothing can be left to be paged in later: "
    "unplug it before the snapshot and plug it in again after the restore"
)
ENCRYPTED = "the guest's memory is encrypted: only the guest itself can fill it"


async def refusals(qmp: Qmp) -> list[str]:
    """Why this guest's memory cannot be paged on demand, a sentence each; empty if it can."""
    reasons = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for entry in await qmp.execute("qom-list", {"path": folder}):
            kind = entry["type"].removeprefix("child<").removesuffix(">")
            if kind.startswith(PINNING_TYPES):
                reasons.append(f"device {entry['name']} ({kind}): {PINNED}")
    # A vhost-vdpa net back-end is no QOM object; the human monitor alone lists it.
    if "type=vhost-vdpa" in await qmp.human("info network"):
        reasons.append(f"a vhost-vdpa network back-end: {PINNED}")
    guard = await _confidential_guest_support(qmp)
    if guard:
        reasons.append(f"confidential guest ({guard}): {ENCRYPTED}")
    elif await _sev_enabled(qmp):
        reasons.append(f"confidential guest (SEV): {ENCRYPTED}")
    return reasons


async def _confidential_guest_support(qmp: Qmp) -> str:
    """The type of the machine's guard object (`sev-guest`, `tdx-guest`), or ''."""
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


async def _sev_enabled(qmp: Qmp) -> bool:
    try:
        return bool((await qmp.execute("query-sev"))["enabled"])
    except CommandError:
        return False  # no such command on this architecture, or built without SEV
