"""The ways to get at a launched QEMU's memory: by tracing it, or by a library that it loads.

Step "attach" of a launch.  A way yields the userfaultfd, its number in QEMU, and whom to ask what
QEMU maps; all that follows is the same for both.  Chosen before QEMU is started, by asking the
kernel and not by guessing from users and capabilities.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from qemu_postcopy._native import lib, new_error
from qemu_postcopy.errors import AttachError

# What a way needs is imported when it is used: QEMU is started before anything slow is imported.
if TYPE_CHECKING:
    from qemu_postcopy.vm.attach import TakenDescriptor
    from qemu_postcopy.vm.layout import RamBlock
    from qemu_postcopy.vm.process import ProcessIdentity

log = logging.getLogger(__name__)

WayName = Literal["ptrace", "preload"]
WayChoice = Literal["auto", "ptrace", "preload"]
CHOICES: tuple[WayChoice, ...] = ("auto", "ptrace", "preload")


class AttachWay(Protocol):
    """How a launched QEMU is got at.  Each method is called once, in this order."""

    name: WayName
    #: whether its failure ends QEMU, so is the reason if QEMU does not come up
    ends_qemu: bool

    def environment(self) -> Mapping[str, str] | None:
        """What QEMU is to be started with; None for ours."""

    def take(self, identity: ProcessIdentity) -> TakenDescriptor:
        """Takes the userfaultfd while QEMU starts; blocks, in a thread of its own."""

    def settle(self) -> None:
        """QEMU answers, or has ended: :meth:`take` is to return soon.  From another thread."""

    def target(self, identity: ProcessIdentity) -> ProcessIdentity:
        """Whom to ask what QEMU maps; the caller closes it if it is another than ``identity``."""

    def require_complete(self, blocks: Sequence[RamBlock]) -> None:
        """AttachError unless all of these are under control as far as the way cares for that."""

    @property
    def negotiated(self) -> bool:
        """Whether the descriptor's features are settled already."""

    def close(self) -> None:
        """Frees what the way holds, but not what it has handed out."""


class PtraceWay:
    """A helper thread of QEMU is stopped for a moment; see ``attach.py``."""

    name: WayName = "ptrace"
    ends_qemu = False
    negotiated = False

    def environment(self) -> None:
        return None

    def take(self, identity: ProcessIdentity) -> TakenDescriptor:
        from qemu_postcopy.vm.attach import take_userfaultfd, wait_for_helper_thread

        wait_for_helper_thread(identity)
        return take_userfaultfd(identity)

    def settle(self) -> None:
        """Has a time limit of its own."""

    def target(self, identity: ProcessIdentity) -> ProcessIdentity:
        return identity

    def require_complete(self, blocks: Sequence[RamBlock]) -> None:
        """All blocks are registered later."""

    def close(self) -> None:
        """Holds nothing."""


class PreloadWay:
    """A library that QEMU loads offers its memory; see ``preload.py``.

    Args:
        run_directory: for the socket.
        sizes: of the RAM blocks to come, in bytes.
    """

    name: WayName = "preload"
    ends_qemu = True
    negotiated = True

    def __init__(self, run_directory: Path, sizes: Sequence[int]) -> None:
        from qemu_postcopy.vm.preload import PreloadedProcess, PreloadServer

        self._server = PreloadServer(run_directory, sizes)
        self._process: PreloadedProcess | None = None

    def environment(self) -> Mapping[str, str]:
        return self._server.environment(os.environ)

    def take(self, identity: ProcessIdentity) -> TakenDescriptor:
        return self._server.serve(identity)

    def settle(self) -> None:
        self._server.settle()

    def target(self, identity: ProcessIdentity) -> ProcessIdentity:
        self._process = self._server.process(identity)
        return self._process

    def require_complete(self, blocks: Sequence[RamBlock]) -> None:
        assert self._process is not None
        for block in blocks:
            if not self._process.registered_from_birth(block.address, block.size_bytes):
                raise AttachError(
                    f"memory {block.name!r} was not registered when QEMU mapped it: another of "
                    f"the same size ({block.size_bytes} bytes) came first",
                    hint="restore with --attach-by ptrace",
                    block=block.name,
                )

    def close(self) -> None:
        self._server.close()


def ptrace_refused() -> int:
    """0, or the errno with which a QEMU of ours could not be traced or its descriptor not taken.

    Asked of processes made for it, in a millisecond: the one that traces is not QEMU's ancestor.
    """
    for probe in (lambda error: lib.qpc_probe_ptrace(1, error), lib.qpc_probe_pidfd_getfd):
        error = new_error()
        if probe(error) != 0:
            return int(error.errnum)
    return 0


def choose(choice: WayChoice, run_directory: Path, sizes: Sequence[int]) -> AttachWay:
    """The way that was asked for, or the first that is allowed here.

    Raises:
        HostError: the preload library is missing, or cannot serve so many blocks.
    """
    if choice == "ptrace":
        return PtraceWay()
    if choice == "auto":
        refused = ptrace_refused()
        if not refused:
            return PtraceWay()
        log.warning(
            "QEMU may not be traced here (%s): attaching by the preload library",
            os.strerror(refused),
        )
    return PreloadWay(run_directory, sizes)
