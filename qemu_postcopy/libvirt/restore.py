"""The job "restore" for a domain of libvirt's: libvirt starts it, its memory follows.

    save file -> image -> libvirt restores from the gate -> QEMU waits for its stream -> attach
    -> serve -> let the stream through -> confirm -> let the guest run -> fill -> detach

Like :func:`qemu_postcopy.restore.restore` this is the whole life of a sidecar, in the event loop of
whoever serves.  For libvirt it is a restore like any other, of a domain that it starts paused: so
that nothing runs before QEMU itself has confirmed where its memory lies.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from qemu_postcopy.errors import (
    GuestEndedError,
    ImageError,
    LibvirtError,
    MismatchError,
    PostcopyError,
)
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.libvirt_save import pack_save_head
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
    """

    uri: str
    source: Path
    xml: str | None = None
    afterwards: Afterwards = "as-saved"
    reset_nvram: bool = False
    keep_image: Path | None = None
    verify: bool = False
    session: SessionOptions = field(default_factory=SessionOptions)


@dataclass(frozen=True)
class Saved:
    """A domain as it was saved: an image that knows its domain.

    ``disposable``: made for this restore, and of no use afterwards.
    """

    image: Image
    domain_xml: str
    cookie: str
    was_running: bool
    disposable: bool

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

    def discard(self) -> None:
        """Removes an image that nobody needs any more."""
        if self.disposable:
            shutil.rmtree(self.image.path, ignore_errors=True)


def open_saved(
    source: Path, keep_image: Path | None, progress: Callable[[int, int], None] | None = None
) -> Saved:
    """Opens an image, or converts a save file to one.

    Raises:
        ImageError: it is neither, or knows no domain.
        MismatchError: the domain's memory cannot be paged.
    """
    if source.is_dir():
        image, disposable = Image.open(source), False
    else:
        image, disposable = _converted(source, keep_image, progress), keep_image is None
    manifest = image.manifest
    noted = manifest.launch.get("libvirt")
    if manifest.domain_xml is None or not isinstance(noted, dict):
        raise ImageError(
            f"{source} is no image of a libvirt domain",
            hint="snapshot it by qemu-postcopy snapshot --connect URI DOMAIN IMAGE, or give the "
            "file that virsh save wrote",
        )
    saved = Saved(
        image,
        manifest.domain_xml,
        str(noted.get("cookie", "")),
        bool(noted.get("was_running", True)),
        disposable,
    )
    try:
        if reasons := domain_xml.refusals(domain_xml.parse(saved.domain_xml)):
            raise MismatchError(
                "this domain's memory cannot be paged: " + "; ".join(reasons),
                hint="restore it eagerly, by virsh restore",
            )
    except PostcopyError:
        saved.discard()
        raise
    return saved


def _converted(
    source: Path, keep_image: Path | None, progress: Callable[[int, int], None] | None
) -> Image:
    from qemu_postcopy.image.convert import import_image

    target = keep_image or source.with_name(f".{source.name}.{os.getpid()}.qpc")
    return import_image(source, target, progress=progress)


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
            await session.confirm()
            if not paused:
                await resume(session)
            await serve_to_the_end(session)
            saved.discard()
            return session
        except GuestEndedError:
            saved.discard()
            raise
        except Exception as error:
            if not session.has_guest():
                saved.discard()
                raise
            await serve_on(session, error)
        finally:
            await control.close()
            await session.close()
            run.release()


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
    gate = Gate(session.run.path / "stream", saved.head())
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
