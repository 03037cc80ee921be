"""The gate in front of a QEMU that libvirt restores: a FIFO that hands the stream out step by step.

libvirt reads a save file's header and XML, starts QEMU and has it read the rest from the same
descriptor.  Here that file is a FIFO: whoever opens it is given the header; the first words of the
stream are given to a QEMU only, and when it has taken them its memory is there and its load has
begun; the rest follows when that memory is served.  Nothing is timed: who opens and closes the
FIFO inotify(7) tells, that everything was taken the pipe itself (it has one slot, pipe(7)).
libvirt may look at the file as often as it likes (11.3 does so twice, 9.0 once); one that reads
otherwise than by whole headers is refused.  For one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import struct
import termios
from pathlib import Path
from typing import Any

from qemu_postcopy.errors import AttachError, HostError, LibvirtError
from qemu_postcopy.libvirt.connection import qemu_of
from qemu_postcopy.sidecar.rundir import end_fifo

#: fcntl(2), inotify(7)
F_SETPIPE_SZ = 1031
IN_CLOSE_WRITE, IN_CLOSE_NOWRITE, IN_OPEN = 0x8, 0x10, 0x20
ONE_SLOT_BYTES = 4096
WIDE_BYTES = 1 << 20
#: How often it is looked for a QEMU that has the FIFO: nobody tells of it.
LOOK_SECONDS = 0.005
#: How long libvirt may take to start QEMU, or QEMU to begin to read.
START_SECONDS = 300.0


class Gate:
    """One FIFO, for one restore.

    Args:
        path: where it is made; in a directory that others cannot enter.
        head: the save file's header and XML (:func:`pack_save_head`).
    """

    def __init__(self, path: Path, head: bytes) -> None:
        self.path = path
        self._head = head
        self._restoring: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._fed = False
        self._opened = self._closed = self._given = 0
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        # Both ends, so that neither opening waits, and what was written outlives a reader.
        self._fifo = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._inotify = -1
        try:
            fcntl.fcntl(self._fifo, F_SETPIPE_SZ, ONE_SLOT_BYTES)
            self._watch()
        except OSError as error:
            self.close()
            raise HostError(
                f"the FIFO {path} cannot be watched: {error.strerror}",
                hint="raise fs.inotify.max_user_instances",
            ) from error

    def watch_call(self, restoring: asyncio.Future[Any]) -> None:
        """libvirt's call: when it ends, with an error or without, nobody reads any more."""
        self._restoring = restoring
        restoring.add_done_callback(lambda _: self._wake.set())

    def _watch(self) -> None:
        # Python has no inotify.
        libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = IN_OPEN | IN_CLOSE_WRITE | IN_CLOSE_NOWRITE
        if (
            self._inotify < 0
            or libc.inotify_add_watch(self._inotify, os.fsencode(self.path), mask) < 0
        ):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self._loop.add_reader(self._inotify, self._count)

    def _count(self) -> None:
        """struct inotify_event: watch, mask, cookie, length of a name (none here)."""
        with contextlib.suppress(BlockingIOError):
            events = os.read(self._inotify, 4096)
            for at in range(0, len(events), 16):
                (mask,) = struct.unpack_from("=I", events, at + 4)
                self._opened += bool(mask & IN_OPEN)
                self._closed += bool(mask & (IN_CLOSE_WRITE | IN_CLOSE_NOWRITE))
        self._wake.set()

    async def admit(self, first: bytes) -> int:
        """Returns the PID of the QEMU that loads from here, when it has taken ``first``.

        Raises:
            LibvirtError: libvirt refused the restore, or reads in a way that is not known.
            AttachError: no QEMU came.
        """
        try:
            async with asyncio.timeout(START_SECONDS):
                pid = await self._await_qemu()
                await self._put(first)
        except TimeoutError as error:
            raise AttachError(
                f"libvirt has started no QEMU that reads within {START_SECONDS:g} s",
                hint="see libvirt's log; restore this file by virsh restore",
            ) from error
        return pid

    async def _await_qemu(self) -> int:
        found = os.fstat(self._fifo)
        key = (found.st_dev, found.st_ino)
        while True:
            self._require_call()
            self._wake.clear()
            if self._given < self._opened:
                self._require_untouched()
                self._given += 1
                await self._put(self._head)
                continue
            if self._closed >= self._opened:  # nobody has it open: the next look, or an error
                self._require_untouched()
                await self._wake.wait()
                continue
            if pid := qemu_of("", key):
                return pid
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_SECONDS)

    def _require_call(self) -> None:
        """Raises what libvirt's call has ended with."""
        if self._restoring.done():
            self._restoring.result()
            raise LibvirtError(
                "libvirt has restored without reading the stream",
                hint="this libvirt is not known: restore by virsh restore",
            )

    def _require_untouched(self) -> None:
        """Whoever read before has read whole headers, and nothing is left of them."""
        if self._unread():
            raise LibvirtError(
                "this libvirt reads save files in a way that is not known",
                hint="restore by virsh restore, and report libvirt's version",
            )

    def _unread(self) -> int:
        count = bytearray(4)
        fcntl.ioctl(self._fifo, termios.FIONREAD, count)
        return int.from_bytes(count, "little")

    async def feed(self, descriptor: int, offset_bytes: int) -> None:
        """Hands out the rest, from that offset of a file on, and waits until libvirt is done.

        Raises:
            LibvirtError: the load failed; libvirt has ended QEMU then.
        """
        fcntl.fcntl(self._fifo, F_SETPIPE_SZ, WIDE_BYTES)
        while part := os.pread(descriptor, 1 << 16, offset_bytes):
            offset_bytes += len(part)
            if not await self._put(part, taken=False):
                break
        self._fed = True
        self.close()
        await self._restoring

    async def _put(self, data: bytes, *, taken: bool = True) -> bool:
        """Writes all of it; returns when a reader has ``taken`` it, or false if there is none."""
        view = memoryview(data)
        while not self._restoring.done():
            if view:
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(self._fifo, view) :]
                    continue
            elif not taken or not self._unread():
                return True
            await self._writable()
        if taken:
            self._require_call()
        return False

    async def _writable(self) -> None:
        """Until a slot is free, or libvirt's call has ended."""
        self._loop.add_writer(self._fifo, self._wake.set)
        try:
            self._wake.clear()
            if not self._restoring.done():
                await self._wake.wait()
        finally:
            self._loop.remove_writer(self._fifo)

    def close(self) -> None:
        """Whoever still reads sees the end of the file.  A second call does nothing."""
        if self._inotify >= 0:
            self._loop.remove_reader(self._inotify)
            os.close(self._inotify)
            self._inotify = -1
        if self._fifo >= 0:
            if self._fed:
                self.path.unlink(missing_ok=True)
            else:
                end_fifo(self.path, self._fifo)
            os.close(self._fifo)
            self._fifo = -1
