"""``qemu-postcopy metrics``: an exporter for Prometheus, a process of its own.

At each scrape it asks the control socket of every guest of this user, all at the same time, as
`status` does; sidecars stay as small as they are and need no port.  It trusts what `status` trusts.
Served in the threads of prometheus-client.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click

from qemu_postcopy.errors import HostError, PostcopyError, UsageError
from qemu_postcopy.sidecar.rundir import list_directories
from qemu_postcopy.status import collect

PREFIX = "qemu_postcopy_"
COUNTERS = {
    "faults": "Faults read.",
    "bytes_read": "Bytes of page data read from the source.",
    "pages_demand": "Pages with data filled around a fault.",
    "pages_background": "Pages with data filled with nobody waiting.",
    "pages_prefetched": "Pages filled ahead of an expected fault.",
    "pages_zero": "Pages filled with known zeros.",
    "source_errors": "Failed or short reads of page data.",
    "fill_errors": "Pages that could not be filled for want of memory and the like.",
}
GAUGES = {
    "faults_waiting": "Faults read and not answered.",
    "pages_data": "Pages that the image has data for.",
    "pages_data_missing": "Of these, not present yet.",
    "pages_removed": "Pages given back by the guest.",
}
ASKED_AT_ONCE = 16


def parse_address(text: str) -> tuple[str, int]:
    """`ADDRESS:PORT` or `[ADDRESS]:PORT`; UsageError for anything else."""
    address, colon, port = text.rpartition(":")
    if address.startswith("[") and address.endswith("]"):
        address = address[1:-1]
    elif ":" in address:
        colon = ""
    if not address or not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise UsageError(
            f"{text!r} is no address to listen on",
            hint="ADDRESS:PORT, such as 127.0.0.1:9469 or [::1]:9469",
        )
    return address, int(port)


def _guests() -> list[dict[str, Any]]:
    def look(name: str) -> list[dict[str, Any]]:
        try:
            return collect(name)
        except PostcopyError:
            return []  # its directory went away meanwhile

    with ThreadPoolExecutor(ASKED_AT_ONCE) as executor:
        return list(
            itertools.chain.from_iterable(
                executor.map(look, [directory.name for directory in list_directories()])
            )
        )


class GuestCollector:
    """What prometheus-client asks at each scrape."""

    def collect(self) -> Iterator[Any]:
        """The metrics of all guests of this moment."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        guests = _guests()
        state = GaugeMetricFamily(
            PREFIX + "guest", "1 for each guest, by its state.", labels=["guest", "state"]
        )
        trouble = GaugeMetricFamily(
            PREFIX + "trouble", "1 while something keeps the guest waiting.", labels=["guest"]
        )
        latency = HistogramMetricFamily(
            PREFIX + "fault_latency_seconds",
            "From reading a fault to answering it, by who faulted.",
            labels=["guest", "origin"],
        )
        for guest in guests:
            state.add_metric([guest["name"], guest["state"]], 1)
            trouble.add_metric([guest["name"]], bool(guest["trouble"]))
            origins = guest["origins"]
            if not origins and guest["statistics"]:
                origins = {"unknown": {"latency_us": guest["statistics"]["latency_us"]}}
            for name, origin in origins.items():
                blocked_us = origin.get("blocked_us")
                latency.add_metric(
                    [guest["name"], name],
                    _buckets(origin["latency_us"]),
                    None if blocked_us is None else blocked_us / 1e6,
                )
        yield from (state, trouble, latency)
        for family, texts in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for key, text in texts.items():
                metric = family(PREFIX + key, text, labels=["guest"])
                for guest in guests:
                    if key in guest["statistics"]:
                        metric.add_metric([guest["name"]], guest["statistics"][key])
                yield metric


def _buckets(latency_us: list[int]) -> list[tuple[str, float]]:
    """Cumulative, in seconds; the last one has no upper bound."""
    sums = list(itertools.accumulate(latency_us))
    bounds = [str(2**i / 1e6) for i in range(len(sums) - 1)]
    return list(zip([*bounds, "+Inf"], map(float, sums), strict=True))


@click.command()
@click.option(
    "--listen",
    default="127.0.0.1:9469",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Where Prometheus asks; port 0 takes a free one.",
)
def metrics_command(listen: str) -> None:
    """Export the figures of all guests to Prometheus, until interrupted.

    Needs the package prometheus-client: pip install 'qemu-postcopy[metrics]'. Everybody who can
    reach the address can read the figures and the guests' names.

    \b
    Example:
      qemu-postcopy metrics --listen 127.0.0.1:9469
    """
    address, port = parse_address(listen)
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise HostError(
            "the package prometheus-client is missing",
            hint="pip install 'qemu-postcopy[metrics]', or your system's python3-prometheus-client",
        ) from error
    registry = CollectorRegistry()
    registry.register(GuestCollector())
    try:
        server, _ = start_http_server(port, address, registry)
    except OSError as error:
        raise HostError(
            f"cannot listen on {listen}: {error.strerror or error}",
            hint="choose another address or port with --listen",
        ) from error
    click.echo(f"listening on {address} port {server.server_port}")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.shutdown()
