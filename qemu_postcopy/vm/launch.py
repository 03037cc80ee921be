"""Starting a QEMU and owning it: its process, its output, its monitor, its end.

Step one of a restore.  QEMU is started before anything slow is imported: its own start takes 30 to
50 ms, in which the caller's imports run.  It gets a session of its own, writes into files of the
run directory, and so lives on if we do not.  Its end is seen through a pidfd, never through a child
watcher.  Trusts the argument list as the operator's own.

Two monitors are added: one on a socket pair, connected from the start, so that its greeting is the
sign that QEMU is ready; one on `qmp.sock` in the run directory for everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qemu_postcopy.errors import (
    HostError,
    LaunchError,
    QmpError,
    TargetGoneError,
    UsageError,
)
from qemu_postcopy.vm.process import ProcessIdentity

if TYPE_CHECKING:
    from qemu_postcopy.vm.opening import OpeningReader, Question
    from qemu_postcopy.vm.qmp import Qmp

CONTROL_ID = "qpc-control"
OPERATOR_ID = "qpc-operator"
LOG_NAME = "qemu.log"
SOCKET_NAME = "qmp.sock"
READY_SECONDS = 30.0
#: As much of QEMU's output as an error message shows.
SHOWN_OUTPUT_BYTES = 8192


def prepare_run_directory(path: Path) -> Path:
    """Makes the directory, 0700, or checks that it is ours and nobody else's to write.

    Raises: HostError
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostError(
            f"cannot make the run directory {path}: {error.strerror}",
            hint="Choose another run directory.",
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise HostError(
            f"the run directory {path} is not a directory of this user (its owner is "
            f"user {status.st_uid})",
            hint="Choose another run directory, or remove that one if nobody uses it.",
        )
    path.chmod(0o700)
    return path.resolve()


def control_arguments(descriptor: int, socket_path: Path) -> list[str]:
    """The two monitors, as QEMU's arguments."""
    path = str(socket_path).replace(",", ",,")
    return [
        *("-chardev", f"socket,id={CONTROL_ID},fd={descriptor}"),
        *("-mon", f"chardev={CONTROL_ID},mode=control"),
        *("-chardev", f"socket,id={OPERATOR_ID},path={path},server=on,wait=off"),
        *("-mon", f"chardev={OPERATOR_ID},mode=control"),
    ]


class QemuProcess:
    """A QEMU that this process has started.

    Attributes: identity (PID and pidfd); argv, as executed; run_dir; log_path with what QEMU wrote
    to its standard output and error; qmp_path, the monitor for others.
    """

    def __init__(
        self, identity: ProcessIdentity, argv: list[str], run_dir: Path, control: socket.socket
    ) -> None:
        self.identity = identity
        self.argv = argv
        self.run_dir = run_dir
        self.log_path = run_dir / LOG_NAME
        self.qmp_path = run_dir / SOCKET_NAME
        self._control: socket.socket | None = control
        self._returncode: int | None = None
        self._asked: OpeningReader | None = None

    @property
    def pid(self) -> int:
        return self.identity.pid

    def output(self) -> str:
        """The end of what QEMU wrote."""
        text = self.log_path.read_bytes()[-SHOWN_OUTPUT_BYTES:]
        return text.decode(errors="replace")

    def ask_ahead(self, questions: Sequence[Question], descriptor: int | None = None) -> None:
        """Has QEMU answer these as soon as it can; before :meth:`connect`, at most once.

        ``descriptor`` goes with a `getfd` among them.
        """
        from qemu_postcopy.vm.opening import OpeningReader, ask_ahead

        if self._control is None:
            raise UsageError("the control monitor was taken before", hint="Connect to qmp_path.")
        # A QEMU that has ended already is noticed by connect().
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ask_ahead(self._control, questions, descriptor)
        self._asked = OpeningReader(self._control, questions)

    async def ready(self, timeout: float = READY_SECONDS) -> tuple[int, int, int]:
        """Waits until QEMU does what it is asked, and returns its version; after :meth:`ask_ahead`
        and before :meth:`connect`.

        Raises: LaunchError, as :meth:`connect`.
        """
        assert self._asked is not None
        try:
            async with asyncio.timeout(timeout):
                greeting = await self._asked.ready()
        except (QmpError, TimeoutError) as error:
            raise await self._not_ready() from error
        numbers = greeting["QMP"]["version"]["qemu"]
        return numbers["major"], numbers["minor"], numbers["micro"]

    async def answered(self, timeout: float = READY_SECONDS) -> None:
        """Waits until QEMU has answered all that :meth:`ask_ahead` has asked.

        Raises: LaunchError, as :meth:`connect`.
        """
        assert self._asked is not None
        try:
            async with asyncio.timeout(timeout):
                await self._asked.answers()
        except (QmpError, TimeoutError) as error:
            raise await self._not_ready() from error

    async def connect(self, timeout: float = READY_SECONDS) -> Qmp:
        """Waits until QEMU is ready and returns its monitor, which can be had once.

        Raises: LaunchError with exit code, command line and output, if QEMU ended or did not
        become ready within ``timeout`` seconds (then it is killed).
        """
        # Imported here: this takes as long as QEMU needs to start, and it has been started.
        from qemu_postcopy.vm.qmp import Qmp

        control, self._control = self._control, None
        if control is None:
            raise UsageError("the control monitor was taken before", hint="Connect to qmp_path.")
        try:
            qmp = await Qmp.connect(control, timeout, self._asked)
        except QmpError as error:
            control.close()
            raise await self._not_ready() from error
        # QEMU made this socket with the umask it inherited; the directory kept others out.
        self.qmp_path.chmod(0o600)
        return qmp

    async def _not_ready(self) -> LaunchError:
        # A QEMU that has closed its monitor is about to end, and only then has said why.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self.wait_exit()
        return self._launch_error("QEMU did not become ready")

    def _launch_error(self, message: str) -> LaunchError:
        code = self.poll()
        if code is None:
            self.kill()
        return launch_error(message, self.argv, code, self.output())

    async def wait_exit(self) -> int:
        """Waits for the end and returns the exit status, negative for a signal."""
        if self._returncode is None:
            loop = asyncio.get_running_loop()
            ended = asyncio.Event()
            # A descriptor of its own: a loop watches each number once, and several may wait.
            watched = os.dup(self.identity.pidfd)
            loop.add_reader(watched, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(watched)
                os.close(watched)
        return self._reap()

    def poll(self) -> int | None:
        """The exit status, or None while QEMU runs."""
        if self._returncode is None and self.identity.is_alive():
            return None
        return self._reap()

    def kill(self) -> int:
        """Kills QEMU if it runs, and waits for the end."""
        if self._returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.identity.pidfd, signal.SIGKILL)
        return self._reap()

    def _reap(self) -> int:
        if self._returncode is None:
            ended = os.waitid(os.P_PIDFD, self.identity.pidfd, os.WEXITED)
            assert ended is not None  # only WNOHANG gives None
            exited = ended.si_code == os.CLD_EXITED
            self._returncode = ended.si_status if exited else -ended.si_status
        return self._returncode

    def close(self) -> None:
        """Lets go of QEMU, which runs on if it runs: the pidfd, and the monitor if not taken."""
        if self._control is not None:
            self._control.close()
            self._control = None
        self.identity.close()


def launch_error(message: str, argv: Sequence[str], code: int | None, output: str) -> LaunchError:
    """What a failed launch reports: exit code, whole command line, output."""
    state = "it was still running and has been killed"
    if code is not None:
        state = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
    said = output.strip() or "(none)"
    return LaunchError(
        f"{message}: {state}\n  command: {shlex.join(argv)}\n  output: {said}",
        command=list(argv),
        returncode=code,
        output=output,
        hint="Run the command by hand, or change what its output complains about.",
    )


def launch(
    argv: Sequence[str],
    run_dir: Path,
    *,
    pass_descriptors: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> QemuProcess:
    """Starts QEMU and returns at once; :meth:`QemuProcess.connect` waits until it is ready.

    Args:
        argv: the command line without a monitor, the program first.
        run_dir: made with mode 0700 if need be; must be this user's.
        pass_descriptors: stay open in QEMU under their numbers.
        environment: instead of this process's own.

    Raises: LaunchError if the program cannot be executed; HostError for the run directory;
    UsageError for `-daemonize`, which would leave us without the process.
    """
    if "-daemonize" in argv or "--daemonize" in argv:
        raise UsageError(
            "-daemonize and a launch of ours exclude each other", hint="Leave -daemonize out."
        )
    run_dir = prepare_run_directory(run_dir)
    # A socket that an earlier QEMU left behind would keep this one from binding.
    (run_dir / SOCKET_NAME).unlink(missing_ok=True)
    ours, theirs = socket.socketpair()
    command = [*argv, *control_arguments(theirs.fileno(), run_dir / SOCKET_NAME)]
    log_flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    passed = [theirs.fileno(), *pass_descriptors]
    try:
        pid = os.posix_spawnp(
            command[0],
            command,
            environment if environment is not None else os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(run_dir / LOG_NAME), log_flags, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                # A descriptor copied onto itself loses close-on-exec (posix_spawn(3), glibc 2.29).
                *((os.POSIX_SPAWN_DUP2, number, number) for number in passed),
            ],
            setsid=True,
            setsigmask=[],
        )
    except OSError as error:
        ours.close()
        raise launch_error(
            f"cannot execute {command[0]}: {error.strerror}", command, None, ""
        ) from error
    finally:
        theirs.close()
    try:
        identity = ProcessIdentity.open(pid)
    except TargetGoneError as error:
        # It has ended already; unreaped, so the PID is still its own.
        ours.close()
        _, status = os.waitpid(pid, 0)
        output = (run_dir / LOG_NAME).read_text(errors="replace")
        code = os.waitstatus_to_exitcode(status)
        raise launch_error("QEMU ended at once", command, code, output) from error
    return QemuProcess(identity, command, run_dir, ours)
