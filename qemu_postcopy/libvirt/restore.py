"""The job "restore" for a domain of libvirt's: libvirt starts it, its memory follows.

    save file -> image -> libvirt restores from the gate -> QEMU waits for its stream -> attach
    -> serve -> let the stream through -> confirm -> let the guest run -> fill -> detach

Like :func:`qemu_postcopy.restore.restore` this is the whole life of a sidecar, in the event loop of
whoever serves.  For libvirt it is a restore like any other, of a domain that it starts paused: so
that nothing runs before QEMU itself has confirmed where its memory lies.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qemu_postcopy.errors import (
    GuestEndedError,
    HostError,
    ImageError,
    InPlaceRefusedError,
    LibvirtError,
    MismatchError,
    PostcopyError,
    QmpError,
)
from qemu_postcopy.image.convert import import_image
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.libvirt_save import pack_save_head, read_save_header
from qemu_postcopy.image.records import MAGIC, VERSION
from qemu_postcopy.libvirt import domain_xml
from qemu_postcopy.libvirt.connection import Connection, load
from qemu_postcopy.libvirt.gate import Gate
from qemu_postcopy.libvirt.monitor import address_of
from qemu_postcopy.restore import (
    ending_by_signals,
    handlers,
    resume,
    serve_on,
    serve_to_the_end,
    verify_image,
)
from qemu_postcopy.session import Session, SessionOptions, StateChange
from qemu_postcopy.sidecar.control import ControlServer
from qemu_postcopy.sidecar.rundir import RunDirectory

log = logging.getLogger(__name__)

HOW_TO_SAVE = (
    "snapshot it by qemu-postcopy snapshot --connect URI DOMAIN IMAGE, or give the file that virsh "
    "save wrote"
)
#: Seconds between questions to a libvirtd that does not answer: it may be starting again.
CONFIRM_PAUSES = (0.1, 0.3, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
#: What QEMU is given of the stream before its memory is served.
FIRST = MAGIC + VERSION.to_bytes(4, "big")
Afterwards = Literal["as-saved", "running", "paused"]


@dataclass(frozen=True)
class LibvirtRestoreOptions:
    """What to restore, and how.

    Attributes:
        uri: of libvirt, on this host.
        source: a file that virsh save wrote, or an image made of one or by a snapshot.
        xml: the domain XML to restore with, instead of the saved one (as virsh restore --xml).
        afterwards: whether the guest runs.
        reset_nvram: as virsh restore --reset-nvram.
        keep_image: where a save file is converted to, and stays; None: beside it, for as long as
            it is needed.
        verify: check every hash of the image first.
        in_place: a save file is read from where it is: None: if a private copy of it can be made
            without copying data; True: else from the file itself, under a lease; False: never.
    """

    uri: str
    source: Path
    xml: str | None = None
    afterwards: Afterwards = "as-saved"
    reset_nvram: bool = False
    keep_image: Path | None = None
    verify: bool = False
    in_place: bool | None = None
    session: SessionOptions = field(default_factory=SessionOptions)


@dataclass(frozen=True)
class Saved:
    """A domain as it was saved: an image that knows its domain."""

    image: Image
    domain_xml: str
    cookie: str
    was_running: bool

    @property
    def name(self) -> str:
        """Of the domain."""
        return str(domain_xml.parse(self.domain_xml).findtext("name"))

    @property
    def uuid(self) -> str:
        """Of the domain."""
        return str(domain_xml.parse(self.domain_xml).findtext("uuid"))

    def head(self) -> bytes:
        """The begin of a save file that libvirt takes for its own."""
        return pack_save_head(self.domain_xml, self.cookie, was_running=self.was_running)


def saved_xml(source: Path) -> str:
    """The domain XML in an image or a save file, which is only looked at.

    Raises:
        ImageError: it is neither, or knows no domain.
        HostError: it cannot be read.
        MismatchError: the domain's memory cannot be paged.
    """
    if source.is_dir():
        xml = Image.open(source).manifest.domain_xml or ""
    else:
        try:
            with source.open("rb") as file:
                xml = read_save_header(file.fileno()).domain_xml
        except OSError as error:
            raise HostError(
                f"{source} cannot be read: {error.strerror}",
                hint="look at the path and its permissions",
            ) from error
    if not xml:
        raise ImageError(f"{source} is no image of a libvirt domain", hint=HOW_TO_SAVE)
    require_pageable(xml)
    return xml


def require_pageable(xml: str) -> None:
    """Raises MismatchError where that domain's memory cannot be paged."""
    if reasons := domain_xml.refusals(domain_xml.parse(xml)):
        raise MismatchError(
            "this domain's memory cannot be paged: " + "; ".join(reasons),
            hint="restore it eagerly, by virsh restore",
        )


def open_saved(
    source: Path,
    keep_image: Path | None,
    run: RunDirectory,
    progress: Callable[[int, int], None] | None = None,
    *,
    in_place: bool | None = False,
    say: Callable[[str], None] = log.warning,
) -> Saved:
    """Opens an image, has a save file served in place, or converts it to an image, which goes with
    the guest unless it is to be kept.

    Args:
        in_place: see LibvirtRestoreOptions.
        say: is told why a save file is converted.

    Raises:
        ImageError: it is neither, or knows no domain.
        HostError: there is no room for it.
    """
    if source.is_dir():
        image = Image.open(source)
    else:
        target = keep_image or source.with_name(f".{source.name}.{os.getpid()}.qpc")
        if keep_image is None:
            run.note_disposable(target)
        served = None
        if in_place is not False and keep_image is None:
            served = _try_in_place(source, target, bool(in_place), progress, say)
        image = served or import_image(source, target, progress=progress)
    manifest = image.manifest
    noted = manifest.launch.get("libvirt")
    if manifest.domain_xml is None or not isinstance(noted, dict):
        raise ImageError(f"{source} is no image of a libvirt domain", hint=HOW_TO_SAVE)
    return Saved(
        image,
        manifest.domain_xml,
        str(noted.get("cookie", "")),
        bool(noted.get("was_running", True)),
    )


def _try_in_place(
    source: Path,
    target: Path,
    by_lease: bool,
    progress: Callable[[int, int], None] | None,
    say: Callable[[str], None],
) -> Image | None:
    from qemu_postcopy.image.in_place_writer import serve_in_place

    try:
        return serve_in_place(source, target, by_lease=by_lease, progress=progress)
    except InPlaceRefusedError as refused:
        say(f"converting {source} first: {refused.message}; {refused.hint}")
        return None


async def restore_domain(
    options: LibvirtRestoreOptions,
    saved: Saved,
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None = None,
) -> Session:
    """Restores and serves until the guest has all of its memory; returns the detached session.

    Raises:
        LibvirtError: libvirt refused; it has left nothing behind then.
        PostcopyError: before there was a guest: nothing was lost, the save file is as it was.
        GuestEndedError: QEMU ended while it was served.
    """
    paused = options.afterwards == "paused" or (
        options.afterwards == "as-saved" and not saved.was_running
    )
    session = Session(saved.image, run, replace(options.session, paused=paused), listener)
    control = ControlServer(run.control_socket, handlers(session))
    with ending_by_signals(session):
        try:
            if options.verify:
                await verify_image(saved.image)
            async with await Connection.open(options.uri) as connection:
                connection.require_local()
                await _start(connection, options, saved, session, control)
            await confirm(session)
            if not paused:
                await resume(session)
            await serve_to_the_end(session)
            return session
        except GuestEndedError:
            raise
        except Exception as error:
            if not session.has_guest():
                raise
            await serve_on(session, error)
        finally:
            await control.close()
            await session.close()
            run.tidy()
            run.release()


async def confirm(session: Session, *, may_run: bool = False) -> None:
    """As :meth:`Session.confirm`, also where libvirtd is just being started again."""
    for wait in CONFIRM_PAUSES:
        try:
            await session.confirm(may_run=may_run)
            return
        except (LibvirtError, QmpError) as error:
            if not session.has_guest():
                raise
            log.warning("QEMU cannot be asked yet where its memory lies: %s", error.message)
            await session.release_monitor()
        await asyncio.sleep(wait)
    await session.confirm(may_run=may_run)


async def _start(
    connection: Connection,
    options: LibvirtRestoreOptions,
    saved: Saved,
    session: Session,
    control: ControlServer,
) -> None:
    """Everything until the state is loaded and libvirt has a paused domain."""
    libvirt = load()
    flags = libvirt.VIR_DOMAIN_SAVE_PAUSED
    if options.reset_nvram:
        flags |= _flag("VIR_DOMAIN_SAVE_RESET_NVRAM", "--reset-nvram")
    session.announce(address_of(options.uri, saved.uuid))
    gate = Gate(session.run.stream, saved.head())
    call = asyncio.ensure_future(
        connection.call(
            f"{saved.name} cannot be restored",
            connection.handle.restoreFlags,
            str(gate.path),
            options.xml,
            flags,
        )
    )
    gate.watch_call(call)
    try:
        pid = await gate.admit(FIRST)
        session.adopt(pid, address_of(options.uri, saved.uuid))
        session.attach()
        session.serve()
        await control.start()
        await session.load_by(lambda descriptor: gate.feed(descriptor, len(FIRST)))
    except BaseException:
        # QEMU sees its stream end early, and libvirt ends it.  It is served until then: a thread
        # that waits for a page would not notice.
        gate.close()
        with suppress(PostcopyError):
            await asyncio.shield(call)
        if call.done() and not call.cancelled() and call.exception() is None:
            await _destroy(connection, saved)
        # A libvirtd that died meanwhile has not ended QEMU; the guest has not run yet.
        if session.identity is not None and session.identity.is_alive():
            session.identity.kill()
        raise
    finally:
        gate.close()


async def _destroy(connection: Connection, saved: Saved) -> None:
    """libvirt has restored what was to be given up: a paused domain that never ran."""
    with suppress(LibvirtError):
        domain = await connection.domain(saved.uuid)
        await connection.call("destroy", domain.destroy)


def _flag(name: str, option: str) -> int:
    value = getattr(load(), name, None)
    if value is None:
        raise LibvirtError(
            f"this libvirt-python knows no {option}", hint="libvirt-python 8.1 or newer has it"
        )
    return int(value)
