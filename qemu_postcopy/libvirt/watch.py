"""``qemu-postcopy libvirt watch``: live migrations of a domain, whoever started them, go on to
post-copy when they have had so many passes.

Started by the hook for a domain whose settings say so, on the host that it runs on; lives as long
as the domain does there, or libvirt's daemon (which has its hook start another when it comes back).
libvirt tells of each pass over memory (QEMU's MIGRATION_PASS); nothing is polled.  A migration that
was not allowed post-copy is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from qemu_postcopy.errors import LibvirtError
from qemu_postcopy.libvirt.connection import Connection, load

log = logging.getLogger(__name__)


async def watch_migrations(uri: str, name: str, passes: int) -> int:
    """Returns when the domain has ended or is gone, or libvirt's daemon: how often it switched.

    Args:
        passes: after so many whole passes, at least 1.

    Raises:
        LibvirtError: there is no such domain, or libvirt cannot be reached.
    """
    libvirt = load()
    switched = 0
    async with await Connection.open(uri) as connection:
        domain = await connection.domain(name)
        async with connection.events(domain, "MIGRATION_ITERATION", "LIFECYCLE") as events:
            loop = asyncio.get_running_loop()

            def closed() -> None:
                loop.call_soon_threadsafe(events.put_nowait, ("closed", ()))

            with connection.telling_end(closed):
                while await _is_active(connection, domain):
                    kind, details = await events.get()
                    if kind == "closed":
                        log.warning("libvirt's daemon has gone: %s is not watched any more", name)
                        break
                    if kind == "LIFECYCLE" and details[0] == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                        break
                    # A pass is told of when it begins.
                    if kind == "MIGRATION_ITERATION" and details[0] > passes:
                        switched += await _switch(connection, domain, name)
    return switched


async def _is_active(connection: Connection, domain: Any) -> bool:
    try:
        return bool(await connection.call("its state", domain.isActive))
    except LibvirtError as error:
        log.info("%s", error.message)  # a transient one that has moved away is known no more
        return False


async def _switch(connection: Connection, domain: Any, name: str) -> bool:
    try:
        await connection.call("cannot switch", domain.migrateStartPostCopy, 0)
    except LibvirtError as error:
        # It was not allowed to, has switched already, or is over.
        log.info("%s: %s", name, error.message)
        return False
    log.warning("%s goes on by post-copy", name)
    return True
