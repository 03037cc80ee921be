"""Hosts with a real libvirtd and virtlogd, started without systemd: several on one machine.

A host is a set of namespaces (PID, mount, UTS, network, cgroup) with its own /run, /etc/libvirt,
/var/lib/libvirt, /var/log/libvirt and host UUID, so that one can migrate to another; /tmp and the
rest of the file system are the machine's, for what hosts share.  libvirt's configuration is the
package's but for the UUID.  libvirt 9.0 is the machine's own; 11.3 with its QEMU lies over /usr.

What an operator runs on the host is run inside by :meth:`Host.run` and :meth:`Host.popen`; from
outside its libvirtd is reached by :attr:`Host.uri`.  Whatever runs on a host ends with it, also
when the test run is killed (host_init.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from libvirtd.host_init import OWN
from vm.guests import PATIENCE, wait_until

import qemu_postcopy

HOST_INIT = Path(__file__).with_name("host_init.py")
CONFIGURATION = Path("/etc/libvirt")
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_PREFIX = "qpc-host-"
#: A user of every host, for session connections.
OPERATOR, OPERATOR_ID = "operator", 47110
#: sh: enters the cgroups before `--`, becomes the command after it.
ENTER_CGROUPS = """
while [ "$1" != -- ]; do echo $$ >"$1/cgroup.procs"; shift; done
shift; exec "$@"
"""
#: sh: `STAGE CLOSED PATH... -- COMMAND...` in a mount namespace of its own: of the directory CLOSED
#: which others may not enter, there are only these paths below, and everybody may enter.
OPEN_PATHS = """
stage=$1 closed=$2 number=0; shift 2
for path; do
    [ "$path" = -- ] && break
    number=$((number + 1)); mkdir -p "$stage/$number"; mount --bind "$path" "$stage/$number"
done
mount -t tmpfs -o mode=755 tmpfs "$closed"; number=0
while [ "$1" != -- ]; do
    number=$((number + 1)); mkdir -p "$1"; mount --bind "$stage/$number" "$1"; shift
done
shift; exec "$@"
"""
DAEMONS = ("virtlogd", "libvirtd")


@dataclass(frozen=True)
class Stack:
    """A libvirt with its QEMU; `prefix` and `overlays` where they are not the machine's own."""

    name: str
    prefix: Path | None = None
    overlays: tuple[Path, ...] = ()

    @classmethod
    def of_machine(cls) -> Stack:
        return cls("libvirt")

    @classmethod
    def unpacked(cls, prefix: Path) -> Stack:
        """What `qemu-postcopy images libvirt` has fetched; `prefix` is as it says."""
        from qemu_postcopy.images.libvirt_versions import load_libvirt

        return cls("libvirt11", prefix, tuple(load_libvirt(prefix).overlays()))


class Host:
    """One host with its daemons.  Made by :meth:`start`; a context manager."""

    def __init__(self, stack: Stack, name: str) -> None:
        self.stack = stack
        self.name = name
        self.uuid = str(uuid.uuid4())
        #: Its private directories, as seen from outside; short, for the sockets in it.
        self.directory = Path(tempfile.mkdtemp(prefix="qpch-"))
        # QEMU runs as a user of its own and reaches sockets below /run and /var/lib by this path
        # only inside; nobody but us needs it from outside.
        self.directory.chmod(0o711)
        self._init: subprocess.Popen[str] | None = None
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._cgroups: list[Path] = []
        #: PID 1 of the host, as the machine sees it
        self.pid = 0

    @classmethod
    def start(cls, stack: Stack, name: str) -> Host:
        """A host whose daemons answer; takes about a second."""
        host = cls(stack, name)
        try:
            host._configure()
            host._begin()
            for daemon in DAEMONS:
                host.start_daemon(daemon)
        except BaseException:
            host.close()
            raise
        return host

    # ---- making it ----

    def _configure(self) -> None:
        for own in OWN:
            (self.directory / own).mkdir()
        for below in ("lock", "user", f"user/{OPERATOR_ID}", "libvirt"):
            (self.directory / "run" / below).mkdir()
        source = (self.stack.prefix or Path("/")) / CONFIGURATION.relative_to("/")
        for file in source.glob("*.conf"):
            shutil.copy(file, self.directory / "etc")
        (self.directory / "etc/hooks").mkdir()
        with (self.directory / "etc/libvirtd.conf").open("a") as text:
            text.write(f'\nhost_uuid = "{self.uuid}"\n')
        home = self.directory / "home"
        home.mkdir()
        for path in (home, self.directory / f"run/user/{OPERATOR_ID}"):
            os.chown(path, OPERATOR_ID, OPERATOR_ID)
            path.chmod(0o700)
        entries = {
            "passwd": f"{OPERATOR}:x:{OPERATOR_ID}:{OPERATOR_ID}::{home}:/bin/sh\n",
            "group": f"{OPERATOR}:x:{OPERATOR_ID}:\n",
            "hosts": f"127.0.1.1 {self.name}\n",
        }
        for file_name, entry in entries.items():
            text_before = Path("/etc", file_name).read_text()
            (self.directory / file_name).write_text(text_before + entry)
        # Nobody answers for DNS in there: 8 s for each name that is looked up in vain.
        names = Path("/etc/nsswitch.conf").read_text()
        names = re.sub(r"^hosts:.*$", "hosts: files", names, flags=re.MULTILINE)
        (self.directory / "nsswitch.conf").write_text(names)
        self._make_cgroups()

    def _make_cgroups(self) -> None:
        """One below our own in every hierarchy: what one host's libvirtd makes, removes or limits
        does not meet another's machine of the same name."""
        paths = {}
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            # The second version's only hierarchy has no name; beside the first it is "unified".
            paths[controllers.removeprefix("name=") or "unified"] = path
        for mounted in sorted(CGROUPS.iterdir()) if CGROUPS.is_dir() else ():
            if mounted.name not in paths or mounted.is_symlink():
                continue
            parent = mounted / paths[mounted.name].lstrip("/")
            for stale in parent.glob(f"{CGROUP_PREFIX}*"):
                remove_cgroup(stale)  # of a run that was killed
            own = parent / f"{CGROUP_PREFIX}{self.directory.name}"
            try:
                own.mkdir()
                for name in ("cpuset.cpus", "cpuset.mems"):
                    if (own / name).exists():
                        (own / name).write_text((parent / name).read_text())
            except OSError:
                continue  # read-only here: libvirtd then does without, as anywhere else
            self._cgroups.append(own)

    def _begin(self) -> None:
        """Starts PID 1 and waits until it has made the mounts."""
        mounts = [(str(path), str(CGROUPS / path.relative_to(CGROUPS).parts[0]))
                  for path in self._cgroups]  # fmt: skip
        orders = {
            "directory": str(self.directory),
            "name": self.name,
            "overlays": [str(path) for path in self.stack.overlays],
            "files": ["passwd", "group", "hosts", "nsswitch.conf"],
            "cgroups": mounts,
        }
        command = [
            "sh", "-ec", ENTER_CGROUPS, "sh", *map(str, self._cgroups), "--",
            "unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--net", "--cgroup",
            sys.executable, str(HOST_INIT), json.dumps(orders),
        ]  # fmt: skip
        with (self.directory / "init.log").open("w") as log:
            self._init = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=daemon_environment(),
            )  # fmt: skip
        assert self._init.stdout is not None
        said = self._init.stdout.readline()
        if said != "ready\n":
            raise AssertionError(f"{self.name}: {(self.directory / 'init.log').read_text()}")
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text()
        self.pid = int(children.split()[0])

    # ---- its daemons ----

    def start_daemon(self, name: str) -> None:
        """Starts `virtlogd` or `libvirtd` and waits until it answers."""
        with (self.directory / f"log/{name}.stderr").open("ab") as log:
            self._daemons[name] = self.popen(
                f"/usr/sbin/{name}", env=daemon_environment(), stdout=log, stderr=log
            )
        socket_path = self.directory / f"run/libvirt/{socket_name(name)}"
        wait_until(
            lambda: self._daemons[name].poll() is not None or socket_path.exists(),
            f"{socket_path} of {name}",
        )
        said = (self.directory / f"log/{name}.stderr").read_text()
        assert self._daemons[name].poll() is None, f"{self.name}: {name} has ended: {said}"
        if name == "libvirtd":
            self.virsh("domcapabilities")  # has it ask the emulator

    def stop_daemon(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """Ends a daemon by a signal and waits for that; its guests run on."""
        for pid in self.processes(f"/usr/sbin/{name}"):
            with contextlib.suppress(ProcessLookupError):  # it was forked for a moment
                os.kill(pid, number)
        self._daemons.pop(name).wait(PATIENCE)
        # A killed one leaves its socket, which must not be taken for that of the next.
        (self.directory / f"run/libvirt/{socket_name(name)}").unlink(missing_ok=True)

    def daemon_parent(self, name: str) -> int:
        """The PID of what has started a daemon and waits for it."""
        return self._daemons[name].pid

    def daemon(self, name: str) -> int:
        """The PID of a daemon; what it forks looks just like it before it becomes what it runs."""
        parent = self.daemon_parent(name)
        (pid,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(pid)

    def restart_daemon(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        self.stop_daemon(name, number)
        self.start_daemon(name)

    @property
    def socket(self) -> Path:
        """The system daemon's socket, as seen from outside."""
        return self.directory / "run/libvirt/libvirt-sock"

    @property
    def uri(self) -> str:
        """The system daemon, from outside; inside it is `qemu:///system`."""
        return f"qemu+unix:///system?socket={self.socket}"

    @property
    def session_uri(self) -> str:
        """The session daemon of OPERATOR, from outside; :meth:`start_session` starts it."""
        return f"qemu+unix:///session?socket={self.session_socket}"

    @property
    def session_socket(self) -> Path:
        return self.directory / f"run/user/{OPERATOR_ID}/libvirt/libvirt-sock"

    def start_session(self) -> None:
        """The session daemon of the user OPERATOR, as the first `virsh -c qemu:///session` does."""
        self.run("virsh", "-c", "qemu:///session", "nodeinfo", user=OPERATOR)

    # ---- what runs on it ----

    def command(self, *words: object, user: str = "") -> list[str]:
        """The command line that runs these words on the host, for subprocess."""
        enter = ["nsenter", "-t", str(self.pid), "-p", "-m", "-u", "-n", "-C"]
        if user:
            home = self.directory / "home"
            enter += [
                *self._open_python(),
                "setpriv", f"--reuid={OPERATOR_ID}", f"--regid={OPERATOR_ID}", "--clear-groups",
                "env", f"HOME={home}", f"USER={user}", f"LOGNAME={user}",
                f"XDG_RUNTIME_DIR=/run/user/{OPERATOR_ID}",
            ]  # fmt: skip
        return [*enter, *map(str, words)]

    def popen(
        self, *words: object, user: str = "", stdout: int | IO[bytes] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        return subprocess.Popen(self.command(*words, user=user), stdout=stdout, **options)

    def run(
        self,
        *words: object,
        user: str = "",
        status: int = 0,
        patience: float = PATIENCE,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program on the host and checks its exit status."""
        done = subprocess.run(
            self.command(*words, user=user),
            capture_output=True, text=True, timeout=patience, check=False, **options,
        )  # fmt: skip
        assert done.returncode == status, (
            f"{self.name}: {' '.join(map(str, words))}: exit {done.returncode}, not {status}\n"
            f"{done.stdout}{done.stderr}"
        )
        return done

    def virsh(self, *words: object, status: int = 0) -> str:
        """virsh's standard output, with the system daemon."""
        return self.run("virsh", "-q", "-c", "qemu:///system", *words, status=status).stdout

    def tool(
        self, *words: object, user: str = "", status: int = 0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """qemu-postcopy on the host."""
        command = [sys.executable, "-m", "qemu_postcopy", *words]
        return self.run(*command, user=user, status=status, **options)

    def _open_python(self) -> list[str]:
        """What lets a user read this Python and the package, where they lie in directories that
        others may not enter: root's home, tox's."""
        paths = [Path(sys.base_prefix), Path(sys.prefix), Path(qemu_postcopy.__file__).parents[1]]
        closed = {
            next((above for above in reversed(path.parents) if not above.stat().st_mode & 1), None)
            for path in paths
        } - {None}
        words: list[str] = []
        for number, directory in enumerate(sorted(map(str, closed))):
            inside = [str(path) for path in paths if path.is_relative_to(directory)]
            stage = str(self.directory / f"opened{number}")
            words += ["unshare", "-m", "sh", "-ec", OPEN_PATHS, "sh", stage, directory]
            words += [*inside, "--"]
        return words

    def processes(self, program: str = "") -> list[int]:
        """PIDs, as the machine sees them, of the host's processes whose command begins so."""
        space = Path(f"/proc/{self.pid}/ns/pid").stat().st_ino
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().decode(errors="replace")
                if command.startswith(program) and (folder / "ns/pid").stat().st_ino == space:
                    found.append(int(folder.name))
        return found

    def qemus(self) -> list[int]:
        """PIDs of its QEMUs; not of those that libvirtd asks for their capabilities."""
        return [
            pid
            for pid in self.processes("/usr/bin/qemu-system")
            if b"\0-name\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]

    def domains(self) -> list[str]:
        """Names of the domains of the system daemon, running or not."""
        return self.virsh("list", "--all", "--name").split()

    def clean(self) -> list[str]:
        """Ends and forgets every domain; returns what was there."""
        names = self.domains()
        for name in names:
            for what in (("destroy",), ("undefine", "--managed-save", "--nvram")):
                # One that is transient, or shut off, has only one of the two.
                command = self.command("virsh", "-c", "qemu:///system", *what, name)
                subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False)
        wait_until(lambda: not self.qemus(), f"{self.name}: its QEMUs have ended", 20)
        return names

    def close(self) -> None:
        """Ends every process of the host and removes what it had for itself. Never fails."""
        if self._init is not None:
            assert self._init.stdin is not None
            with contextlib.suppress(OSError):
                self._init.stdin.close()
            try:
                self._init.wait(10)
            except subprocess.TimeoutExpired:
                self._init.kill()  # --kill-child takes PID 1 along
                self._init.wait()
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait()
        for own in self._cgroups:
            wait_until(partial(remove_cgroup, own), f"{own} is empty", 10)
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def socket_name(daemon: str) -> str:
    return {"libvirtd": "libvirt-sock", "virtlogd": "virtlogd-sock"}[daemon]


def daemon_environment() -> Mapping[str, str]:
    """What an init system gives: nothing of ours, so that nobody takes them for a test's own."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}


def remove_cgroup(path: Path) -> bool:
    """Removes a cgroup with those below; False while a process is in one."""
    try:
        for folder, _, _ in os.walk(path, topdown=False):
            Path(folder).rmdir()
    except OSError:
        return not path.exists()
    return True
