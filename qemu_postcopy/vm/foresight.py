"""Where a launched QEMU has its memory, seen while it still starts and cannot be asked.

Between "launch" and "attach" of a launch: what is foreseen here is prepared for in the 15 ms until
QEMU answers, and then compared with what QEMU says.  Only the plainest case is foreseen, one memfd
of small pages that QEMU fills nothing of; every other guest is asked, which costs milliseconds and
nothing else.  Runs in a thread of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from qemu_postcopy.errors import PostcopyError
from qemu_postcopy.image.manifest import Manifest
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.process import ProcessIdentity, parse_maps
from qemu_postcopy.vm.spec import options_of

#: How QEMU names the memfd of a memory-backend-memfd (hostmem-memfd.c).
MEMFD_NAME = "/memfd:memory-backend-memfd"
SMALL_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
POLL_SECONDS = 0.003
#: Properties of the back-end that change nothing of where its memory lies and what is in it.
PLAIN_PROPERTIES = {"id", "size", "share"}
#: Options of QEMU that need no question, whatever their value is ...
PLAIN_OPTIONS = frozenset(
    [
        *(
            "L",
            "S",
            "accel",
            "append",
            "boot",
            "cpu",
            "display",
            "enable-kvm",
            "incoming",
            "initrd",
        ),
        *("kernel", "m", "name", "no-reboot", "no-user-config", "nodefaults", "nographic"),
        *("object", "rtc", "serial", "smp", "uuid", "vga"),
    ]
)
#: ... or as long as none of these is in it: what :func:`refusals.refusals` looks for is called so.
PLAIN_UNLESS_DOUBTFUL = frozenset(
    ["M", "blockdev", "chardev", "device", "drive", "machine", "netdev", "nic"]
)
DOUBTFUL = (
    *("vfio", "vhost", "vdpa", "proxy", "remote", "rdma", "nvme", "blkio", "gpu", "virtio-vga"),
    *("ivshmem", "guest-support", "encryption", "sev", "tdx"),
)


def foreseeable(argv: Sequence[str], manifest: Manifest) -> bool:
    """Whether a command line that the image's guest was once started with needs no questions when
    it is started so again.

    It makes one memfd of small pages for the image's one block, and nothing in it can be among what
    :func:`refusals.refusals` finds.  The program's name tells the architecture (one of another name
    is asked); the machine's type is in the stream, which QEMU loads into no other.
    """
    return (
        Path(argv[0]).name == f"qemu-system-{manifest.architecture}"
        and all(_is_plain(name, value) for name, value in options_of(argv))
        and _one_memfd(
            [value for name, value in options_of(argv) if name == "object" and value], manifest
        )
    )


def _is_plain(name: str, value: str | None) -> bool:
    doubtful = value is None or any(part in value for part in DOUBTFUL)
    return name in PLAIN_OPTIONS or (name in PLAIN_UNLESS_DOUBTFUL and not doubtful)


def _one_memfd(objects: Sequence[str], manifest: Manifest) -> bool:
    if len(objects) != 1 or len(manifest.blocks) != 1 or ",," in objects[0]:
        return False
    block = manifest.blocks[0]
    kind, *rest = objects[0].split(",")
    properties = dict(part.partition("=")[::2] for part in rest)
    return (
        kind == "memory-backend-memfd"
        and set(properties) <= PLAIN_PROPERTIES
        and properties.get("id") == block.name
        and properties.get("share", "on") == "on"
        and block.page_size_bytes == SMALL_PAGE_BYTES
    )


def foresee(
    identity: ProcessIdentity, manifest: Manifest, too_late: threading.Event
) -> RamBlock | None:
    """The one block of a QEMU for which :func:`foreseeable` holds, as soon as it is mapped.

    None where it does not show before ``too_late`` is set, or where more than one mapping would
    fit.
    """
    block = manifest.blocks[0]
    while not too_late.is_set():
        try:
            descriptor = _memfd(identity)
            if descriptor is not None:
                name = MEMFD_NAME.encode()
                lines = Path(f"/proc/{identity.pid}/maps").read_bytes().splitlines()
                found = parse_maps(b"\n".join(line for line in lines if name in line))
                if found and found[0].permissions.startswith("rw"):
                    mapping = found[0]
                    status = descriptor.stat()
                    device = os.major(status.st_dev), os.minor(status.st_dev)
                    if (
                        len(found) != 1
                        or mapping.end - mapping.start != block.size_bytes
                        or not mapping.shared
                        or mapping.file_key != (*device, status.st_ino)
                    ):
                        return None
                    return RamBlock(
                        name=block.name,
                        backend_id=block.name,
                        address=mapping.start,
                        size_bytes=block.size_bytes,
                        page_size_bytes=SMALL_PAGE_BYTES,
                        backing="memfd",
                        shared=True,
                        file_key=mapping.file_key,
                        file_path=str(descriptor),
                        file_offset_bytes=mapping.file_offset_bytes,
                    )
        except (OSError, PostcopyError):
            return None  # it has ended, or may not be looked at: whoever asks it is told why
        time.sleep(POLL_SECONDS)
    return None


def _memfd(identity: ProcessIdentity) -> Path | None:
    """/proc/PID/fd/N of the back-end's memfd, None before there is one: that is a cheaper question
    than all that a starting QEMU maps."""
    directory = f"/proc/{identity.pid}/fd"
    for name in os.listdir(directory):  # noqa: PTH208  (asked again and again)
        try:
            if os.readlink(f"{directory}/{name}").startswith(MEMFD_NAME):  # noqa: PTH115
                return Path(directory, name)
        except FileNotFoundError:
            continue  # closed meanwhile
    return None
