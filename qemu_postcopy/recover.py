"""The job "recover": a guest whose sidecar has died is served on.

    read session.json -> take the lock -> take the descriptor that QEMU holds -> serve, wake
    -> find out how far the restore had come -> fill in the background -> complete -> detach

Nothing is asked of QEMU before its memory is served: a main loop that waits for a page answers
nobody.  Like :func:`qemu_postcopy.restore.restore` this is the whole life of a sidecar and runs in
the event loop of whoever serves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from qemu_postcopy.errors import (
    AttachError,
    GuestEndedError,
    PostcopyError,
    SidecarError,
    StateError,
    TargetGoneError,
)
from qemu_postcopy.restore import (
    ending_by_signals,
    handlers,
    resume,
    serve_on,
    serve_to_the_end,
)
from qemu_postcopy.session import Session, SessionOptions, State, StateChange
from qemu_postcopy.sidecar.control import ControlServer, ask
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord

log = logging.getLogger(__name__)

#: A dead sidecar's helper, which stops a thread of QEMU for a moment, has the lock so much longer.
LOCK_SECONDS = 5.0
LOCK_POLL_SECONDS = 0.01
#: A sidecar that lives answers within this time, unless it is stopped.
MOMENT_SECONDS = 1.0
#: Recorded states in which nobody needs a sidecar.
OVER = (State.DETACHED, State.FAILED, State.GONE)
#: Recorded states in which memory was not registered yet, so that there cannot be a guest.
BEFORE_SERVING = (State.NEW, State.FOUND, State.ATTACHED)


def needs_sidecar(run: RunDirectory, record: SessionRecord) -> bool:
    """Whether the guest of that record lives and depends on being served."""
    return record.state not in OVER and run.guest_alive(record)


async def recover(
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None = None,
    *,
    drop_rights: bool = False,
) -> Session:
    """Takes over from a dead sidecar and serves until the guest has all of its memory.

    Raises:
        StateError: a sidecar lives; or none is needed; or the restore had not come so far as a
            guest (a QEMU of ours was ended then, somebody else's left as it was found).
        GuestEndedError: QEMU has ended.
        PostcopyError: it cannot be taken over now; the guest waits on, nothing is lost.
    """
    from qemu_postcopy.image.in_place import open_image

    await _claim(run)
    try:
        record = run.read_record()
        assert record is not None
        _require_recoverable(run, record)
        if record.attached_by == "handshake":
            from qemu_postcopy.serve import serve_again

            return await serve_again(run, record, listener, drop_rights=drop_rights)
        options = SessionOptions(
            chunk_size=record.chunk_size or None,
            background=record.background,
            background_rate=record.background_rate,
            paused=record.paused,
            working_set=False,
            drop_rights=drop_rights,
            trace=Path(record.trace) if record.trace else None,
        )
        session = Session(open_image(Path(record.image)), run, options, listener)
        session.attached_by = record.attached_by
        # A sidecar that was killed has left its socket behind; the lock says that it is gone.
        run.control_socket.unlink(missing_ok=True)
        control = ControlServer(run.control_socket, handlers(session))
        with ending_by_signals(session):
            try:
                session.take_over(record)
                await control.start()
                if await session.settle(record):
                    await resume(session)
                await serve_to_the_end(session)
                return session
            except GuestEndedError:
                raise
            except TargetGoneError as error:
                run.update_record(state=str(State.GONE))
                raise _ended(run, record) from error
            except Exception as error:
                if not session.has_guest() or session.state is State.NEW:
                    raise
                await serve_on(session, error)
            finally:
                await control.close()
                await session.close()
    finally:
        run.tidy()
        run.release()


async def _claim(run: RunDirectory) -> None:
    """Takes the lock; waits a moment for what a dead sidecar has left to end by itself."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            run.lock()
            return
        except StateError as error:
            record = run.read_record()
            if record is None or _alive(record.sidecar_pid) or time.monotonic() > deadline:
                raise _served(run, record) from error
            await asyncio.sleep(LOCK_POLL_SECONDS)


def _served(run: RunDirectory, record: SessionRecord | None) -> StateError:
    """By whom, and what to do where that is no help: a stopped sidecar keeps its guest waiting."""
    hint = "see: qemu-postcopy status"
    if record is not None and not _answers(run):
        why, what = run.silent_sidecar(record)
        hint = f"{why}: {what}"
    by = f" (PID {record.sidecar_pid})" if record is not None and record.sidecar_pid else ""
    return StateError(f"{run.name} is being restored or served{by}", hint=hint)


def _answers(run: RunDirectory) -> bool:
    try:
        ask(run.control_socket, "status", timeout=MOMENT_SECONDS)
    except SidecarError:
        return False
    return True


def _alive(pid: int) -> bool:
    from qemu_postcopy.vm.process import ProcessIdentity

    try:
        ProcessIdentity.open(pid).close()
    except TargetGoneError:
        return False
    return True


def _require_recoverable(run: RunDirectory, record: SessionRecord) -> None:
    if record.state in OVER:
        raise StateError(
            f"{run.name} is {record.state}: it needs no sidecar",
            hint="see: qemu-postcopy status",
        )
    if record.state == State.LISTENING:
        raise StateError(
            f"{run.name} was killed before a VMM had handed its memory over",
            hint="nothing is lost: serve it again",
        )
    if record.state in BEFORE_SERVING and run.stream.exists():
        # libvirt ends its QEMU, which has not run.
        run.end_stream()
        run.update_record(state=str(State.FAILED))
        raise StateError(
            f"the restore of {run.name} had not come so far as a guest",
            hint="nothing is lost: restore it again",
        )
    if record.state == State.NEW and not record.pid:
        record = replace(record, pid=owner_of(run.qmp_socket), start_time=0)
    if not run.guest_alive(record):
        run.update_record(state=str(State.GONE))
        raise _ended(run, record)
    if record.attached_by == "handshake":
        return
    if record.state in BEFORE_SERVING:
        _leave_without_guest(record)
        run.update_record(state=str(State.FAILED))
        raise StateError(
            f"the restore of {run.name} had not come so far as a guest"
            + ("; its QEMU was ended" if record.owned else ""),
            hint="nothing is lost: restore it again",
        )


def _ended(run: RunDirectory, record: SessionRecord) -> GuestEndedError:
    return GuestEndedError(
        f"QEMU of {run.name} (PID {record.pid}) has ended",
        hint="restore its image again, if it was not to end",
        vm=run.name,
    )


def owner_of(monitor: Path) -> int:
    """The PID of the QEMU that was started with this monitor, or 0: its sidecar died before it had
    noted that.  Others have it among their arguments too: a wrapper, a tracer."""
    from qemu_postcopy.vm.process import is_qemu

    wanted = f"path={str(monitor.resolve()).replace(',', ',,')},".encode()
    for entry in os.scandir("/proc"):
        with suppress(OSError):
            if (
                entry.name.isdigit()
                and any(
                    wanted in argument
                    for argument in Path(entry.path, "cmdline").read_bytes().split(b"\0")
                )
                and is_qemu(str(Path(entry.path, "exe").readlink()))
            ):
                return int(entry.name)
    return 0


def _leave_without_guest(record: SessionRecord) -> None:
    """Ends a QEMU of ours; somebody else's goes on waiting, with its memory free again."""
    from qemu_postcopy.paging import registration
    from qemu_postcopy.vm.attach import take_left_userfaultfd
    from qemu_postcopy.vm.process import ProcessIdentity

    with ProcessIdentity.open(record.pid, record.start_time or None) as identity:
        if not record.start_time:
            identity.require_qemu()  # it was looked for, and the PID may be another's by now
        if record.owned:
            identity.kill()
            return
        if record.userfaultfd < 0:
            return
        try:
            taken = take_left_userfaultfd(identity, record.userfaultfd)
        except AttachError as error:
            log.warning("QEMU's memory stays as it is: %s", error.message)
            return
        try:
            for block in record.blocks:
                try:
                    registration.unregister(taken.descriptor, block["address"], block["size_bytes"])
                except PostcopyError as error:
                    log.info("block %s was not registered: %s", block["name"], error.message)
            registration.wait_events_read(taken.descriptor, by_us=True)
        finally:
            os.close(taken.descriptor)
