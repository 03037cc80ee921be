"""Whoever waits for a domain's events learns that libvirt's daemon has gone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qemu_postcopy.errors import LibvirtError
from qemu_postcopy.libvirt.connection import Connection
from qemu_postcopy.libvirt.monitor import LibvirtListener


def test_a_wait_without_a_limit_ends_with_the_connection() -> None:
    async def run() -> None:
        connection = Connection(None, "qemu:///system")
        listener = LibvirtListener()
        with connection.telling_end(listener.ended):
            listener.told(None, None, "MIGRATION", 1, 0, '{"status": "active"}', None)
            # As libvirt calls it, in its own thread.
            threading.Thread(target=connection._tell_end).start()
            assert (await listener.wait())["data"] == {"status": "active"}
            for _ in range(2):
                with pytest.raises(LibvirtError, match="daemon has gone"):
                    await listener.wait()
        # Who comes later is told at once; who has left is not.
        later = LibvirtListener()
        with connection.telling_end(later.ended), pytest.raises(LibvirtError):
            await later.wait()
        connection._tell_end()

    asyncio.run(asyncio.wait_for(run(), 20))
