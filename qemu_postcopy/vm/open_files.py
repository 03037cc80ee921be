"""QEMU's open files by their numbers: the cheapest sign that a device or memory was plugged in.

Step "serve" of the flow.  QEMU tells nobody of `device_add`; but every device that shares or pins
guest memory has QEMU open something: the connection to its back-end, /dev/vfio, an event descriptor
for each virtual queue (vhost_virtqueue_init in hw/virtio/vhost.c).  Listing the numbers takes some
20 us, needs no right to trace QEMU, and does not disturb it, unlike a question to its monitor.
What was opened is not looked at: that would need such rights.  Trusts the kernel only.
"""

from __future__ import annotations

import os
from pathlib import Path

#: State of a connected socket in /proc/net/unix (SS_CONNECTED, include/uapi/linux/net.h).
CONNECTED = b" 03 "


class OpenFiles:
    """What one process has open.

    Args:
        pid: QEMU's, whose life is the caller's to watch.
        monitor: path of the socket of its monitor, whose clients come and go; or ''.

    Raises: OSError where it may not be looked at.
    """

    def __init__(self, pid: int, monitor: str) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        self._needle = b" " + os.fsencode(monitor)
        self._directory = os.open(f"/proc/{pid}/fd", flags)
        self._numbers = self._look()
        self._clients = self._count_clients()

    def opened(self) -> bool:
        """Whether since the last call something was opened that is no client of the monitor."""
        numbers = self._look()
        if numbers == self._numbers:
            return False
        clients = self._count_clients()
        came = max(0, clients - self._clients)
        opened = len(numbers - self._numbers)
        self._numbers, self._clients = numbers, clients
        return opened > came

    def close(self) -> None:
        """Does not touch the process."""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1

    def _look(self) -> frozenset[str]:
        try:
            return frozenset(os.listdir(self._directory))  # noqa: PTH208
        except OSError:  # it has ended (ENOENT)
            return frozenset()

    def _count_clients(self) -> int:
        """Connections that QEMU has accepted on its monitor: they have its path as their name."""
        if len(self._needle) == 1:
            return 0
        lines = Path("/proc/net/unix").read_bytes().splitlines()
        return sum(line.endswith(self._needle) and CONNECTED in line for line in lines)
