"""Restores on hosts that allow no tracing: QEMU loads a library that hands its memory over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vm.guests import (
    MIB,
    Guest,
    Lab,
    SharedSnapshots,
    Snapshot,
    cli,
    cli_command,
    goes_on_from,
    refused,
    send,
)
from vm.kills import take_over
from vm.test_restore_content import KIND_PARAMS

import qemu_postcopy
from qemu_postcopy.errors import AttachError
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.paging.ledger import FILLING, MISSING, Ledger
from qemu_postcopy.vm.preload import (
    EXIT_STATUS,
    OPTIONAL_VARIABLE,
    PROGRAM_VARIABLE,
    SOCKET_VARIABLE,
    PreloadServer,
    library,
    listen_at,
)
from qemu_postcopy.vm.process import ProcessIdentity
from qemu_postcopy.vm.spec import MemoryKind

pytestmark = [pytest.mark.needs("uffd", "guest", "cc"), pytest.mark.timeout(300)]

HERE = Path(__file__).parent
NOBODY = 65534
MODULES = "/usr/lib/x86_64-linux-gnu/qemu"


@pytest.fixture(scope="session")
def without_ptrace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a command without the right to trace; see without_ptrace.c."""
    binary = tmp_path_factory.mktemp("without-ptrace") / "without_ptrace"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, HERE / "without_ptrace.c", "-o", binary], check=True)
    return binary


def command_with(lab: Lab, snapshot: Snapshot, backend: str, *more: str) -> list[str]:
    """The image's own command line with another memory back-end, for a guest named `r`."""
    launch = json.loads((snapshot.image / "manifest.json").read_text())["launch"]
    run_directory = f"{lab.directory}/run/r"
    argv = [part.replace(launch["run_directory"], run_directory) for part in launch["argv"]]
    argv[argv.index("-object") + 1] = backend
    return ["--", str(snapshot.qemu), *argv[1:], *more]


def tool_for_everybody(lab: Lab) -> tuple[Path, Path]:
    """A directory to bind this Python's installation to, and a copy of its packages: both may lie
    where, or with such rights, that only their owner can read them."""
    packages = lab.directory / "packages"
    shutil.copytree(sysconfig.get_path("platlib"), packages, symlinks=True)
    shutil.copytree(
        Path(qemu_postcopy.__file__).parent, packages / "qemu_postcopy", dirs_exist_ok=True
    )
    python = lab.directory / "python"
    python.mkdir()
    return python, packages


def restore(
    lab: Lab,
    prefix: list[str | Path],
    *arguments: object,
    name: str = "r",
    tool: list[str] | None = None,
) -> tuple[Guest, subprocess.CompletedProcess[str]]:
    """By the tool, started in a certain way."""
    tool = tool or cli_command()
    done = subprocess.run(
        [*prefix, *tool, "restore", "--json", "--name", name, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return lab.follow(done), done


@pytest.mark.parametrize("kind", KIND_PARAMS)
def test_memory_is_intact_though_qemu_may_not_be_traced(
    kind: MemoryKind,
    qemu_binary: Path,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    without_ptrace: Path,
) -> None:
    """One image into every kind of memory; `auto` finds the way by itself."""
    snapshot = snapshots.checker(lab, guest_image, qemu_binary)
    backend = lab.memory(kind, snapshot.ram_bytes).option()
    guest, _ = restore(
        lab,
        [without_ptrace],
        *("--no-background", snapshot.image),
        *command_with(lab, snapshot, backend),
    )
    assert guest.result["attached_by"] == "preload"
    goes_on_from(guest, snapshot)
    guest.console.wait_passes(1)
    status = guest.status()
    assert status["statistics"]["pages_demand"] > 0
    assert status["trouble"] == ""


@pytest.mark.needs("qemu")
def test_sandboxed_qemu_with_memory_filled_ahead_and_locked_starts_empty(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    """prealloc and mem-lock are put off until the pages come; the sandbox allows all we need."""
    snapshot = snapshots.checker(lab, guest_image, qemu)
    kinds: tuple[MemoryKind, ...] = ("memfd", "anonymous")
    for kind in kinds:
        backend = lab.memory(kind, snapshot.ram_bytes).option() + ",prealloc=on"
        more = ["-sandbox", "on,obsolete=deny,spawn=deny", "-overcommit", "mem-lock=on"]
        options = ["--attach-by", "preload", "--no-background", snapshot.image]
        guest, _ = restore(lab, [], *options, *command_with(lab, snapshot, backend, *more))
        goes_on_from(guest, snapshot)
        guest.console.wait_passes(1)
        assert guest.status()["statistics"]["pages_data_missing"] > 0
        guest.kill()


@pytest.mark.needs("qemu", "ptrace")
def test_guest_whose_sidecar_was_killed_in_the_middle_of_a_fill_is_served_on(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    """The dead one knew QEMU's memory by a descriptor of its own, which is another file's now."""
    snapshot = snapshots.checker(lab, guest_image, qemu)
    options = ["--attach-by", "preload", "--rate", "256K", "--chunk", "4K", snapshot.image]
    backend = lab.memory("memfd", snapshot.ram_bytes).option()
    guest, _ = restore(lab, [], *options, *command_with(lab, snapshot, backend))
    goes_on_from(guest, snapshot)
    assert guest.sidecar is not None
    send(guest.sidecar, signal.SIGKILL)
    guest.wait_sidecar_gone()
    with Ledger.open(guest.directory / "ledger") as ledger:
        (block,) = ledger.blocks
        missing = ledger.pages_in(block.name, MISSING)
        for page in missing[:: len(missing) // 100]:
            ledger.mapping[block.offset + page] = FILLING  # as a SIGKILL inside a COPY leaves it
    take_over(guest)
    cli("fill", guest.name)
    guest.console.wait_passes(1)
    guest.wait_sidecar_gone()


@pytest.mark.needs("qemu", "root")
def test_user_without_any_right_over_qemu_restores(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    """The program may be executed and not read: so its /proc directory is closed to its own user,
    and the kernel refuses every tracer (PR_SET_DUMPABLE(2const))."""
    own = snapshots.checker(lab, guest_image, qemu).copy(lab.directory / "image")
    program = lab.directory / "qemu-system-x86_64"
    shutil.copy(qemu, program)
    program.chmod(0o711)
    python, packages = tool_for_everybody(lab)
    device = lab.directory / "userfaultfd"
    os.mknod(device, 0o666 | stat.S_IFCHR, Path("/dev/userfaultfd").stat().st_rdev)
    device.chmod(0o666)
    command = command_with(
        lab, replace(own, qemu=program), lab.memory("memfd", own.ram_bytes).option()
    )
    for option in ("-kernel", "-initrd"):
        at = command.index(option) + 1
        command[at] = shutil.copy(command[at], str(lab.directory))
    for path in (lab.directory, *lab.directory.rglob("*")):
        if path != program:
            os.chown(path, NOBODY, NOBODY)
    lab.directory.chmod(0o755)
    # Under a mount namespace of its own the device is everybody's.
    prefix: list[str | Path] = ["unshare", "--mount", "sh", "-c"]
    mounts = f'mount --bind "{device}" /dev/userfaultfd && mount --bind {sys.base_prefix} {python}'
    as_nobody = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups --no-new-privs"
    prefix += [f'{mounts} && exec {as_nobody} "$@"', "sh"]
    command += ["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"]
    paths = [f"PYTHONPATH={packages}", f"LD_LIBRARY_PATH={python / 'lib'}"]
    prefix = ["env", f"QEMU_MODULE_DIR={MODULES}", *paths, *prefix]
    tool = [str(python / "bin" / f"python{sysconfig.get_python_version()}"), "-m", "qemu_postcopy"]
    by_ptrace = ["restore", "--attach-by", "ptrace", "--name", "r", str(own.image), *command]
    done = subprocess.run([*prefix, *tool, *by_ptrace], capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "Operation not permitted" in done.stderr or "Permission denied" in done.stderr
    options = ["--attach-by", "preload", "--wait", "complete", own.image]
    guest, _ = restore(lab, prefix, *options, *command, tool=tool)
    assert Path(f"/proc/{guest.pid}/maps").stat().st_uid == 0
    goes_on_from(guest, own)
    guest.console.wait_passes(1)


@pytest.mark.needs("qemu")
def test_wrong_ram_size_is_told_as_ever(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    command = command_with(lab, snapshot, lab.memory("memfd", 32 * MIB).option())
    command[command.index("-m") + 1] = "32M"
    refused(
        *("restore", "--attach-by", "preload", "--name", "r", snapshot.image, *command),
        status=5,
        words=["RAM does not match", "-m and memory back-ends"],
    )


@pytest.mark.needs("qemu")
def test_qemu_that_is_to_become_a_daemon_is_refused_with_the_reason(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    """By a wrapper, where the launch itself cannot see it."""
    snapshot = snapshots.checker(lab, guest_image, qemu)
    wrapper = lab.directory / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nexec {qemu} "$@" -daemonize\n')
    wrapper.chmod(0o755)
    refused(
        *("restore", "--attach-by", "preload", "--name", "r", "--qemu", wrapper, snapshot.image),
        status=7,
        words=["-daemonize and a lazy restore exclude each other", "exit code 97"],
    )


@pytest.mark.needs("qemu")
def test_qemu_that_does_not_load_the_library_is_ended(
    qemu: Path, lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage
) -> None:
    snapshot = snapshots.checker(lab, guest_image, qemu)
    wrapper = lab.directory / "wrapper"
    wrapper.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {qemu} "$@"\n')
    wrapper.chmod(0o755)
    refused(
        *("restore", "--attach-by", "preload", "--name", "r", "--qemu", wrapper, snapshot.image),
        status=6,
        words=["without the preload library", "wrapper"],
    )


class Elsewhere:
    """The library loaded into programs that are no QEMU."""

    def __init__(self, directory: Path) -> None:
        self.server = PreloadServer(directory, [16 * MIB])
        self.environment = self.server.environment(dict(os.environ))

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env={**self.environment, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def elsewhere(run_dir: Path) -> Iterator[Elsewhere]:
    made = Elsewhere(run_dir)
    yield made
    made.server.close()


def test_programs_that_are_no_qemu_are_left_alone(elsewhere: Elsewhere) -> None:
    done = elsewhere.run("sh", "-c", f"echo $LD_PRELOAD; {sys.executable} -c 'import mmap, json'")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{library()}\n", "")


@pytest.fixture
def readable() -> Iterator[Path]:
    """The library where every user can read it: tox's directory is closed to others."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(shutil.copy(library(), directory))


#: Shells, interpreters, tools that start others, programs with other rights, QEMU's other ones.
REAL_PROGRAMS = [
    ["bash", "-c", "for i in 1 2 3; do (cat /dev/null; exec true) & done; wait; echo $((1 + 1))"],
    ["perl", "-e", "fork or exit 3; wait; print $? >> 8, qq(\n)"],
    [sys.executable, "-c", "import threading, mmap, subprocess; m = mmap.mmap(-1, 16 << 20); "
     "m[5] = 1; t = threading.Thread(target=lambda: print(m[5])); t.start(); t.join(); "
     "print(subprocess.check_output(['id', '-u']))"],
    ["sh", "-c", "echo 'int main(void) { return 5; }' | cc -xc - -o $TMPDIR/out && $TMPDIR/out"],
    ["sh", "-c", "tar c /etc/hostname 2>&1 | gzip | gunzip | tar t"],
    ["qemu-img", "--version"],
    ["qemu-storage-daemon", "--version"],
    ["qemu-img", "map", "/nonexistent"],
    ["busybox", "sh", "-c", "echo $0 | md5sum"],
    ["setpriv", "--no-new-privs", "--reuid=65534", "id"],
    ["git", "--version"],
    ["virsh", "--version"],
    ["systemd-analyze", "--version"],
    ["gdb", "--batch", "-ex", "print 1 + 1"],
    ["node", "-p", "1 + 1"],
    ["java", "-version"],
]  # fmt: skip


@pytest.mark.needs("cc")
def test_it_can_be_loaded_into_anything(
    elsewhere: Elsewhere, run_dir: Path, readable: Path
) -> None:
    """Each does and says what it does and says without the library."""
    source = Path(__file__).parent / "odd_program.c"
    for name, *flags in (["odd"], ["odd-static", "-static"], ["odd-now", "-Wl,-z,now"]):
        command = ["cc", "-O1", "-w", "-pthread", *flags, "-o", str(run_dir / name), str(source)]
        subprocess.run(command, check=True)
    odd = [[str(run_dir / name)] for name in ("odd", "odd-static", "odd-now")]
    tried = []
    for command in [*odd, *REAL_PROGRAMS]:
        if not shutil.which(command[0]):
            continue
        variables = {"TMPDIR": str(run_dir)}
        with_it = elsewhere.run(*command, LD_PRELOAD=str(readable), **variables)
        without = elsewhere.run(*command, LD_PRELOAD="", **variables)
        assert (with_it.returncode, with_it.stdout, with_it.stderr) == (
            without.returncode, without.stdout, without.stderr,
        ), command  # fmt: skip
        if command in odd:
            assert (with_it.returncode, with_it.stdout) == (7, "well\nso far\n")
        tried.append(Path(command[0]).name)
    print("loaded into", *tried)


def test_program_that_is_meant_ends_where_no_sidecar_answers(elsewhere: Elsewhere) -> None:
    elsewhere.server.path.unlink()
    done = elsewhere.run("env", QEMU_POSTCOPY_PRELOAD_PROGRAM="env")
    assert done.returncode == EXIT_STATUS
    assert "no sidecar at" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("optional", [True, False])
def test_program_goes_on_alone_where_the_sidecar_dies_before_it_wanted_anything_if_it_may(
    run_dir: Path, optional: bool
) -> None:
    path = run_dir / "dying.sock"
    with listen_at(path, 0o600) as listener:
        variables = {
            **{"LD_PRELOAD": str(library()), SOCKET_VARIABLE: str(path), PROGRAM_VARIABLE: "env"},
            **({OPTIONAL_VARIABLE: "1"} if optional else {}),
        }
        with subprocess.Popen(
            [shutil.which("env") or "env"],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as program:
            listener.accept()[0].close()
            said, complained = program.communicate(timeout=60)
    assert program.returncode == (0 if optional else EXIT_STATUS)
    assert "PRELOAD" not in said
    assert ("the sidecar has gone" in complained) is not optional


def test_program_that_is_meant_ends_where_it_is_to_become_a_daemon(elsewhere: Elsewhere) -> None:
    done = elsewhere.run("true", "-daemonize", QEMU_POSTCOPY_PRELOAD_PROGRAM="true")
    assert done.returncode == EXIT_STATUS
    assert "-daemonize" in done.stderr


def test_what_qemu_starts_knows_nothing_of_the_library(elsewhere: Elsewhere) -> None:
    """`env` is the program that is meant, and prints what its children would get."""
    other = "/lib/x86_64-linux-gnu/libm.so.6"
    variables = {
        **elsewhere.environment,
        "QEMU_POSTCOPY_PRELOAD_PROGRAM": shutil.which("env") or "env",
        "LD_PRELOAD": f"{elsewhere.environment['LD_PRELOAD']}:{other}",
    }
    taken: list[str] = []
    with (
        subprocess.Popen(["env"], env=variables, stdout=subprocess.PIPE, text=True) as program,
        ProcessIdentity.open(program.pid) as identity,
    ):
        thread = threading.Thread(target=lambda: taken.append(serve(elsewhere, identity)))
        thread.start()
        said = program.communicate(timeout=60)[0]
        thread.join(60)
    assert program.returncode == 0
    assert f"LD_PRELOAD={other}\n" in said
    assert "PRELOAD_SOCKET" not in said and "PRELOAD_PROGRAM" not in said
    assert taken == ["TargetGoneError"]  # it mapped no guest memory


def serve(elsewhere: Elsewhere, identity: ProcessIdentity) -> str:
    """How the server's work ends."""
    try:
        elsewhere.server.serve(identity)
    except AttachError as error:
        return type(error).__name__
    return "taken"
