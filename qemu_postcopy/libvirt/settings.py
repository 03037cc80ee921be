"""``qemu-postcopy libvirt set | show | unset``: our element in the XML of a domain, by libvirt.

One step each, through virDomainGetMetadata and virDomainSetMetadata: of a domain that runs, of its
definition, or of both.  Nothing is started or stopped; what is set counts for what is saved or
migrated from then on.  A domain that was saved before is restored by the XML in its save file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qemu_postcopy.errors import LibvirtError
from qemu_postcopy.libvirt.connection import Connection, load
from qemu_postcopy.libvirt.metadata import NAMESPACE, PREFIX, Settings, parse_settings


async def read_settings(uri: str, name: str) -> tuple[Settings | None, Settings | None]:
    """Those of the running domain and of its definition; None where there are none.

    Raises:
        LibvirtError: there is no such domain.
        UsageError: what is there is not as the schema has it.
    """
    libvirt = load()
    async with await Connection.open(uri) as connection:
        domain = await connection.domain(name)
        live, config = await _parts(connection, domain)
        return (
            await _get(connection, domain, libvirt.VIR_DOMAIN_AFFECT_LIVE) if live else None,
            await _get(connection, domain, libvirt.VIR_DOMAIN_AFFECT_CONFIG) if config else None,
        )


async def change_settings(
    uri: str, name: str, change: Callable[[Settings], Settings | None]
) -> Settings | None:
    """Replaces the settings of the running domain and of its definition, whichever there are.

    Args:
        change: from the settings in force (the definition's, else the running domain's, else the
            defaults) to the new ones; None removes them.

    Raises:
        LibvirtError: there is no such domain, or libvirt refused.
    """
    libvirt = load()
    async with await Connection.open(uri) as connection:
        domain = await connection.domain(name)
        live, config = await _parts(connection, domain)
        kinds = [libvirt.VIR_DOMAIN_AFFECT_CONFIG] if config else []
        kinds += [libvirt.VIR_DOMAIN_AFFECT_LIVE] if live else []
        before = [found for kind in kinds if (found := await _get(connection, domain, kind))]
        settings = change(before[0] if before else Settings())
        text = settings.as_xml() if settings else None
        for kind in kinds:
            await connection.call(
                f"the metadata of {name} cannot be set",
                domain.setMetadata,
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                text,
                PREFIX if text else None,
                NAMESPACE,
                kind,
            )
        return settings


async def has_managed_save(uri: str, name: str) -> bool:
    """Whether the domain's next start restores it, by the settings that it was saved with.

    Raises:
        LibvirtError: there is no such domain.
    """
    async with await Connection.open(uri) as connection:
        domain = await connection.domain(name)
        return bool(await connection.call("its managed save", domain.hasManagedSaveImage))


async def _parts(connection: Connection, domain: Any) -> tuple[bool, bool]:
    """Whether the domain runs, and whether it is defined."""
    active = await connection.call("its state", domain.isActive)
    persistent = await connection.call("its definition", domain.isPersistent)
    return bool(active), bool(persistent)


async def _get(connection: Connection, domain: Any, kind: int) -> Settings | None:
    libvirt = load()
    try:
        text = await connection.call(
            "its metadata",
            domain.metadata,
            libvirt.VIR_DOMAIN_METADATA_ELEMENT,
            NAMESPACE,
            kind,
        )
    except LibvirtError as error:
        if error.code == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return None
        raise
    return parse_settings(text)
