"""What a snapshot of a domain takes from libvirt: its monitor, and the XML to restore it with.

The snapshot itself is that of :mod:`qemu_postcopy.snapshot`: QEMU migrates into a pipe of ours that
it is given through libvirt, which sees the guest stop and go on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from qemu_postcopy.errors import MismatchError
from qemu_postcopy.libvirt import domain_xml
from qemu_postcopy.libvirt.connection import Connection, load
from qemu_postcopy.libvirt.monitor import LibvirtMonitor, address_of


@asynccontextmanager
async def reach_domain(uri: str, name: str) -> AsyncIterator[tuple[LibvirtMonitor, str]]:
    """The monitor of a domain that runs (or is paused) on this host, and its address.

    Raises:
        LibvirtError: there is no such domain, or it is not active, or on another host.
    """
    async with await Connection.open(uri) as connection:
        connection.require_local()
        domain = await connection.domain(name)
        monitor = await LibvirtMonitor.of(connection, domain)
        yield monitor, address_of(uri, domain.UUIDString())


async def describe_domain(monitor: LibvirtMonitor) -> dict[str, Any]:
    """What the manifest says of the domain, as :meth:`ImageWriter.finish` takes it.

    Raises:
        MismatchError: its memory cannot be paged.
    """
    libvirt = load()
    domain, call = monitor.domain, monitor.connection.call
    secure = libvirt.VIR_DOMAIN_XML_SECURE
    # Both as virsh save has them: the XML as any later libvirt takes it, and the CPU as QEMU was
    # started with it, which is not the same (qemuDomainSaveCookieFormat, src/qemu/qemu_domain.c).
    xml = await call("its XML", domain.XMLDesc, secure | libvirt.VIR_DOMAIN_XML_MIGRATABLE)
    live = await call("its XML", domain.XMLDesc, secure)
    if reasons := domain_xml.refusals(domain_xml.parse(xml)):
        raise MismatchError("this guest cannot be resumed lazily: " + "; ".join(reasons))
    active = await call("its state", domain.state)
    return {
        "architecture": await monitor.target(),
        "qemu_version": ".".join(map(str, monitor.version)),
        "source": f"snapshot of domain {domain.name()}",
        "guest_name": domain.name(),
        "domain_xml": xml,
        "launch": {
            "libvirt": {
                "cookie": cookie_of(live),
                "was_running": active[0] == libvirt.VIR_DOMAIN_RUNNING,
            }
        },
        "disks": [asdict(disk) for disk in await monitor.disks()],
    }


def cookie_of(live_xml: str) -> str:
    """libvirt's note of the CPU that QEMU was started with."""
    cpu = domain_xml.parse(live_xml).find("cpu")
    if cpu is None:
        return ""
    return f"<cookie>\n  {ElementTree.tostring(cpu, encoding='unicode').strip()}\n</cookie>\n"
