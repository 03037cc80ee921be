"""``qemu-postcopy serve``: pages the memory of a VMM that hands its own userfaultfd over.

    listen -> the VMM connects and sends regions and descriptor -> serve -> complete
    -> serve on until the VMM ends, or detach

Firecracker's handshake is spoken (``vm/handshake.py``), so a microVM resumed with an Uffd back-end
is served by the same pager, ledger, status and control socket as a QEMU.  If the process that
serves dies the guest waits, and another takes over (:func:`serve_again`).  One event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qemu_postcopy.cli import size
from qemu_postcopy.errors import GuestEndedError, OperationCancelledError
from qemu_postcopy.handover import HandoverSession, regions_of
from qemu_postcopy.image.memory_file import MemoryFile
from qemu_postcopy.restore import handlers, serve_on
from qemu_postcopy.session import SessionOptions, State, StateChange
from qemu_postcopy.sidecar.control import ControlServer
from qemu_postcopy.sidecar.rundir import LISTENING, RunDirectory, SessionRecord
from qemu_postcopy.vm.handshake_socket import take_handshake

if TYPE_CHECKING:
    from qemu_postcopy.sidecar import process

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, to whom.

    Attributes:
        handshake: where the socket is made; must not exist, or be a socket nobody listens on.
        image: an image's directory, or a raw memory file.
        name: of the run directory; None: the image's file name.
        uid: the VMM's user beside root and ours; the socket is then given to that user.
        accept_seconds: how long to wait for the VMM; 0 for ever.
    """

    handshake: Path
    image: Path
    name: str | None = None
    uid: int | None = None
    accept_seconds: float = 0.0
    session: SessionOptions = field(default_factory=lambda: SessionOptions(stay=True))

    def run_name(self) -> str:
        """The name, or the one that the image suggests."""
        return self.name or self.image.resolve().name.removesuffix(".qpc")


async def serve(
    options: ServeOptions,
    run: RunDirectory,
    listener: Callable[[StateChange], None] | None = None,
    listening: Callable[[], None] | None = None,
) -> HandoverSession:
    """Serves one VMM to its end, or until it has all of its memory and is left.

    SIGTERM and SIGINT end the wait for a VMM; once there is one, its memory is filled at full
    speed, and it is left when all of it is there.  Only for a process with a single thread: a
    keeper is forked (``sidecar/keeper.py``).

    Args:
        listener: called at each change of state.
        listening: called when a VMM may connect.

    Returns:
        the session, GONE or DETACHED.

    Raises:
        HandshakeError: what the VMM sent cannot be served; it waits and had better be ended.
        GuestEndedError: the VMM ended before it had all of its memory.
        OperationCancelledError: no VMM came within ``accept_seconds``.
    """
    memory = MemoryFile.open(options.image)
    ending = _Ending()

    def told() -> None:
        run.write_record(
            SessionRecord(
                image=str(options.image.absolute()),
                state=LISTENING,
                sidecar_pid=os.getpid(),
                attached_by="handshake",
            )
        )
        if listening is not None:
            listening()

    with ending.on_signals():
        handshake = await take_handshake(
            options.handshake, memory, options.uid, options.accept_seconds, told
        )
        ending.there_is_a_vmm()
        session = HandoverSession(memory, handshake.regions, run, options.session, listener)
        async with _serving(session, ending):
            session.take(handshake)
            session.attach()
            session.serve()
            await session.load_device_state()
            await session.resume()
        return session


async def serve_again(
    run: RunDirectory,
    record: SessionRecord,
    listener: Callable[[StateChange], None] | None = None,
    *,
    drop_rights: bool = False,
) -> HandoverSession:
    """Takes over from a server that has died; the run directory's lock is the caller's.

    Raises:
        PostcopyError: it cannot be taken over now; the VMM waits on, nothing is lost.
        GuestEndedError: the VMM ended.
    """
    memory = MemoryFile.open(Path(record.image))
    options = SessionOptions(
        chunk_size=record.chunk_size or None,
        background=record.background,
        background_rate=record.background_rate,
        working_set=False,
        stay=record.stay,
        drop_rights=drop_rights,
    )
    session = HandoverSession(memory, regions_of(record), run, options, listener)
    # A server that was killed has left its socket behind; the lock says that it is gone.
    run.control_socket.unlink(missing_ok=True)
    ending = _Ending()
    with ending.on_signals():
        async with _serving(session, ending):
            # With a ledger a pager may have run, though session.json does not say so.
            if record.state == State.ATTACHED and not run.ledger.exists():
                session.take_again(record)
                session.attach()
                session.serve()
            else:
                session.take_over(record)
            await session.settle(record)
        return session


@asynccontextmanager
async def _serving(session: HandoverSession, ending: _Ending) -> AsyncIterator[None]:
    """After the body has made the session serve: to the VMM's end, or until it is left."""
    control = ControlServer(session.run.control_socket, handlers(session))
    try:
        yield
        ending.serves(session)
        await _serve_on(session, control, ending.asked)
    finally:
        await control.close()
        await session.close()
        session.run.release()


async def _serve_on(
    session: HandoverSession, control: ControlServer, ending: asyncio.Event
) -> None:
    """From the first fault on; whatever goes wrong beside the pager, the guest is served."""
    try:
        await control.start()
        session.start_background()
        await session.wait_complete()
    except GuestEndedError as error:
        raise GuestEndedError(
            f"the VMM of {session.run.name} ended while it was served",
            hint="resume its snapshot again, if it was not to end",
            vm=error.vm,
        ) from None
    except Exception as error:  # noqa: BLE001  it is logged there, and the guest must be served
        await serve_on(session, error, "the VMM")
    if session.options.stay:
        # Its balloon may still give memory back, and wait for us to hear of it.
        waits = [asyncio.ensure_future(session.wait_gone()), asyncio.ensure_future(ending.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        assert session.identity is not None
        if not session.identity.is_alive():
            session.gone()
            return
    session.detach()


class _Ending:
    """SIGTERM and SIGINT: before there is a guest they end the work; after that the rest is filled
    at full speed and the guest left.  It is never abandoned."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self._vmm = False
        self._session: HandoverSession | None = None

    def there_is_a_vmm(self) -> None:
        """From now on somebody depends on being served, and the work is not ended before that."""
        self._vmm = True

    def serves(self, session: HandoverSession) -> None:
        """It can be filled at full speed; it is at once if that was asked for in between."""
        self._vmm, self._session = True, session
        if self.asked.is_set():
            session.fill_at_full_speed()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Takes both over, where this runs in the main thread."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            if not self._vmm:
                task.cancel()
                return
            log.warning("asked to end: filling the rest, then leaving")
            if self._session is not None:
                self._session.fill_at_full_speed()
            self.asked.set()

        numbers = (signal.SIGTERM, signal.SIGINT)
        with suppress(ValueError, RuntimeError):  # not in the main thread: signals are the caller's
            for number in numbers:
                loop.add_signal_handler(number, end)
        try:
            yield
        finally:
            with suppress(ValueError, RuntimeError):
                for number in numbers:
                    loop.remove_signal_handler(number)


@click.command("serve")
@click.option(
    "--handshake",
    required=True,
    type=click.Path(path_type=Path),
    metavar="SOCKET",
    help="Where the VMM connects and hands its userfaultfd over, as Firecracker does.",
)
@click.option(
    "--image",
    required=True,
    type=click.Path(path_type=Path),
    help="An image, or a raw memory file (Firecracker's mem_file_path).",
)
@click.option("--name", help="The guest's name; default: the image's.")
@click.option("--uid", type=click.IntRange(0), help="The user that the VMM runs as (a jailer's).")
@click.option(
    "--chunk", callback=size, metavar="SIZE", help="Bytes filled around a fault, 4K to 2M."
)
@click.option(
    "--background/--no-background",
    default=True,
    show_default=True,
    help="Fill what nobody asks for while the guest runs.",
)
@click.option(
    "--rate",
    callback=size,
    default="0",
    metavar="SIZE",
    help="Limit of that, bytes per second; 0: none.",
)
@click.option("--detach", is_flag=True, help="End when all memory is there, not with the VMM.")
@click.option(
    "--accept-seconds",
    type=click.FloatRange(0),
    default=0.0,
    metavar="N",
    help="Give up if no VMM connects in this time; 0: never.",
)
@click.option(
    "--wait",
    type=click.Choice(["listening", "running", "complete"]),
    default="listening",
    show_default=True,
    help="Return when a VMM may connect, when one is served, or when it has all of its memory.",
)
@click.option("--foreground", is_flag=True, help="Serve in this process; return when it is over.")
@click.option(
    "--supervise",
    is_flag=True,
    help="Start a second process that has another server take over if this one dies.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout.")
def serve_command(
    handshake: Path,
    image: Path,
    name: str | None,
    uid: int | None,
    chunk: int | None,
    background: bool,
    rate: int,
    detach: bool,
    accept_seconds: float,
    wait: str,
    foreground: bool,
    supervise: bool,
    as_json: bool,
) -> None:
    """Page the memory of a VMM that hands over its own userfaultfd.

    Returns as soon as a VMM can connect to SOCKET; a server in the background waits there for one
    that speaks Firecracker's handshake, serves it from IMAGE, and ends with it (or, with --detach,
    when all of its memory is there). `status`, `fill`, `recover` and `supervise` work for it as for
    a restored guest: if the server dies the VMM's guest waits, and another takes over. Interrupted
    with Ctrl-C the server goes on (exit status 16), if it listens already.

    SOCKET must be inside the VMM's jail, where it has one.

    \b
    Examples:
      qemu-postcopy serve --handshake /srv/vm/uffd.sock --image /srv/vm/mem
      qemu-postcopy serve --handshake uffd.sock --image vm.qpc --no-background --chunk 2M
      curl --unix-socket fc.sock -X PUT http://localhost/snapshot/load -d '{"snapshot_path": "vm",
        "mem_backend": {"backend_type": "Uffd", "backend_path": "uffd.sock"}, "resume_vm": true}'
    """
    from qemu_postcopy.sidecar import process, supervisor

    options = ServeOptions(
        handshake=handshake.absolute(),
        image=image.absolute(),
        name=name,
        uid=uid,
        accept_seconds=accept_seconds,
        session=SessionOptions(
            chunk_size=chunk,
            background=background,
            background_rate=rate,
            stay=not detach,
            working_set=False,
            drop_rights=True,
        ),
    )

    def say(event: str, text: str = "", **details: Any) -> None:
        click.echo(json.dumps({"event": event, **details}) if as_json else text or event)

    run = RunDirectory.create(options.run_name())
    sidecar: process.Sidecar | None = None
    try:
        if foreground:
            if supervise:
                supervisor.start(run)
            _in_foreground(options, run, say)
            return
        with process.interrupts_held():
            sidecar = process.spawn(serving(options, run), run)
        if supervise:
            supervisor.start(run)
        _follow(sidecar, wait, say, options, run)
    except KeyboardInterrupt:
        if sidecar is None:
            run.discard_unused()
            raise
        if run.read_record(missing_ok=True) is not None:
            raise sidecar.left(f"PID {sidecar.pid} serves on as {run.name}") from None
        try:
            sidecar.interrupt(run)
        except OperationCancelledError:
            run.discard_unused()
            raise
    except BaseException:
        run.discard_unused()
        raise


def serving(options: ServeOptions, run: RunDirectory) -> process.Job:
    """The job of a server in the background."""

    def job(listener: Callable[[StateChange], None]) -> Coroutine[Any, Any, HandoverSession]:
        def listening() -> None:
            listener(StateChange(State.LISTENING, 0.0))

        return serve(options, run, listener, listening)

    return job


def _in_foreground(options: ServeOptions, run: RunDirectory, say: Callable[..., None]) -> None:
    try:
        asyncio.run(
            serve(
                options,
                run,
                lambda change: say(str(change.state), elapsed=change.elapsed),
                lambda: say(
                    "listening", socket=str(options.handshake), run_directory=str(run.path)
                ),
            )
        )
    except asyncio.CancelledError:
        raise OperationCancelledError("interrupted before a VMM was served") from None


def _follow(
    sidecar: process.Sidecar,
    goal: str,
    say: Callable[..., None],
    options: ServeOptions,
    run: RunDirectory,
) -> None:
    """Until what is waited for has come."""
    for event in sidecar.events():
        state = event.get("state", "")
        if event["event"] != "state":
            continue
        if state == LISTENING:
            say(
                state,
                f"{run.name}: a VMM can connect to {options.handshake} (PID {sidecar.pid})",
                socket=str(options.handshake),
                run_directory=str(run.path),
                name=run.name,
                sidecar_pid=sidecar.pid,
            )
        else:
            say(state, elapsed=event["elapsed"])
        if state == goal:
            return
