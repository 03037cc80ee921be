"""What tests may need of a host, each asked of the host itself; used by conftest.py.

A test says ``@pytest.mark.needs("uffd", "qemu")``. Where something is missing it is skipped with
the lack named; ``--require=uffd,qemu`` (or ``--require=all``) makes that a failure instead, and so
it does every skip that a test decides on while it runs.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")


def uffd() -> str:
    from qemu_postcopy._native import lib
    from qemu_postcopy.doctor import userfaultfd

    ways = [userfaultfd.open_by(way) for way in (lib.QPC_WAY_DEVICE, lib.QPC_WAY_SYSCALL)]
    return "" if any(way.works for way in ways) else f"no userfaultfd: {userfaultfd.says(ways[0])}"


def ptrace() -> str:
    from qemu_postcopy.doctor import tracing

    refused = tracing.ptrace_errno(stranger=True)
    return f"ptrace refused: {os.strerror(refused)}" if refused else ""


def kvm() -> str:
    from qemu_postcopy.doctor import kvm as probe

    device = probe.probe()[0]
    return "" if device.status == "ok" else device.found


def qemu() -> str:
    return "" if shutil.which("qemu-system-x86_64") else "no qemu-system-x86_64 on PATH"


def qemu10() -> str:
    path = os.environ.get("QPC_QEMU10")
    if not path:
        return (
            "QPC_QEMU10 does not name a QEMU 10 (python -m qemu_postcopy.images qemu fetches one)"
        )
    return "" if os.access(path, os.X_OK) else f"QPC_QEMU10={path} cannot be run"


def libvirt() -> str:
    from qemu_postcopy.doctor import software

    finding = software.libvirt_finding()
    if finding.status != "ok" or not finding.data["python_module"]:
        return f"libvirt: {finding.found}"
    # What makes hosts and their network, and what virsh packs save files by.
    programs = (
        *("unshare", "nsenter", "setpriv", "mount", "fincore", "ip", "tc", "ss", "iptables"),
        *("gzip", "bzip2", "xz", "lzop", "zstd"),
    )
    lacking = [name for name in programs if not shutil.which(name)]
    return f"no {', '.join(lacking)} on PATH" if lacking else root()


def libvirt11() -> str:
    path = os.environ.get("QPC_LIBVIRT11")
    if not path:
        return (
            "QPC_LIBVIRT11 does not name where a libvirt 11 lies "
            "(python -m qemu_postcopy.images libvirt fetches one)"
        )
    there = Path(path, "usr/sbin/libvirtd").exists()
    return libvirt() if there else f"QPC_LIBVIRT11={path} holds no libvirtd"


def sshd() -> str:
    """What leads from one of the tests' hosts to another as operators do it."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"
    lacking = [name for name in ("sshd", "ssh", "ssh-keygen") if not shutil.which(name, path=path)]
    return f"no {', '.join(lacking)}: apt-get install openssh-server" if lacking else ""


def hugetlb() -> str:
    return "" if os.access(HUGE_PAGES, os.W_OK) else f"{HUGE_PAGES} cannot be written"


def guest() -> str:
    """Whether the test guest can be built; it is fetched and compiled on first use."""
    from qemu_postcopy.doctor import software

    findings = [software.compiler_finding(), *software.debian_tools_findings()]
    return "; ".join(f"{f.title}: {f.found}" for f in findings if f.status != "ok")


def cc() -> str:
    return "" if shutil.which("cc") else "no cc on PATH"


def aarch64_cc() -> str:
    return "" if shutil.which("aarch64-linux-gnu-gcc") else "no aarch64-linux-gnu-gcc on PATH"


def checkers() -> str:
    """What checks the data that is shipped: rules for AppArmor and SELinux, an XML schema, the
    manual page, the systemd unit."""
    programs = (
        *("apparmor_parser", "checkmodule", "semodule_package", "xmllint"),
        *("man", "systemd-analyze"),
    )
    lacking = [name for name in programs if not shutil.which(name)]
    return f"no {', '.join(lacking)} on PATH" if lacking else ""


def root() -> str:
    return "" if os.geteuid() == 0 else "not root"


def restricted() -> str:
    """Not everybody may page memory here, so that somebody without the right can be tested."""
    device = Path("/dev/userfaultfd")
    if device.exists() and device.stat().st_mode & 0o006:
        return f"{device} is open to everybody"
    told = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip()
    return "" if told == "0" else f"vm.unprivileged_userfaultfd is {told}"


def disk() -> str:
    """Temporary files lie on a disk: no tmpfs, and what is read directly must be aligned."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8192))
        file.flush()
        try:
            descriptor = os.open(file.name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            return f"no O_DIRECT in {tempfile.gettempdir()}: {error.strerror}"
        try:
            os.pread(descriptor, 4096, 96)
        except OSError as error:
            return "" if error.errno == errno.EINVAL else str(error)
        finally:
            os.close(descriptor)
    return f"the file system of {tempfile.gettempdir()} takes any offset with O_DIRECT"


def mount() -> str:
    """A small disk of a test's own."""
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", tempfile.gettempdir()],
        capture_output=True,
        text=True,
    )
    return "" if done.returncode == 0 else f"no tmpfs can be mounted: {done.stderr.strip()}"


def thp() -> str:
    """Transparent huge pages, where they are asked for."""
    said = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return "they are switched off: [never]" if "[never]" in said else ""


def xfs() -> str:
    """A file system whose files can share data, in a file (on a loop device)."""
    if not shutil.which("mkfs.xfs"):
        return "no mkfs.xfs on PATH (Debian: xfsprogs)"
    if "\txfs\n" not in Path("/proc/filesystems").read_text():
        return "the kernel has no xfs (modprobe xfs)"
    return "" if Path("/dev/loop-control").exists() else "no loop devices"


def tap() -> str:
    """The test makes an interface of its own in the network namespace that it runs in."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR)
    except OSError as error:
        return f"no /dev/net/tun: {error.strerror}"
    try:
        # TUNSETIFF with IFF_TAP | IFF_NO_PI (linux/if_tun.h); gone when the descriptor is closed.
        fcntl.ioctl(descriptor, 0x400454CA, struct.pack("=16sH22x", b"qpcprobe%d", 0x1002))
    except OSError as error:
        return f"no tap interface can be made: {error.strerror}"
    finally:
        os.close(descriptor)
    return ""


PROBES: dict[str, Callable[[], str]] = {
    probe.__name__: probe
    for probe in [
        uffd,
        ptrace,
        kvm,
        qemu,
        qemu10,
        libvirt,
        libvirt11,
        sshd,
        hugetlb,
        guest,
        cc,
        aarch64_cc,
        checkers,
        root,
        restricted,
        disk,
        mount,
        thp,
        tap,
        xfs,
    ]
}


@functools.cache
def missing(name: str) -> str:
    """Why the host lacks this, or an empty string; ValueError for an unknown name."""
    if name not in PROBES:
        raise ValueError(f"unknown capability {name!r}; known: {', '.join(PROBES)}")
    return PROBES[name]()


def parse_required(value: str) -> frozenset[str]:
    """The names in ``--require``; ``all`` stands for every one."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    if "all" in names:
        return frozenset(PROBES)
    for name in names:
        if name not in PROBES:
            raise ValueError(f"unknown capability {name!r}; known: {', '.join(PROBES)}")
    return frozenset(names)


def lacks(names: Iterable[str]) -> dict[str, str]:
    """Name and reason of each that is missing."""
    return {name: reason for name in names if (reason := missing(name))}
