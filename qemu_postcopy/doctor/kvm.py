"""/dev/kvm: whether it can be opened, whether a virtual machine can be made, its page fault powers.

Numbers are those of include/uapi/linux/kvm.h; the calls are in Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from qemu_postcopy.doctor.report import Finding

AREA = "KVM"
DEVICE = Path("/dev/kvm")
KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03

#: name, number, what is lost without it
CAPABILITIES = (
    (
        "SYNC_MMU",
        16,
        "KVM does not follow changes of QEMU's mappings: lazy memory would be unsafe under KVM.",
    ),
    ("ASYNC_PF", 59, "A vCPU stands still on each missing page instead of running something else."),
    (
        "ASYNC_PF_INT",
        183,
        "Guests are not told by interrupt that a page came, so asynchronous page faults are off.",
    ),
)


def device_finding(found: str, errnum: int) -> Finding:
    return Finding(
        "kvm.device",
        AREA,
        "A virtual machine of KVM",
        "missing" if errnum else "ok",
        found,
        "Guests run by emulation (TCG), some ten times slower; paging works the same.",
        f"Add the user to the group that owns {DEVICE}, load kvm_intel or kvm_amd, or switch on"
        " virtualisation in the firmware (in a virtual machine: nested virtualisation)."
        if errnum
        else "",
        data={"errno": errnum},
    )


def probe() -> list[Finding]:
    """Opens the device, creates an empty virtual machine and asks for its capabilities."""
    try:
        kvm = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return [device_finding(f"{DEVICE}: {error.strerror}", error.errno or 1)]
    try:
        machine = fcntl.ioctl(kvm, KVM_CREATE_VM, 0)
        os.close(machine)
        levels = [fcntl.ioctl(kvm, KVM_CHECK_EXTENSION, number) for _, number, _ in CAPABILITIES]
    except OSError as error:
        return [device_finding(f"{DEVICE} opens, but: {error.strerror}", error.errno or 1)]
    finally:
        os.close(kvm)
    return [
        device_finding("one was created", 0),
        *(
            Finding(
                f"kvm.cap.{name}",
                AREA,
                f"KVM_CAP_{name}",
                "ok" if level > 0 else "missing",
                "there" if level > 0 else "not in this KVM",
                cost,
                "" if level > 0 else "Use a kernel whose KVM has it, or run guests by TCG.",
                data={"value": level},
            )
            for (name, _, cost), level in zip(CAPABILITIES, levels, strict=True)
        ),
    ]
