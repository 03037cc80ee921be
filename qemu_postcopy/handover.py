"""A session whose descriptor and layout come from the VMM itself: no QEMU is launched or asked.

    take -> attach -> serve -> loaded, running (the VMM does both when it likes) -> complete
    -> gone, or detached

The order is the session's.  The VMM has registered its memory, loads its own state and lets its
guest run, so from the handshake on there is a guest to lose: its memory is never unregistered
before all of it is there.  Where this process dies the descriptor lives on in a keeper
(``sidecar/keeper.py``), and in the VMM where that keeps it, as Firecracker does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from qemu_postcopy.errors import AttachError, HostError, PostcopyError
from qemu_postcopy.image.memory_file import MemoryFile, region_name
from qemu_postcopy.session import Session, SessionOptions, State, StateChange
from qemu_postcopy.sidecar import keeper
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord
from qemu_postcopy.vm.attach import TakenDescriptor
from qemu_postcopy.vm.handshake import Region
from qemu_postcopy.vm.handshake_socket import Handshake, find_copy, take_copy
from qemu_postcopy.vm.layout import RamBlock
from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)


def regions_of(record: SessionRecord) -> list[Region]:
    """The regions that a VMM has handed over, as an earlier session recorded them."""
    return [
        Region(b["address"], b["size_bytes"], b["file_offset_bytes"], b["page_size_bytes"])
        for b in record.blocks
    ]


class HandoverSession(Session):
    """See the module; for :meth:`take` or, after a death, :meth:`take_again` or ``take_over``."""

    def __init__(
        self,
        memory: MemoryFile,
        regions: list[Region],
        run: RunDirectory,
        options: SessionOptions,
        listener: Callable[[StateChange], None] | None = None,
    ) -> None:
        super().__init__(memory.view(regions), run, options, listener)
        self.attached_by = "handshake"
        self._layout = [
            RamBlock(
                name=region_name(index),
                backend_id=region_name(index),
                address=region.address,
                size_bytes=region.size_bytes,
                page_size_bytes=region.page_size_bytes,
                backing="anonymous",
                shared=False,
                file_key=None,
                file_path=None,
                # Of no file of the VMM's, but of the memory file: whoever takes over needs it.
                file_offset_bytes=region.offset_bytes,
            )
            for index, region in enumerate(regions)
        ]

    def take(self, handshake: Handshake) -> None:
        """Makes what was handed over the session's own, and has a keeper hold a copy, if it can.

        Only while this process has one thread.
        """
        self._require(State.FOUND)
        number = find_copy(handshake.identity, handshake.userfaultfd)
        taken = TakenDescriptor(handshake.userfaultfd, number, tid=0, wait_ns=0, stop_ns=0)
        self._own(handshake.identity, taken)
        try:
            keeper.start(self.run.keeper_socket, self._userfaultfd, handshake.identity.pidfd)
        except (HostError, OSError) as error:
            # A VMM that is given up now, and keeps no copy, would run on with zeros at once.
            log.error("if this server dies a VMM without a copy is lost: %s", error)
        self._enter(State.FOUND)

    def take_again(self, record: SessionRecord) -> None:
        """The same from the keeper or the VMM, where a server died before it served anything."""
        self._require(State.FOUND)
        identity = ProcessIdentity.open(record.pid, record.start_time)
        try:
            taken = self._take_left(identity, record)
        except BaseException:
            identity.close()
            raise
        self._own(identity, taken)
        self._enter(State.FOUND)

    def _own(self, identity: ProcessIdentity, taken: TakenDescriptor) -> None:
        self.identity = identity
        self._cleanup.callback(identity.close)
        self._unsettled = True
        self._keep_userfaultfd(taken)
        os.set_blocking(self._userfaultfd, False)

    def _take_left(self, identity: ProcessIdentity, record: SessionRecord) -> TakenDescriptor:
        try:
            return TakenDescriptor(
                keeper.take(self.run.keeper_socket), record.userfaultfd, tid=0, wait_ns=0, stop_ns=0
            )
        except PostcopyError as error:
            if record.userfaultfd < 0:
                raise AttachError(
                    f"the userfaultfd of {self.run.name} is lost: {error.message}, and the VMM "
                    "has kept no copy",
                    hint="its memory is not whole and never will be: end that VMM, and resume it "
                    "from the same image",
                    vm=identity.pid,
                ) from error
            log.warning("%s; taking the VMM's own copy", error.message)
        try:
            return take_copy(identity, record.userfaultfd)
        except PostcopyError as error:
            raise AttachError(
                f"the copy of its userfaultfd cannot be had from the VMM: {error.message}",
                hint="run as root with CAP_SYS_PTRACE; the VMM waits until then",
                vm=identity.pid,
            ) from error

    def attach(self) -> None:
        """Nothing is to be taken: all came with the handshake."""
        self._enter(State.ATTACHED)

    def _register(self) -> None:
        """The VMM has negotiated and registered, with the modes that it wants."""

    def _unregister_empty(self) -> None:
        """Never: the VMM has a guest, which would run on with zeros.  It waits."""

    async def load_device_state(self) -> None:
        """The VMM loads its own, and may have touched memory already."""
        self._require(State.LOADED)
        self._load_begun = True
        self._enter(State.LOADED)

    async def resume(self) -> None:
        """The VMM lets its guest run when it likes."""
        self._enter(State.RUNNING)
        self._unsettled = False

    async def settle(self, record: SessionRecord) -> bool:
        """There is a guest, and nobody to be asked about it."""
        self._enter(State.LOADED)
        self._unsettled = False
        self._enter(State.RUNNING)
        return False

    def detach(self) -> None:
        """Unregisters the VMM's memory, all of which is there; nobody needs a keeper then."""
        super().detach()
        keeper.end(self.run.keeper_socket)

    def gone(self) -> None:
        """The VMM has ended after it had all of its memory."""
        self._enter(State.GONE)
