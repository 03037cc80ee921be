"""QEMU's open files by their numbers: the cheapest sign that a device or memory was plugged in.

Step "serve" of the flow.  QEMU tells nobody of `device_add`; but every device that shares or pins
guest memory has QEMU open something: the connection to its back-end, /dev/vfio, an event descriptor
for each virtual queue (vhost_virtqueue_init in hw/virtio/vhost.c).  Counting them takes a
microsecond, listing them 20; neither needs a right to trace QEMU, or disturbs it as a question to
its monitor would.  What was opened is not looked at: that would need such rights.  A C function
looks in a thread (_native/descriptors.c), all else is of one event loop.  Trusts the kernel only.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from qemu_postcopy._native import check, ffi, lib, new_error

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
        self._stop = -1
        self._thread: threading.Thread | None = None
        # Whoever lists a directory moves its offset: one for each thread.
        self._directory = os.open(f"/proc/{pid}/fd", flags)
        self._watched = os.open(f"/proc/{pid}/fd", flags)
        self._known = ffi.new("struct qpc_descriptors *")
        try:
            error = new_error()
            check(lib.qpc_descriptors_read(self._watched, self._known, error), error)
        except BaseException:
            self.close()
            raise
        self._numbers = self._look()
        self._clients = self._count_clients()

    def watch(self, told: Callable[[], None], period_seconds: float) -> None:
        """From now on ``told`` is called in the event loop when :meth:`opened` is to be asked.

        Looks this often, in a thread that ends by :meth:`close`, or when the process does.
        """
        self._stop = os.eventfd(0)
        loop = asyncio.get_running_loop()
        period_us = round(period_seconds * 1e6)

        def look() -> None:
            error = new_error()
            wait = lib.qpc_descriptors_wait
            while wait(self._watched, self._stop, period_us, self._known, error) > 0:
                with suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(told)

        self._thread = threading.Thread(target=look, name="open files", daemon=True)
        self._thread.start()

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
        """Ends the thread.  Does not touch the process."""
        if self._thread is not None:
            os.eventfd_write(self._stop, 1)
            self._thread.join()
            self._thread = None
        for descriptor in (self._directory, self._watched, self._stop):
            if descriptor >= 0:
                os.close(descriptor)
        self._directory = self._watched = self._stop = -1

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
