"""Run directories: one per guest, where sidecar, QEMU and operators meet.

A run directory holds the guest's monitor and console, the ledger, the sidecar's control socket and
log, and ``session.json``, which says which process is paged from which image.  Directories are
0700 and belong to the user who runs the guest; one of somebody else is never used.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from qemu_postcopy.errors import (
    HostError,
    PostcopyError,
    SidecarError,
    StateError,
    UsageError,
)

#: Recorded while a VMM is waited for: there is no guest yet, and no session.
LISTENING = "listening"
#: No record is longer: more than a thousand blocks and threads need, and most that is read.
RECORD_BYTES_MAX = 16 << 20
#: Recorded where nobody is served any more.
ENDS = ("detached", "failed", "gone")
#: What a monitor's address begins with where libvirt runs the guest.
LIBVIRT = "libvirt:"
#: Set aside on the disk for the next record: more than that of most guests needs.
RECORD_BYTES = 64 << 10
#: Something of this is in every run directory in which anything was done.
MARKS = (
    "session.json",
    "session.json.new",
    "sidecar.log",
    "ledger",
    "ledger.new",
    "disposable-image",
    "offer",
    "stream",
    "preload.sock",
    "qmp.sock",
    "control.sock",
    "keeper.sock",
)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,47}")


def boot_id() -> str:
    """A number of this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def base_directory() -> Path:
    """``$QEMU_POSTCOPY_RUN_DIR``, else /run/qemu-postcopy for root and the user's runtime directory
    otherwise.  Short, because a UNIX socket's path holds 107 bytes."""
    override = os.environ.get("QEMU_POSTCOPY_RUN_DIR")
    if override:
        return Path(override)
    if os.geteuid() == 0:
        return Path("/run/qemu-postcopy")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "qemu-postcopy"
    return Path(f"/tmp/qemu-postcopy-{os.geteuid()}")


@dataclass(frozen=True)
class SessionRecord:
    """What ``session.json`` says: enough to find the guest, and to take over from a dead sidecar.

    ``pid`` and ``start_time`` (clock ticks since boot) identify QEMU; ``launched_ns`` is the
    CLOCK_MONOTONIC of its start (0: not ours); ``attached_by`` is the way (``vm/ways.py``);
    ``userfaultfd`` is the descriptor's number in QEMU; ``blocks`` lists name, address, length and
    page size (bytes).
    """

    image: str
    state: str
    pid: int = 0
    start_time: int = 0
    launched_ns: int = 0
    sidecar_pid: int = 0
    attached_by: str = ""
    userfaultfd: int = -1
    chunk_size: int = 0
    #: of the kernel that ran then: after a reboot a PID and start time can come again
    boot_id: str = ""
    #: SHA-256 of the image's device state: which image it was, wherever that path leads now
    image_key: str = ""
    #: whether QEMU was launched for this guest, and is nobody else's
    owned: bool = False
    #: the monitor by which the guest can be asked and continued: a socket, or libvirt:URI#UUID
    qmp: str = ""
    #: whether QEMU had not confirmed yet where its memory lies (restores through libvirt, and
    #: launches through the gate, whose record is not written anew when it has)
    presumed: bool = False
    #: whether the guest was to stay stopped after its state was loaded
    paused: bool = False
    #: whether it is served on when it has all of its memory, until it ends
    stay: bool = False
    #: how it is kept from running until it is complete, if it is: `stopped` or `frozen`
    held: str = ""
    background: bool = True
    background_rate: int = 0
    blocks: list[dict[str, Any]] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Any] = field(default_factory=dict)
    #: see :func:`qemu_postcopy.status.collect`
    vcpus: dict[str, Any] = field(default_factory=dict)
    block_counts: list[dict[str, Any]] = field(default_factory=list)
    #: names of QEMU's threads by their ids, once it was asked
    threads: dict[str, str] = field(default_factory=dict)
    #: whether QEMU's CPU offers asynchronous page faults; None: it was not asked, or does not tell
    async_offered: bool | None = None
    #: the file that every fault is recorded in
    trace: str = ""
    #: what the operator knows the image by: of a save file that is served in place, that file
    shown: str = ""
    #: what is wrong with the guest's memory for good, in words
    damage: str = ""


class RunDirectory:
    """One guest's directory.  Made by :meth:`create`, found by :meth:`find`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Locked by whoever restores into it, and inherited by its sidecar.
        self._lock = -1

    @property
    def name(self) -> str:
        """The guest's name among this user's guests."""
        return self.path.name

    @property
    def qmp_socket(self) -> Path:
        """QEMU's monitor."""
        return self.path / "qmp.sock"

    @property
    def control_socket(self) -> Path:
        """The sidecar's."""
        return self.path / "control.sock"

    @property
    def keeper_socket(self) -> Path:
        """That of whoever keeps the descriptor of a VMM that is no QEMU; see :mod:`.keeper`."""
        return self.path / "keeper.sock"

    @property
    def ledger(self) -> Path:
        """See :mod:`qemu_postcopy.paging.ledger`."""
        return self.path / "ledger"

    @property
    def supervisor_notes(self) -> Path:
        """What went wrong with the last take-overs; see :mod:`.supervisor`."""
        return self.path / "supervisor.json"

    def supervisor_trouble(self) -> str:
        """That, in words; empty where all is well, or there is no supervisor."""
        try:
            notes = json.loads(self.supervisor_notes.read_text())
            return f"its supervisor has failed {notes['failures']} times: {notes['trouble']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    @property
    def stream(self) -> Path:
        """The FIFO that libvirt restores from; see :mod:`qemu_postcopy.libvirt.gate`."""
        return self.path / "stream"

    @property
    def _disposable(self) -> Path:
        """Names the image that goes with the guest."""
        return self.path / "disposable-image"

    @property
    def sidecar_log(self) -> Path:
        """What the sidecar had to say."""
        return self.path / "sidecar.log"

    @classmethod
    def create(cls, name: str, base: Path | None = None) -> Self:
        """Makes the directory; one left by a guest that has ended is emptied first.

        Raises:
            UsageError: the name cannot be one, or is that of a directory of another kind.
            HostError: it, or the directory above, belongs to somebody else or cannot be made.
            StateError: a guest of that name runs, or is being restored.
        """
        if not NAME.fullmatch(name):
            raise UsageError(
                f"{name!r} cannot be a guest's name",
                hint="letters, digits, '_', '.' and '-', at most 48 of them: choose one by --name",
            )
        base = base or base_directory()
        directory = cls(base / name)
        if len(os.fsencode(directory.path)) > 90:
            raise UsageError(
                f"the run directory's path is too long for sockets in it: {directory.path}",
                hint="choose a shorter one by QEMU_POSTCOPY_RUN_DIR or --name",
            )
        try:
            base.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(base)
            if directory.path.is_symlink() or directory.path.exists():
                _check_owner(directory.path)
                if not directory.is_run_directory():
                    raise UsageError(
                        f"{directory.path} is there, and is no run directory",
                        hint="choose another --name, or another place by QEMU_POSTCOPY_RUN_DIR",
                    )
                record = directory.read_record(missing_ok=True)
                # Where a restore failed there is no guest, though QEMU may wait for the next try.
                if record and record.state != "failed" and directory.guest_alive(record):
                    raise StateError(
                        f"a guest named {name} runs already (PID {record.pid})",
                        hint=f"choose another name by --name, or end it: kill {record.pid}",
                    )
                directory._take_lock()
                directory.remove()
            directory.path.mkdir(mode=0o700)
            directory._take_lock()
        except OSError as error:
            raise HostError(
                f"cannot make the run directory {directory.path}: {error.strerror}",
                hint="choose another place by QEMU_POSTCOPY_RUN_DIR",
            ) from error
        return directory

    def is_run_directory(self) -> bool:
        """Whether it was made here: QEMU_POSTCOPY_RUN_DIR may be a directory for other things too,
        which must neither be shown nor removed.

        Raises:
            OSError: it cannot be looked into.
        """
        names = {path.name for path in self.path.iterdir()}
        if not names:
            return stat.S_IMODE(self.path.lstat().st_mode) == 0o700
        return not names.isdisjoint(MARKS)

    def _take_lock(self) -> None:
        self.release()
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise StateError(
                f"a guest named {self.name} is being restored or served",
                hint="choose another name by --name, or see: qemu-postcopy status",
            ) from None
        if not self._is_ours():  # it was opened before whoever had the lock replaced it
            self.release()
            raise StateError(f"{self.name} was removed or replaced just now", hint="try again")

    def lock(self) -> None:
        """Makes this process the one that serves the guest.

        Raises:
            StateError: another one does, or is restoring it.
        """
        self._take_lock()

    def is_lost(self) -> bool:
        """Whether it was removed, or replaced, while this process has the lock; or the ledger was.

        Then no other sidecar could take over from this one.
        """
        return not self._is_ours() or not self.ledger.exists()

    def _is_ours(self) -> bool:
        """Whether the path still leads to the directory that this process has locked, if it has."""
        try:
            return self._lock < 0 or os.path.samestat(self.path.stat(), os.fstat(self._lock))
        except OSError:
            return False

    def wait_unserved(self) -> bool:
        """Returns when nobody restores or serves the guest; this process then has the lock.

        False where the directory was removed or replaced meanwhile: that guest is no more.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        self._lock = descriptor
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return self._is_ours()

    def is_served(self) -> bool:
        """Whether a process holds the lock now."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Shared: so that two that ask at the same time do not see each other.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def release(self) -> None:
        """Lets others restore under this name again, once its guest has ended."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def discard_unused(self) -> None:
        """Removes a directory in which nothing was restored, or a VMM was waited for in vain."""
        record = self.read_record(missing_ok=True)
        if record is None or record.state == LISTENING:
            self.remove()

    def remove(self) -> None:
        """Removes the directory, and the image that was made for its guest only."""
        self.discard_image()
        self.end_stream()
        shutil.rmtree(self.path, ignore_errors=True)

    def end_stream(self) -> None:
        """Has whoever still waits for a stream of a sidecar that is gone give up."""
        with suppress(OSError):
            descriptor = os.open(self.stream, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                end_fifo(self.stream, descriptor)
            finally:
                os.close(descriptor)

    def note_disposable(self, image: Path) -> None:
        """That image is made for this guest, and of no use once it has all of its memory."""
        self._disposable.write_text(str(image.absolute()))

    def discard_image(self) -> None:
        """Removes the image that was noted, or what a killed program has made of it."""
        from qemu_postcopy.image.writer import remove_leftovers

        with suppress(OSError):
            image = Path(self._disposable.read_text())
            shutil.rmtree(image, ignore_errors=True)
            remove_leftovers(image)
            self._disposable.unlink(missing_ok=True)

    def tidy(self) -> None:
        """For whoever has served, and has the lock: removes what the guest needs no longer; all of
        it where the guest was a domain of libvirt's and has ended, since libvirt tells of that."""
        record = self.read_record(missing_ok=True) if self._is_ours() else None
        if record is None:
            return
        alive = self.guest_alive(record)
        if not alive or record.state in ENDS:
            self.discard_image()
        if not alive and record.qmp.startswith(LIBVIRT) and record.state != "failed":
            self.remove()

    @classmethod
    def find(cls, name: str, base: Path | None = None) -> Self:
        """The directory of a guest that was restored before.

        Raises:
            SidecarError: there is none; the names that exist are listed.
        """
        base = base or base_directory()
        if NAME.fullmatch(name) and (base / name / "session.json").exists():
            _check_owner(base / name)
            return cls(base / name)
        names = ", ".join(directory.name for directory in list_directories(base)) or "none"
        raise SidecarError(f"no guest named {name} is known", hint=f"known in {base}: {names}")

    def write_record(self, record: SessionRecord) -> None:
        """Replaces ``session.json`` in one step.

        Raises:
            OSError: it cannot be written; or this process serves a guest whose directory was
                removed, and what is there now is another guest's.
        """
        if not self._is_ours():
            raise FileNotFoundError(errno.ENOENT, "its directory was removed")
        temporary = self.path / "session.json.new"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(record), file, indent=1)
            file.truncate()
        temporary.rename(self.path / "session.json")
        # Room for the next one, which tells that the guest needs nobody any more: the file system
        # may be full by then.
        with suppress(OSError):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RECORD_BYTES)
            finally:
                os.close(descriptor)

    def update_record(self, **changes: Any) -> None:
        """Changes some fields of ``session.json``."""
        record = self.read_record()
        if record is not None:
            self.write_record(replace(record, **changes))

    def read_record(self, *, missing_ok: bool = False) -> SessionRecord | None:
        """What ``session.json`` says; None where there is none and that is allowed.

        Raises:
            SidecarError: it is missing or damaged.
        """
        path = self.path / "session.json"
        try:
            return SessionRecord(**json.loads(_read_regular(path)))
        except FileNotFoundError:
            if missing_ok:
                return None
            raise SidecarError(f"{path} is missing", hint="the guest was never restored") from None
        except (ValueError, TypeError) as error:
            raise SidecarError(f"{path} is damaged: {error}") from error

    def silent_sidecar(self, record: SessionRecord) -> tuple[str, str]:
        """Why nobody answers at the control socket, and what to do about it, both in words."""
        recover = f"qemu-postcopy recover {self.name}"
        if not self.is_served():
            return "its sidecar has died, so the guest waits", f"{recover} starts another"
        pid = record.sidecar_pid
        match _process_state(pid):
            case "":
                return "another sidecar takes over", "ask again in a moment"
            case "T" | "t":
                what = f"its sidecar (PID {pid}) is stopped, so the guest waits"
                return what, f"kill -CONT {pid} lets it go on"
        what = f"its sidecar (PID {pid}) lives and does not answer"
        return what, f"if it goes on like that: kill -KILL {pid}, then {recover}"

    @staticmethod
    def guest_alive(record: SessionRecord) -> bool:
        """True while the very process of the record lives (a reused PID is another process)."""
        from qemu_postcopy.vm.process import ProcessIdentity

        if record.boot_id and record.boot_id != boot_id():
            return False
        try:
            ProcessIdentity.open(record.pid, record.start_time or None).close()
        except PostcopyError:
            return False
        return True


def _read_regular(path: Path) -> bytes:
    """Of a file that may be another user's: no link is followed, no FIFO waited for."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise SidecarError(f"{path} is a symbolic link") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise SidecarError(f"{path} is no file")
        return file.read(RECORD_BYTES_MAX)


def list_directories(base: Path | None = None) -> list[RunDirectory]:
    """All run directories of this user, by name; those of others are left out."""
    base = base or base_directory()
    if not base.is_dir():
        return []
    found = []
    for path in sorted(base.iterdir()):
        with suppress(FileNotFoundError):  # it went away meanwhile
            if (path / "session.json").exists() and path.stat().st_uid == os.geteuid():
                found.append(RunDirectory(path))
    return found


def end_fifo(path: Path, descriptor: int) -> None:
    """Ends a FIFO that is open for both ways: no reader takes what it gets for its own.

    The end of the file alone would not do: QEMU 7.2 reads on for ever where a stream ends before
    its begin, and who waits for a writer in open(2) waits on when the name is gone.
    """
    with suppress(BlockingIOError):
        os.write(descriptor, bytes(4096))
    path.unlink(missing_ok=True)


def remove_ended(base: Path | None = None) -> None:
    """Removes what is left of libvirt's domains that ended when no sidecar was there to do so."""
    for directory in list_directories(base):
        with suppress(PostcopyError, OSError):
            directory.lock()
            try:
                directory.tidy()
            finally:
                directory.release()


def _process_state(pid: int) -> str:
    """The letter of proc(5), field 3 of /proc/PID/stat; empty where there is no such process, or
    only its exit status is left."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    state = text[text.rindex(b")") + 2 :][:1].decode()
    return "" if state in "ZX" else state


def _check_owner(path: Path) -> None:
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise HostError(f"{path} is not a directory", hint="remove it, or choose another --name")
    if found.st_uid != os.geteuid():
        raise HostError(
            f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()})",
            hint="what is in it cannot be trusted: choose another place by QEMU_POSTCOPY_RUN_DIR",
        )
    if found.st_mode & 0o022:
        raise HostError(
            f"{path} can be written by others",
            hint=f"run: chmod go-w {path}, and look what is in it",
        )
