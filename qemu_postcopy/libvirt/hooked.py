"""The job "restore" where the operator says ``virsh restore``, and our hook makes it lazy.

    hook: offer -> libvirt starts QEMU, which accepts -> save file -> image -> attach -> serve
    -> feed QEMU its state -> confirm -> fill -> detach

The whole life of a sidecar that the hook has started, in its own event loop.  libvirt knows nothing
of it: it restores a save file, and lets the guest run, or not, as it was told.  Until QEMU has
accepted, a sidecar that fails or dies costs nothing: QEMU finds nobody and loads the save file
itself.  After that the restore fails with it, and the save file is as it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qemu_postcopy.errors import (
    GuestEndedError,
    ImageError,
    MismatchError,
    OperationCancelledError,
    PostcopyError,
)
from qemu_postcopy.image.device_state import open_device_state
from qemu_postcopy.image.image import Image
from qemu_postcopy.libvirt.lazy_save import image_behind
from qemu_postcopy.libvirt.monitor import address_of
from qemu_postcopy.libvirt.offer import Offer
from qemu_postcopy.libvirt.restore import confirm, open_saved
from qemu_postcopy.libvirt.system_log import tell_system_log
from qemu_postcopy.restore import ending_by_signals, handlers, serve_on, serve_to_the_end
from qemu_postcopy.session import Session, SessionOptions, State, StateChange
from qemu_postcopy.sidecar.control import ControlServer
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.attach import TakenDescriptor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HookedRestore:
    """What libvirt restores: a domain from a file, both by their names."""

    uri: str
    name: str
    uuid: str
    file: Path
    session: SessionOptions


async def restore_hooked(
    order: HookedRestore,
    offer: Offer,
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None = None,
) -> Session:
    """Serves what QEMU offers until the guest has all of its memory; returns the detached session.

    Raises:
        OperationCancelledError: no QEMU was started.
        AttachError: it is restored eagerly, or has ended.
        GuestEndedError: QEMU ended while it was served.
        PostcopyError: before there was a guest: libvirt's restore has failed, nothing was lost.
    """
    try:
        taken = await asyncio.to_thread(offer.take)
    except PostcopyError as error:
        if not isinstance(error, OperationCancelledError):
            tell_system_log(order.name, f"its restore was not made lazy: {_words(error)}")
        offer.close()
        run.release()
        raise
    offer.path.unlink(missing_ok=True)
    try:
        session = await _begin(order, offer, taken, run, listener)
    except BaseException as error:
        tell_system_log(order.name, f"its restore has failed: {_words(error)}")
        offer.abandon(taken.descriptor)
        os.close(taken.descriptor)
        offer.close()
        run.discard_image()
        run.release()
        raise
    control = ControlServer(run.control_socket, handlers(session))
    with ending_by_signals(session):
        try:
            session.attach()
            session.serve()
            await control.start()
            await session.load_by(
                lambda descriptor: asyncio.to_thread(offer.feed, descriptor), may_run=True
            )
            await confirm(session, may_run=True)
            session.is_let_run_by_others()
            await serve_to_the_end(session)
            return session
        except GuestEndedError:
            raise
        except Exception as error:
            tell_system_log(order.name, f"its restore has gone wrong: {_words(error)}")
            if not session.has_guest():
                raise
            await serve_on(session, error)
        finally:
            if not session.has_guest() and session.state is not State.DETACHED:
                offer.abandon(taken.descriptor)
            os.close(taken.descriptor)  # the session has its own
            await control.close()
            await session.close()
            offer.close()
            run.tidy()
            run.release()


def _words(error: BaseException) -> str:
    """The sidecar's own log goes with the run directory when libvirt gives the domain up."""
    if isinstance(error, PostcopyError):
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return repr(error)


async def _begin(
    order: HookedRestore,
    offer: Offer,
    taken: TakenDescriptor,
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None,
) -> Session:
    """While QEMU waits for its stream."""
    require_same(order.file, offer.source)
    source = await asyncio.to_thread(image_behind, order.file) or order.file
    # In place only from a private copy: nobody has been asked whether the file may be leased.
    saved = await asyncio.to_thread(open_saved, source, None, run, in_place=None, say=log.info)
    require_same(order.file, offer.source)
    if saved.uuid != order.uuid:
        raise ImageError(f"{source} is of another domain, {saved.name}", hint="write it anew")
    assert offer.identity is not None
    # Taken over by another sidecar it is not let run: libvirt has done so, or was told not to.
    options = replace(order.session, paused=True)
    session = Session(saved.image, run, options, listener)
    own = replace(taken, descriptor=os.dup(taken.descriptor))
    try:
        told = await asyncio.to_thread(_places, offer, saved.image, taken.descriptor)
        monitor = address_of(order.uri, order.uuid)
        session.adopt(offer.identity.pid, monitor, (own, offer.known()), told)
        pieces = {(b.address, b.size_bytes) for b in session.layout}
        if pieces != offer.registered:
            raise MismatchError(
                "the memory that QEMU has mapped is not that of the image",
                hint="restore it by qemu-postcopy restore --connect",
            )
    except BaseException:
        with suppress(PostcopyError):
            await session.close()
        raise
    return session


def _places(offer: Offer, image: Image, userfaultfd: int) -> dict[str, int]:
    state = open_device_state(image)
    try:
        return offer.places(image, state, userfaultfd)
    finally:
        os.close(state)


def require_same(file: Path, source: tuple[int, int]) -> None:
    """ImageError if that path leads to another file than the one that libvirt restores."""
    try:
        found = file.stat()
    except OSError as error:
        raise ImageError(
            f"{file} was removed while it was restored: {error.strerror}", hint="restore it again"
        ) from error
    if (found.st_dev, found.st_ino) != source:
        raise ImageError(f"{file} was replaced while it was restored", hint="restore it again")
