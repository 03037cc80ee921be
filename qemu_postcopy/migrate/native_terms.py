"""What we ask of a migration and are told of it, in the terms of libvirt's API and of QEMU's QAPI.

Pure but for the names of flags, which libvirt-python has; any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qemu_postcopy.libvirt.connection import load
from qemu_postcopy.migrate.engine import Blocktime, Statistics

#: libvirt 11.2 to 11.3 read a null pointer in virDomainMigratePrepare3 with POSTCOPY_RESUME
#: (qemuProcessIncomingDefNew, `fd`): each resume ends the destination's daemon. Seen with 11.3.
CRASHES_ON_RESUME = (11_002_000, 11_003_999)


@dataclass(frozen=True)
class NativeOptions:
    """How libvirt is to move a domain; names as virsh migrate's options.

    Attributes:
        bandwidth, postcopy_bandwidth: bytes per second, rounded up to MiB; 0: no limit.
        parallel: connections of a multifd migration; 0: none.
        direct: this process carries libvirt's messages between the hosts, and its end in pre-copy
            is the migration's; else the source's daemon does so (peer to peer).

    A resume takes the same ones: they also say what becomes of the domain afterwards.
    """

    bandwidth: int = 0
    postcopy_bandwidth: int = 0
    parallel: int = 0
    persistent: bool = False
    undefine_source: bool = False
    unsafe: bool = False
    migrate_uri: str | None = None
    listen_address: str | None = None
    new_name: str | None = None
    xml: str | None = None
    persistent_xml: str | None = None
    postcopy: bool = True
    direct: bool = False

    def flags(self) -> int:
        """libvirt's virDomainMigrateFlags."""
        libvirt = load()
        flags: int = libvirt.VIR_MIGRATE_LIVE
        chosen = {
            libvirt.VIR_MIGRATE_PEER2PEER: not self.direct,
            libvirt.VIR_MIGRATE_POSTCOPY: self.postcopy,
            libvirt.VIR_MIGRATE_PERSIST_DEST: self.persistent,
            libvirt.VIR_MIGRATE_UNDEFINE_SOURCE: self.undefine_source,
            libvirt.VIR_MIGRATE_UNSAFE: self.unsafe,
            libvirt.VIR_MIGRATE_PARALLEL: self.parallel > 0,
        }
        for flag, wanted in chosen.items():
            flags |= flag if wanted else 0
        return flags

    def parameters(self) -> dict[str, Any]:
        """libvirt's typed parameters."""
        libvirt = load()
        possible = {
            libvirt.VIR_MIGRATE_PARAM_URI: self.migrate_uri,
            libvirt.VIR_MIGRATE_PARAM_LISTEN_ADDRESS: self.listen_address,
            libvirt.VIR_MIGRATE_PARAM_DEST_NAME: self.new_name,
            libvirt.VIR_MIGRATE_PARAM_DEST_XML: self.xml,
            libvirt.VIR_MIGRATE_PARAM_PERSIST_XML: self.persistent_xml,
            libvirt.VIR_MIGRATE_PARAM_BANDWIDTH: mebibytes(self.bandwidth),
            libvirt.VIR_MIGRATE_PARAM_BANDWIDTH_POSTCOPY: mebibytes(self.postcopy_bandwidth),
            libvirt.VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS: self.parallel,
        }
        return {name: value for name, value in possible.items() if value}


def mebibytes(size: int) -> int:
    """libvirt's unit of bandwidth, rounded up."""
    return -(-size // (1 << 20))


def statistics_of(raw: Mapping[str, Any]) -> Statistics:
    """libvirt's virDomainGetJobStats as ours; times there are in ms, rates in pages or bytes."""

    def number(name: str) -> int:
        return int(raw.get(name, 0))

    return Statistics(
        elapsed=number("time_elapsed") / 1000,
        total=number("memory_total"),
        remaining=number("memory_remaining"),
        transferred=number("memory_processed"),
        rate=number("memory_bps"),
        dirty_rate=number("memory_dirty_rate") * (number("memory_page_size") or 4096),
        passes=number("memory_iteration"),
        downtime=number("downtime") / 1000,
        setup=number("setup_time") / 1000,
        requests=number("memory_postcopy_requests"),
        raw=dict(raw),
    )


def blocktime_of(raw: Mapping[str, Any]) -> Blocktime | None:
    """QEMU's query-migrate at the destination (qapi/migration.json); None: it has not counted."""
    if "postcopy-blocktime" not in raw:
        return None
    return Blocktime(
        int(raw["postcopy-blocktime"]),
        tuple(raw.get("postcopy-vcpu-blocktime", ())),
        raw.get("postcopy-latency"),
        tuple(raw.get("postcopy-vcpu-latency", ())),
        tuple(raw.get("postcopy-latency-dist", ())),
    )
