"""Every exception this package raises, each with what to do next.

One base class, :class:`PostcopyError`; a subclass answers a question the caller asks ("is it the
image? the host? the guest?"), and has an exit code of its own for scripts.  Exceptions carry what
they are about (``vm``, ``block``, ``page``, ``source``) and whether trying again can help.
"""

from __future__ import annotations

import enum
import os


class PostcopyError(Exception):
    """Base class.

    Args:
        message: what happened, one sentence.
        hint: what to do next, one sentence, shown on a line of its own; never empty for errors that
            an operator sees.
        vm: the guest's name or PID; block: the RAM block's name; page: a page index in that block;
        source: where its data should have come from.
    """

    #: exit status of the command line tool
    exit_code = 1
    #: True where the same call may succeed later without anything being changed
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        vm: str | int | None = None,
        block: str | None = None,
        page: int | None = None,
        source: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.vm = vm
        self.block = block
        self.page = page
        self.source = source

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(PostcopyError):
    """The call itself makes no sense (arguments that contradict each other, a bad size)."""

    exit_code = 2


class HostError(PostcopyError):
    """This host lacks something: a right, a device, a kernel feature, a package, disk space."""

    exit_code = 3


class LeaseRefusedError(HostError):
    """Writers cannot be kept off a file; nothing was changed.  ``errno`` says why (fcntl(2))."""

    def __init__(self, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.errno = errno


class InPlaceRefusedError(HostError):
    """A save file cannot be served in place here; converted it can be restored."""


class Outcome(enum.Enum):
    """Why an operation on a userfaultfd did not do all it was asked for, by name.

    What an errno means depends on the operation: ioctl_userfaultfd(2).
    """

    #: EEXIST: something is there already; nothing was overwritten
    PRESENT = "the destination is filled already"
    #: ENOENT of MOVE: the source has a hole, and holes were not allowed
    HOLE = "the source has a hole"
    #: ENOENT: no registered mapping covers the range (any more)
    NOT_REGISTERED = "no registered mapping covers the range"
    #: EAGAIN after a part: ``done`` bytes are done; ask for the rest to learn what stopped it
    PARTIAL = "only a part was done"
    #: EAGAIN: an event is queued and unread; read it first
    EVENT_WAITS = "an event waits to be read first"
    #: EBUSY: another descriptor has the range, or the page is pinned or mapped more than once
    BUSY = "in use otherwise"
    #: ESRCH: the process whose memory it is has exited
    GONE = "the process has exited"
    #: EFAULT: source not readable, or (CONTINUE) no page in the page cache
    FAULT = "the source cannot be had"
    #: EPERM, EACCES: the right is missing
    REFUSED = "not permitted"
    #: EINVAL: the kernel lacks it, the memory does not allow it, or the range is not aligned
    INVALID = "invalid for this kernel, memory or range"
    #: every other errno
    FAILED = "failed"


class UserfaultfdError(HostError):
    """A call of qemu_postcopy.userfaultfd failed, or did a part only.

    Attributes: ``errno``; ``done``: the kernel's own signed result (bytes done, or a negative
    errno, or 0 where it gave none); ``address``: where the range begins, or None; ``outcome``.
    """

    def __init__(
        self, what: str, outcome: Outcome, errno: int, done: int = 0, address: int | None = None
    ) -> None:
        where = f" at {address:#x}" if address is not None else ""
        super().__init__(f"{what}{where}: {outcome.value} ({os.strerror(errno)}, result {done})")
        self.errno = errno
        self.done = done
        self.address = address
        self.outcome = outcome
        self.retryable = outcome in (Outcome.PARTIAL, Outcome.EVENT_WAITS)


class ImageError(PostcopyError):
    """The image, or the file given as one, is damaged, truncated, altered or not an image."""

    exit_code = 4


class MismatchError(PostcopyError):
    """Image and target do not fit: architecture, machine type, RAM size, QEMU version."""

    exit_code = 5


class AttachError(PostcopyError):
    """QEMU's memory could not be taken under control; the guest was left as it was."""

    exit_code = 6


class TargetGoneError(AttachError):
    """The process died, or its PID belongs to another process now."""


class HandshakeError(AttachError):
    """What a VMM sent along with its userfaultfd cannot be served; nothing of it was touched."""


class AttachTimeoutError(AttachError):
    """No thread of the target could be stopped within the time limit; nothing was changed."""

    retryable = True


class LaunchError(PostcopyError):
    """QEMU did not start, or ended before it was ready."""

    exit_code = 7

    def __init__(
        self,
        message: str,
        *,
        command: list[str],
        returncode: int | None,
        output: str,
        hint: str = "",
    ) -> None:
        super().__init__(message, hint=hint)
        self.command = command
        self.returncode = returncode
        self.output = output


class QmpError(PostcopyError):
    """QEMU refused a command, or its monitor cannot be reached."""

    exit_code = 8


class LibvirtError(PostcopyError):
    """libvirt refused something, or its daemon cannot be reached.

    Attributes: ``code`` is libvirt's VIR_ERR number, 0 where the refusal is ours.
    """

    exit_code = 14

    def __init__(
        self, message: str, *, code: int = 0, hint: str = "", vm: str | int | None = None
    ) -> None:
        super().__init__(message, hint=hint, vm=vm)
        self.code = code


class GuestEndedError(PostcopyError):
    """QEMU ended while it was served: shut down, killed or crashed; nothing is left to serve."""

    exit_code = 13


class StateError(PostcopyError):
    """A step was asked for in the wrong state; both states are named in the message."""

    exit_code = 10


class SidecarError(PostcopyError):
    """The serving process cannot be reached, or is not what it claims to be."""

    exit_code = 11


class ContentError(PostcopyError):
    """Guest memory was found different from what it must be (demo, verify)."""

    exit_code = 12


class OperationCancelledError(PostcopyError):
    """The caller asked for the end of an operation; what it had begun was taken back."""

    exit_code = 130
    retryable = True


class LeftRunningError(PostcopyError):
    """The caller was interrupted, and what it had begun goes on without it: a guest runs and is
    served, or a migration is under way.  Nothing is to be started a second time."""

    exit_code = 16


class MigrationInterruptedError(PostcopyError):
    """A post-copy migration is interrupted: the guest waits at the destination, nothing is lost."""

    exit_code = 15
    retryable = True
