"""What both hosts, the domain and its disks say to a post-copy migration, before it starts.

Each check asks libvirt or this host; none changes anything.  A refusal is what would end the
migration or hurt the guest; a hint is what an operator should know.  libvirt's and QEMU's own
checks come after these and have the last word.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from xml.etree import ElementTree

from qemu_postcopy.errors import LibvirtError, MismatchError, PostcopyError
from qemu_postcopy.libvirt import domain_xml
from qemu_postcopy.libvirt.connection import Connection, load
from qemu_postcopy.migrate.native_terms import CRASHES_ON_RESUME, NativeOptions
from qemu_postcopy.vm.migration import LOST_WRITES, passes_lose_writes
from qemu_postcopy.vm.refusals import SHARED

Verdict = Literal["ok", "hint", "refused"]
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
DEVICE = Path("/dev/userfaultfd")
#: The first QEMU that opens /dev/userfaultfd (util/userfaultfd.c).
QEMU_WITH_DEVICE = 8_000_000
#: The first QEMU whose multifd goes together with post-copy; from 8.0 on the others refuse it, 7.2
#: takes it (tried) and would write pages into the memory of a guest that runs.
QEMU_WITH_MULTIFD = (10, 1, 0)
#: libvirt asks for preemption by itself where both QEMUs have it; 9.0 does not, 11.3 does.
LIBVIRT_WITHOUT_PREEMPT = 9_000_999
#: File systems that two hosts can see at once, as /proc/mounts names them (virfile.c).
SHARED_FILE_SYSTEMS = ("nfs", "nfs4", "gfs2", "ocfs2", "cifs", "ceph", "fuse.glusterfs", "gpfs")
SAFE_CACHES = ("none", "directsync")


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, what was found, what to do."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "found": self.found,
            "advice": self.advice,
        }


@dataclass(frozen=True)
class _Subject:
    """A domain and what it is to meet."""

    source: Connection
    destination: Connection
    domain: Any
    xml: ElementTree.Element
    options: NativeOptions

    @property
    def name(self) -> str:
        return self.options.new_name or str(self.xml.findtext("name"))

    @property
    def memory_bytes(self) -> int:
        return int(self.xml.findtext("memory") or 0) << 10  # libvirt writes KiB


async def check_all(
    source: Connection,
    destination: Connection,
    domain: Any,
    options: NativeOptions,
    *,
    preempt: bool = False,
    passes: bool = False,
    accept_lost_writes: bool = False,
) -> list[Check]:
    """Every check, in the order in which an operator reads them.

    Args:
        passes: whether whole passes of pre-copy are wanted, in which some QEMUs lose writes.
        accept_lost_writes: that is a hint then, no refusal.

    Raises:
        LibvirtError: a daemon does not answer.
    """
    flag = load().VIR_DOMAIN_XML_MIGRATABLE
    xml = domain_xml.parse(await source.call("no XML", domain.XMLDesc, flag))
    subject = _Subject(source, destination, domain, xml, options)
    found = [
        await _state(subject),
        await _name(subject),
        *await _definition(subject),
        await _machine(subject),
        await _cpu(subject),
        *_devices(subject),
        *_disks(subject),
        *await _memory(subject),
    ]
    if passes:
        found += await _lost_writes(subject, accept_lost_writes)
    if options.postcopy:
        found.append(await _userfaultfd(subject))
        found.append(await _recovery(subject))
        if preempt:
            found.append(await _preempt(subject))
        if options.parallel:
            found.append(await _multifd(subject))
    return found


def refuse(checks: Iterable[Check]) -> None:
    """Raises MismatchError if one of them is a refusal, with all of them."""
    refused = [check for check in checks if check.verdict == "refused"]
    if refused:
        raise MismatchError(
            "not migrated: " + "; ".join(f"{check.name}: {check.found}" for check in refused),
            hint="; ".join(dict.fromkeys(check.advice for check in refused if check.advice)),
        )


async def _state(subject: _Subject) -> Check:
    libvirt = load()
    state, _ = await subject.source.call("no state", subject.domain.state)
    if state == libvirt.VIR_DOMAIN_RUNNING:
        return Check("domain", "ok", "running")
    if state == libvirt.VIR_DOMAIN_PAUSED and subject.options.postcopy:
        return Check(
            "domain",
            "refused",
            "paused: there is nothing to switch",
            "let it run (virsh resume), or say --precopy-only",
        )
    active = bool(await subject.source.call("no state", subject.domain.isActive))
    return Check(
        "domain",
        "ok" if active else "refused",
        "active" if active else "not running",
        "" if active else "start it, or define it at the destination",
    )


async def _name(subject: _Subject) -> Check:
    """No other domain of its name, and it itself not running there already."""
    uuid = str(subject.xml.findtext("uuid"))
    handle = subject.destination.handle
    with contextlib.suppress(LibvirtError):
        there = await subject.destination.call("none", handle.lookupByName, subject.name)
        if there.UUIDString() != uuid:
            return Check(
                "name",
                "refused",
                f"another domain {subject.name} is at the destination",
                "rename one of them, or give it another name there: --dname",
            )
    with contextlib.suppress(LibvirtError):
        there = await subject.destination.call("none", handle.lookupByUUIDString, uuid)
        if await subject.destination.call("no state", there.isActive):
            return Check(
                "name",
                "refused",
                "it is active at the destination already",
                "virsh domstate --reason says what it is; an interrupted post-copy is "
                "taken up by --resume",
            )
        return Check("name", "hint", "defined at the destination, not running; replaced by this")
    return Check("name", "ok", f"{subject.name} is free at the destination")


async def _definition(subject: _Subject) -> list[Check]:
    """What becomes of a persistent domain's definition, at both hosts."""
    if not await subject.source.call("no state", subject.domain.isPersistent):
        return []
    found = []
    if not subject.options.persistent:
        found.append(
            Check(
                "definition",
                "hint",
                "not kept at the destination: gone when it shuts down",
                "--persistent",
            )
        )
    if not subject.options.undefine_source:
        found.append(
            Check(
                "definition",
                "hint",
                "it stays defined at the source, where it could be started a second time",
                "--undefinesource",
            )
        )
    return found


def _hardware(xml: ElementTree.Element) -> tuple[str, str, str]:
    """Architecture, machine type, virtualization type."""
    kind = xml.find("os/type")
    if kind is None:
        return "", "", str(xml.get("type"))
    return kind.get("arch", ""), kind.get("machine", ""), xml.get("type", "kvm")


async def _machine(subject: _Subject) -> Check:
    arch, machine, kind = _hardware(subject.xml)
    try:
        await subject.destination.call(
            "refused",
            subject.destination.handle.getDomainCapabilities,
            None,
            arch,
            machine,
            kind,
        )
    except LibvirtError as error:
        return Check(
            "machine",
            "refused",
            error.message.removeprefix("libvirt: refused: "),
            "a QEMU at the destination that has this machine type is at least as new as "
            "the source's",
        )
    return Check("machine", "ok", f"{machine} is known at the destination")


async def _cpu(subject: _Subject) -> Check:
    libvirt = load()
    cpu = subject.xml.find("cpu")
    if cpu is None:
        return Check("cpu", "hint", "no CPU model is asked for: QEMU's default")
    if cpu.get("mode") in ("host-passthrough", "maximum"):
        return Check(
            "cpu",
            "hint",
            f"{cpu.get('mode')}: the hosts' processors must be alike",
            "a named model or host-model can be compared and moved",
        )
    text = ElementTree.tostring(cpu, encoding="unicode")
    arch, machine, kind = _hardware(subject.xml)
    try:
        answer = await subject.destination.call(
            "not compared",
            subject.destination.handle.compareHypervisorCPU,
            None,
            arch,
            machine,
            kind,
            text,
            0,
        )
    except LibvirtError as error:
        return Check("cpu", "hint", error.message)
    if answer == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
        return Check(
            "cpu",
            "refused",
            "the destination cannot provide the guest's CPU",
            "virsh hypervisor-cpu-compare there says what lacks; virsh "
            "hypervisor-cpu-baseline finds a model that both hosts have",
        )
    return Check("cpu", "ok", "the destination provides the guest's CPU")


def _devices(subject: _Subject) -> list[Check]:
    """Post-copy leaves no room for what pins memory; vhost-user back-ends must take part."""
    checks = []
    for reason in domain_xml.refusals(subject.xml):
        if SHARED in reason:
            checks.append(
                Check("device", "hint", f"{reason}: its process must support post-copy as well")
            )
        elif subject.options.postcopy:
            checks.append(Check("device", "refused", reason, "detach it, or say --precopy-only"))
    return checks


def _disks(subject: _Subject) -> list[Check]:
    checks = []
    for disk in subject.xml.iterfind("devices/disk"):
        if disk.get("device", "disk") in ("cdrom", "floppy") or disk.find("readonly") is not None:
            continue
        target = disk.find("target")
        name = f"disk {target.get('dev') if target is not None else '?'}"
        checks.append(_disk(name, disk, subject))
    return checks


def _disk(name: str, disk: ElementTree.Element, subject: _Subject) -> Check:
    source = disk.find("source")
    kind = disk.get("type", "")
    mirror = disk.find("mirror")
    if mirror is not None:
        ready = mirror.get("ready") == "yes"
        return Check(
            name,
            "ok" if ready else "refused",
            f"mirrored, {mirror.get('ready')}",
            "" if ready else "wait until virsh blockjob says 100 %",
        )
    if kind == "network" or source is None:
        return Check(name, "ok", f"{kind or 'no source'}: both hosts reach it the same way")
    path = source.get("file") or source.get("dev") or ""
    driver = disk.find("driver")
    cache = (driver.get("cache") if driver is not None else None) or "default"
    file_system = file_system_of(Path(path)) if _is_local(subject.source.uri) and path else ""
    shared = file_system in SHARED_FILE_SYSTEMS or (kind == "block")
    if subject.options.unsafe:
        return Check(name, "hint", f"{path}: not checked (--unsafe)")
    if file_system and not shared:
        return Check(
            name,
            "refused",
            f"{path} lies on {file_system}, which one host has alone",
            "put it on shared storage, or mirror it to there first (virsh blockcopy); "
            "if both hosts do see this file: --unsafe",
        )
    if cache not in SAFE_CACHES:
        return Check(
            name,
            "hint",
            f"{path} has cache={cache}: libvirt allows that only on a file "
            "system that is coherent between hosts",
            "cache=none",
        )
    return Check(name, "hint", f"{path} must be the same file at both hosts")


def file_system_of(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that a path lies on, as /proc/mounts names it; may be empty."""
    best = ("", "")
    for line in mounts.read_text().splitlines():
        _, where, kind, *_ = line.split(" ")
        where = where.encode().decode("unicode_escape")  # proc(5): \040 is a space
        if len(where) >= len(best[0]) and path.is_relative_to(where):
            best = (where, kind)
    return best[1]


async def _memory(subject: _Subject) -> list[Check]:
    handle = subject.destination.handle
    needed = subject.memory_bytes
    page = subject.xml.find("memoryBacking/hugepages/page")
    if subject.xml.find("memoryBacking/hugepages") is not None:
        size = int(page.get("size", "2048")) if page is not None else 2048  # KiB
        answer = await subject.destination.call(
            "no count of huge pages", handle.getFreePages, [size], -1, 1
        )
        free = sum(int(count) for cell in answer.values() for count in cell.values())
        enough = free * (size << 10) >= needed
        return [
            Check(
                "huge pages",
                "ok" if enough else "refused",
                f"{free} of {size} KiB are free at the destination, "
                f"{needed // (size << 10)} are needed",
                "" if enough else f"reserve them there: virsh allocpages --pagesize {size}",
            ),
            Check(
                "huge pages",
                "hint",
                f"in post-copy each missing page brings {size} KiB, and "
                "the guest waits for all of it",
            ),
        ]
    stats = await subject.destination.call("no figures of memory", handle.getMemoryStats, -1)
    free = (int(stats.get("free", 0)) + int(stats.get("cached", 0))) << 10
    if free >= needed:
        return [Check("memory", "ok", f"{free >> 20} MiB are free or cached at the destination")]
    return [
        Check(
            "memory",
            "hint",
            f"{free >> 20} MiB are free or cached at the destination, "
            f"{needed >> 20} MiB are needed",
            "swapping would begin there",
        )
    ]


def _is_local(uri: str) -> bool:
    """Whether the daemon behind a URI runs on this kernel."""
    parts = urlsplit(uri)
    return not parts.hostname and "+" not in parts.scheme.replace("+unix", "")


async def _lost_writes(subject: _Subject, accepted: bool) -> list[Check]:
    """The running QEMU itself is asked: it may be older than what is installed."""
    from qemu_postcopy.libvirt.monitor import LibvirtMonitor

    if _hardware(subject.xml)[2] != "qemu":
        return []
    try:
        monitor = await LibvirtMonitor.of(subject.source, subject.domain)
        if not await passes_lose_writes(monitor):
            return []
    except PostcopyError:
        return []  # not running: said elsewhere
    return [
        Check(
            "pre-copy",
            "hint" if accepted else "refused",
            LOST_WRITES,
            "--after-passes 0 (switched at once), virsh migrate without --live (stopped "
            "meanwhile), or --accept-lost-writes",
        )
    ]


def _open_to_all() -> bool:
    return SYSCTL.exists() and SYSCTL.read_text().strip() == "1"


def _has_device() -> bool:
    return DEVICE.exists()


async def _userfaultfd(subject: _Subject) -> Check:
    """The source needs none; the destination's QEMU opens one when it is told of post-copy."""
    version = int(await subject.destination.call("no", subject.destination.handle.getVersion))
    if not _is_local(subject.destination.uri):
        return Check(
            "userfaultfd",
            "hint",
            "the destination's QEMU says when the migration starts whether it may open one",
            "qemu-postcopy doctor there",
        )
    if _open_to_all():
        return Check("userfaultfd", "ok", "vm.unprivileged_userfaultfd is 1")
    if version >= QEMU_WITH_DEVICE and _has_device():
        return Check("userfaultfd", "ok", f"the destination's QEMU opens {DEVICE}")
    return Check(
        "userfaultfd",
        "refused",
        "the destination's QEMU (a user without CAP_SYS_PTRACE) may not open one",
        "sysctl vm.unprivileged_userfaultfd=1 at the destination, or QEMU 8 and libvirt "
        f"newer than 9.0 there, which use {DEVICE}",
    )


async def _recovery(subject: _Subject) -> Check:
    version = int(await subject.destination.call("no", subject.destination.handle.getLibVersion))
    first, last = CRASHES_ON_RESUME
    if first <= version <= last:
        return Check(
            "recovery",
            "hint",
            "the destination's libvirt "
            f"{version // 1_000_000}.{version // 1000 % 1000} ends whenever an "
            "interrupted post-copy is resumed",
            "a newer libvirt there; guests run on while it is installed",
        )
    return Check("recovery", "ok", "an interrupted post-copy can be resumed")


async def _preempt(subject: _Subject) -> Check:
    versions = [
        int(await side.call("no", side.handle.getLibVersion))
        for side in (subject.source, subject.destination)
    ]
    if min(versions) <= LIBVIRT_WITHOUT_PREEMPT:
        return Check(
            "preempt",
            "refused",
            "libvirt 9.0 does not use it",
            "leave --preempt out, or use a newer libvirt on both hosts",
        )
    return Check("preempt", "ok", "libvirt uses it by itself where both QEMUs have it")


async def _multifd(subject: _Subject) -> Check:
    """QEMU itself is asked to have both; what was set before is put back."""
    from qemu_postcopy.libvirt.monitor import LibvirtMonitor

    names = ("postcopy-ram", "multifd")
    advice = "leave --multifd out, or post-copy (--precopy-only)"
    try:
        monitor = await LibvirtMonitor.of(subject.source, subject.domain)
        before = await monitor.execute("query-migrate-capabilities")
        now = [one for one in before if one["capability"] in names]
        both = [{"capability": name, "state": True} for name in names]
        try:
            await monitor.execute("migrate-set-capabilities", {"capabilities": both})
        finally:
            await asyncio.shield(monitor.execute("migrate-set-capabilities", {"capabilities": now}))
    except PostcopyError as error:
        return Check(
            "multifd",
            "refused",
            f"not with post-copy: {error.message}",
            advice,
        )
    if monitor.version < QEMU_WITH_MULTIFD:
        return Check(
            "multifd",
            "refused",
            f"not with post-copy: QEMU {'.'.join(map(str, monitor.version))} does not refuse it, "
            "and cannot do it",
            advice,
        )
    return Check("multifd", "ok", "the source's QEMU has it with post-copy")
