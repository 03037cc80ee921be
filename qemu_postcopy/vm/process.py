"""Who the target is: a process that cannot be mistaken for another, and what /proc says of it.

First step of every attach.  Trusts the kernel only: PIDs are reused, so a :class:`ProcessIdentity`
holds a pidfd from the first look on, and everything read from /proc afterwards counts only while
that pidfd says that the process lives.  No thread of its own; objects may be used by one thread at
a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from qemu_postcopy.errors import AttachError, HostError, TargetGoneError

# proc(5): start-end perms offset major:minor inode, then blanks and a path if there is one.
MAPS_LINE = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-][w-][x-][ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)"
    rb"(?: +(.*))?"
)

Answer = TypeVar("Answer")

#: (device major, device minor, inode): what makes two mappings mappings of the same file.
FileKey = tuple[int, int, int]


class Mapping(NamedTuple):
    """One line of /proc/PID/maps; addresses and the file offset in bytes.

    A tuple, because QEMU has hundreds of them and they are read on the way to a guest's first
    instruction: making so many frozen dataclasses took longer than the kernel's own answer.
    """

    start: int
    end: int
    permissions: str
    file_offset_bytes: int
    device_major: int
    device_minor: int
    inode: int
    path: str

    @property
    def file_key(self) -> FileKey | None:
        """None for anonymous memory."""
        return (self.device_major, self.device_minor, self.inode) if self.inode else None

    @property
    def shared(self) -> bool:
        return self.permissions[3] == "s"


@dataclass(frozen=True)
class Thread:
    tid: int
    name: str


@dataclass(frozen=True)
class Mapper:
    """Another process that maps a file."""

    pid: int
    name: str


def parse_maps(text: bytes) -> list[Mapping]:
    """The lines of /proc/PID/maps, strictly: HostError for one that is not understood."""
    mappings = []
    for line in text.splitlines():
        match = MAPS_LINE.fullmatch(line)
        if match is None:
            raise HostError(
                f"a line of /proc/PID/maps is not understood: {line.decode(errors='replace')!r}",
                hint="This kernel's format is new to us: please report the line.",
            )
        start, end, permissions, offset, major, minor, inode, path = match.groups()
        mappings.append(
            Mapping(
                start=int(start, 16),
                end=int(end, 16),
                permissions=permissions.decode(),
                file_offset_bytes=int(offset, 16),
                device_major=int(major, 16),
                device_minor=int(minor, 16),
                inode=int(inode),
                path=os.fsdecode(path or b""),
            )
        )
    return mappings


def start_time_of(pid: int) -> int:
    """When the process started, in clock ticks since boot: field 22 of /proc/PID/stat."""
    # The name (field 2) may hold blanks and parentheses; fields are counted from its last ')'.
    text = Path(f"/proc/{pid}/stat").read_bytes()
    return int(text[text.rindex(b")") + 2 :].split()[19])


def is_qemu(exe: str) -> bool:
    """Whether a program is a QEMU by its name."""
    return Path(exe).name.startswith("qemu-")


class ProcessIdentity:
    """One process, held by a pidfd.  Usable as a context manager, which closes the pidfd.

    Attributes: pid; start_time in clock ticks since boot (with the PID it names the process across
    a restart of ours); pidfd.
    """

    def __init__(self, pid: int, start_time: int, pidfd: int) -> None:
        self.pid = pid
        self.start_time = start_time
        self.pidfd = pidfd

    @classmethod
    def open(cls, pid: int, start_time: int | None = None) -> ProcessIdentity:
        """The process that has this PID now.

        Args:
            start_time: as noted at an earlier look, if there was one.

        Raises:
            TargetGoneError: there is none, or it is another than the one noted.
            HostError: pidfd_open(2) does not work here (Linux 5.3).
        """
        try:
            pidfd = os.pidfd_open(pid)
        except (ProcessLookupError, ValueError, OverflowError) as error:
            raise _gone(pid) from error
        except OSError as error:
            if error.errno == 22:  # EINVAL: pid <= 0, or the id of a thread (pidfd_open(2))
                raise _gone(pid) from error
            raise HostError(
                f"pidfd_open of process {pid} failed: {error.strerror}",
                hint="Linux 5.6 or newer is needed.",
            ) from error
        try:
            # Read after the pidfd was opened, and checked to be alive after that: it belongs to
            # the process behind the pidfd.
            found = start_time_of(pid)
            identity = cls(pid, found, pidfd)
            identity.require_alive()
        except (OSError, TargetGoneError) as error:
            os.close(pidfd)
            raise _gone(pid) from error
        if start_time is not None and found != start_time:
            os.close(pidfd)
            raise TargetGoneError(
                f"PID {pid} belongs to another process now",
                hint="The one that was meant has ended: look the PID up again.",
                vm=pid,
            )
        return identity

    def close(self) -> None:
        """Closes the pidfd; a second call does nothing."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def __enter__(self) -> ProcessIdentity:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ProcessIdentity pid={self.pid} start_time={self.start_time}>"

    def is_alive(self) -> bool:
        """False from the moment the process has ended (also while it is a zombie)."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def kill(self) -> None:
        """SIGKILL to this very process; nothing where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def require_alive(self) -> None:
        if not self.is_alive():
            raise _gone(self.pid)

    def require_qemu(self) -> None:
        """AttachError unless the program is a QEMU by its name."""
        exe = self.exe()
        if not is_qemu(exe):
            name = Path(exe.removesuffix(" (deleted)")).name
            raise AttachError(
                f"process {self.pid} is no QEMU: it runs {name!r}",
                hint="Give the PID of a qemu-system process, or its QMP socket.",
                vm=self.pid,
            )

    def exe(self) -> str:
        """The program's path; ends in ' (deleted)' where it was replaced by an update."""
        return str(self._look(Path(f"/proc/{self.pid}/exe").readlink))

    def cmdline(self) -> list[str]:
        """The arguments, the program's name first."""
        text = self._read("cmdline")
        return [os.fsdecode(part) for part in text.split(b"\0")[:-1]]

    def maps(self) -> list[Mapping]:
        """Its mappings in the order of their addresses, as one read found them."""
        return parse_maps(self._read("maps"))

    def smaps(self) -> str:
        """/proc/PID/smaps as it is; slow to read (proc_pid_smaps(5))."""
        return self._read("smaps").decode(errors="replace")

    def threads(self) -> list[Thread]:
        """Its threads in ascending order of their ids."""

        def read() -> list[Thread]:
            found = []
            for entry in Path(f"/proc/{self.pid}/task").iterdir():
                try:
                    name = (entry / "comm").read_text(errors="replace").rstrip("\n")
                except (FileNotFoundError, ProcessLookupError):
                    continue  # ended meanwhile
                found.append(Thread(int(entry.name), name))
            return sorted(found, key=lambda thread: thread.tid)

        return self._look(read)

    def descriptor_path(self, key: FileKey) -> str | None:
        """/proc/PID/fd/N of a descriptor of this file that it holds open, or None."""
        directory = Path(f"/proc/{self.pid}/fd")
        for entry in self._look(lambda: list(directory.iterdir())):
            try:
                status = entry.stat()
            except OSError:
                continue  # closed meanwhile
            device = status.st_dev
            if (os.major(device), os.minor(device), status.st_ino) == key:
                return str(entry)
        return None

    def mounts(self) -> str:
        """Its mount table, as /proc/PID/mountinfo has it."""
        return self._read("mountinfo").decode(errors="replace")

    def registered_from_birth(self, address: int, size_bytes: int) -> bool:
        """Whether the range was under a userfaultfd before anybody could touch it, so is empty."""
        return False

    def other_mappers(self, key: FileKey) -> list[Mapper]:
        """Every other process that maps this file, as far as this process may see.

        Without CAP_SYS_PTRACE that is: the processes of the same user.
        """
        return [mapper for mapper in mappers_of(key) if mapper.pid != self.pid]

    def _read(self, name: str) -> bytes:
        return self._look(Path(f"/proc/{self.pid}/{name}").read_bytes)

    def _look(self, read: Callable[[], Answer]) -> Answer:
        """Runs ``read``; its answer counts only if the process is alive afterwards."""
        try:
            answer = read()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise _gone(self.pid) from error
        except PermissionError as error:
            self.require_alive()
            raise AttachError(
                f"no right to look at process {self.pid}: {error.filename}: {error.strerror}",
                hint="Run as root, or as the user that QEMU runs as, with CAP_SYS_PTRACE.",
                vm=self.pid,
            ) from error
        self.require_alive()
        return answer


def _gone(pid: int) -> TargetGoneError:
    return TargetGoneError(
        f"there is no process {pid} (any more)",
        hint="Look the PID up again; if QEMU has just ended, its log says why.",
        vm=pid,
    )


def mappers_of(key: FileKey) -> Iterator[Mapper]:
    """Every process that maps this file, as far as this one may see."""
    major, minor, inode = key
    needle = f" {major:02x}:{minor:02x} {inode} ".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            if needle in Path(entry.path, "maps").read_bytes():
                name = Path(entry.path, "comm").read_text(errors="replace").rstrip("\n")
                yield Mapper(int(entry.name), name)
        except OSError:
            continue  # ended meanwhile, or another user's
