"""Taking a userfaultfd out of a running QEMU: the one step that needs ptrace rights.

A thread of QEMU is stopped for a fraction of a millisecond and opens the descriptor; a copy of it
comes over here, the original stays open in QEMU, so that the guest freezes rather than runs on
with zero pages if nobody serves it.  Registration is the pager's.  Blocks for at most
TOTAL_LIMIT_MS plus a second; any thread may run it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy._native import check, ffi, lib, new_error
from qemu_postcopy.errors import AttachError, AttachTimeoutError, PostcopyError, TargetGoneError
from qemu_postcopy.vm.process import ProcessIdentity, Thread

#: How long a QEMU that was just started may take to have a second thread, and how often to look.
HELPER_LIMIT_SECONDS = 1.0
HELPER_POLL_SECONDS = 0.002
PER_THREAD_LIMIT_MS = 50
TOTAL_LIMIT_MS = 5000
#: As much private memory as one stop drops; filled with small pages that takes some 0.1 s.
DISCARD_BYTES = 1 << 30
DEVICE = Path("/dev/userfaultfd")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
CAP_SYS_PTRACE = 19
USERFAULTFD_LINK = "anon_inode:[userfaultfd]"

# Named threads (QEMU names them from 9.1 on, before that with `-name debug-threads=on`): first
# those that do no guest work, last the vCPUs.
PREFERRED_THREAD = re.compile(r"call_rcu|worker|IO .*|io.*|gmain|gdbus|pool.*")
VCPU_THREAD = re.compile(r"CPU .*")


@dataclass(frozen=True)
class TakenDescriptor:
    """A userfaultfd of QEMU's memory.

    Attributes: descriptor, here, owned by the caller; remote_descriptor, its number in QEMU; tid,
    the thread that opened it; wait_ns until it stood still; stop_ns while it stood still.
    """

    descriptor: int
    remote_descriptor: int
    tid: int
    wait_ns: int
    stop_ns: int


def thread_order(threads: Iterable[Thread], pid: int) -> list[int]:
    """Thread ids in the order in which they are tried.

    Helpers first, then the main thread, vCPUs last.  Without names: QEMU creates `call_rcu` before
    all others (rcu_init is a constructor), so the oldest thread beside the main one comes first,
    and the main thread second.
    """
    ordered = sorted(threads, key=lambda thread: thread.tid)
    others = [thread for thread in ordered if thread.tid != pid]

    def rank(thread: Thread) -> int:
        if PREFERRED_THREAD.fullmatch(thread.name):
            return 0
        if thread.tid == pid:
            return 2
        if VCPU_THREAD.match(thread.name):
            return 4
        return 1 if others and thread is others[0] else 3

    return [thread.tid for thread in sorted(ordered, key=rank)]


def wait_for_helper_thread(identity: ProcessIdentity) -> None:
    """Returns when a QEMU that was just started has a thread beside its main one.

    `call_rcu` is created by a constructor, long before the machine is built, so the descriptor can
    be opened while QEMU starts.  After HELPER_LIMIT_SECONDS it returns in any case.
    """
    deadline = time.monotonic() + HELPER_LIMIT_SECONDS
    threads = f"/proc/{identity.pid}/task"
    with contextlib.suppress(OSError):  # it has ended: whoever asks it next is told so
        while len(os.listdir(threads)) < 2 and time.monotonic() < deadline:  # noqa: PTH208
            time.sleep(HELPER_POLL_SECONDS)


def take_userfaultfd(identity: ProcessIdentity) -> TakenDescriptor:
    """Opens a userfaultfd in QEMU and takes a copy of it.

    Raises:
        TargetGoneError: the process died, or the PID is another's now.
        AttachTimeoutError: no thread could be stopped; nothing was changed.
        AttachError: a right is missing (the hint says which), or the process is no QEMU.
    """
    identity.require_qemu()
    tids = thread_order(identity.threads(), identity.pid)
    injection = ffi.new("struct qpc_injection *")
    error = new_error()
    device = _open_device()
    try:
        result = lib.qpc_inject_userfaultfd(
            identity.pid,
            identity.pidfd,
            tids,
            len(tids),
            PER_THREAD_LIMIT_MS,
            TOTAL_LIMIT_MS,
            device,
            injection,
            error,
        )
    finally:
        if device >= 0:
            os.close(device)
    try:
        check(result, error)
        descriptor = check(lib.qpc_fd_take(identity.pidfd, injection.remote_fd, error), error)
    except TargetGoneError:
        raise
    except AttachTimeoutError as failure:
        failure.vm = identity.pid
        failure.hint = (
            "Its threads wait for memory that nobody serves, or the process is frozen: "
            "look whether a sidecar of this guest is still alive."
        )
        raise
    except PostcopyError as failure:
        raise _explained(failure, identity, injection) from failure
    return TakenDescriptor(
        descriptor=descriptor,
        remote_descriptor=injection.remote_fd,
        tid=injection.tid,
        wait_ns=injection.wait_ns,
        stop_ns=injection.stop_ns,
    )


def _open_device() -> int:
    """The device, to be passed to a QEMU that may not open it: another user's, or one whose /dev
    or cgroup lacks it (libvirt before 10). -1 where this process may not either."""
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return -1


def discard_private_pages(identity: ProcessIdentity, address: int, size_bytes: int) -> None:
    """Has QEMU drop its private pages in a range, which nobody else can do; locked ones too.

    Not of registered memory: the drop would wait for its event to be read.

    Raises:
        TargetGoneError, AttachTimeoutError: as :func:`take_userfaultfd`.
        AttachError: a right is missing, or the kernel does not drop them (locked, before 5.18).
    """
    tids = thread_order(identity.threads(), identity.pid)
    for begin in range(address, address + size_bytes, DISCARD_BYTES):
        length = min(DISCARD_BYTES, address + size_bytes - begin)
        error = new_error()
        result = lib.qpc_inject_discard(
            identity.pid,
            identity.pidfd,
            tids,
            len(tids),
            PER_THREAD_LIMIT_MS,
            TOTAL_LIMIT_MS,
            begin,
            length,
            error,
        )
        try:
            check(result, error)
        except (TargetGoneError, AttachTimeoutError):
            raise
        except PostcopyError as failure:
            raise AttachError(
                f"private memory of QEMU (PID {identity.pid}) is filled already, and cannot be "
                f"emptied: {failure.message}",
                hint="Start QEMU without prealloc=on and mem-lock=on, or with "
                "memory-backend-memfd,share=on.",
                vm=identity.pid,
            ) from failure


def take_left_userfaultfd(identity: ProcessIdentity, number: int) -> TakenDescriptor:
    """A copy of the userfaultfd that an earlier attach left open in QEMU as ``number``.

    No thread is stopped: one that waits for its page could not be.

    Raises:
        TargetGoneError: the process has ended.
        AttachError: it has no such descriptor, or a right is missing.
    """
    identity.require_qemu()
    error = new_error()
    try:
        descriptor = check(lib.qpc_fd_take(identity.pidfd, number, error), error)
    except TargetGoneError:
        raise
    except PostcopyError as failure:
        raise AttachError(
            f"descriptor {number} of QEMU (PID {identity.pid}) cannot be taken: {failure.message}",
            hint=_ptrace_hint(identity),
            vm=identity.pid,
        ) from failure
    kind = str(Path(f"/proc/self/fd/{descriptor}").readlink())
    if kind != USERFAULTFD_LINK:
        os.close(descriptor)
        raise AttachError(
            f"descriptor {number} of QEMU (PID {identity.pid}) is {kind}, not a userfaultfd",
            hint="session.json in the run directory does not fit this process; do not serve it.",
            vm=identity.pid,
        )
    return TakenDescriptor(descriptor, number, tid=0, wait_ns=0, stop_ns=0)


# injection is a cffi struct, which has no type of its own
def _explained(failure: PostcopyError, identity: ProcessIdentity, injection: object) -> AttachError:
    """The same failure, with the right that is missing and how to get it."""
    device_errno: int = getattr(injection, "device_errno", 0)
    passed_errno: int = getattr(injection, "passed_errno", 0)
    syscall_errno: int = getattr(injection, "syscall_errno", 0)
    message, hint = failure.message, failure.hint
    if device_errno:
        message = (
            f"QEMU (PID {identity.pid}) may not open a userfaultfd that gets the kernel's faults "
            f"(as KVM's are): {DEVICE}: {os.strerror(device_errno)}; "
            f"passed to it: {os.strerror(passed_errno)}; "
            f"userfaultfd(2): {os.strerror(syscall_errno)}"
        )
        hint = _device_hint(device_errno)
    elif isinstance(failure.__cause__, OSError):
        hint = _ptrace_hint(identity)
    return AttachError(message, hint=hint, vm=identity.pid)


def _device_hint(device_errno: int) -> str:
    if device_errno in (errno.EMFILE, errno.ENFILE):
        return "Raise QEMU's limit of open files (ulimit -n, LimitNOFILE=)."
    if device_errno == errno.ENOENT:
        return (
            f"Give QEMU {DEVICE} in its own /dev (Linux 6.1 or newer; libvirt: "
            f"cgroup_device_acl in qemu.conf), or set sysctl vm.unprivileged_userfaultfd=1."
        )
    return (
        f"Give QEMU's user access to {DEVICE} (a group and mode 0660, by a udev rule), or set "
        "sysctl vm.unprivileged_userfaultfd=1."
    )


def _ptrace_hint(identity: ProcessIdentity) -> str:
    tracer = _status_field(identity.pid, "TracerPid")
    if tracer not in ("", "0"):
        return f"Process {tracer} is tracing it (a debugger?): end that first."
    if int(_status_field(os.getpid(), "CapEff") or "0", 16) >> CAP_SYS_PTRACE & 1:
        return (
            "CAP_SYS_PTRACE is there, so it is a security module, or a process of an outer user "
            "namespace: run in the same one as QEMU."
        )
    scope = YAMA.read_text().strip() if YAMA.exists() else "0"
    if scope in ("1", "2", "3"):
        return (
            f"Yama allows no tracing (kernel.yama.ptrace_scope={scope}): run as root with "
            "CAP_SYS_PTRACE" + ("." if scope != "3" else "; scope 3 lasts until the next boot.")
        )
    return "Run as root with CAP_SYS_PTRACE, or as the user that QEMU runs as."


def _status_field(pid: int, name: str) -> str:
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^{name}:\s*(\S+)", text, re.MULTILINE)
    return match[1] if match else ""


def drop_ptrace_rights() -> None:
    """Gives CAP_SYS_PTRACE up for good: nothing after the attach needs it.

    From then on /proc/PID/maps, fd and pagemap of a process with more rights than ours are closed
    to this process.
    """
    error = new_error()
    check(lib.qpc_capability_drop_ptrace(error), error)
