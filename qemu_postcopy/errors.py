"""Every exception this package raises, each with what to do next.

One base class, :class:`PostcopyError`; a subclass answers a question the caller asks ("is it the
image? the host? the guest?"), and has an exit code of its own for scripts.  Exceptions carry what
they are about (``vm``, ``block``, ``page``, ``source``) and whether trying again can help.
"""

from __future__ import annotations


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


class GuestEndedError(PostcopyError):
    """QEMU ended while it was served: shut down, killed or crashed; nothing is left to serve."""

    exit_code = 13


class SourceError(PostcopyError):
    """Page data cannot be had.  The guest waits; nothing is made up in its place."""

    exit_code = 9
    retryable = True


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
