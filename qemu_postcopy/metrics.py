"""``qemu-postcopy metrics``: an exporter for Prometheus, a process of its own.

At each scrape it asks the control socket of every guest of this user, all at the same time, as
`status` does; sidecars stay as small as they are and need no port.  It trusts what `status` trusts.
Served in the threads of prometheus-client.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import click

from qemu_postcopy.errors import HostError, UsageError
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
    "retries": "Attempts put off because memory was being given back.",
    "fill_errors": "Pages that could not be filled for want of memory and the like.",
}
BLOCK_GAUGES = {
    "pages_data": "Pages of the block that the image has data for.",
    "pages_data_missing": "Of these, not present yet.",
    "pages_removed": "Pages of the block given back by the guest.",
    "pages_unmapped": "Pages of the block that QEMU has unmapped since.",
    "waiting": "Faults in the block that are not answered yet.",
}
GAUGES = {
    "faults_waiting": "Faults read and not answered.",
    "pages_data": "Pages that the image has data for.",
    "pages_data_missing": "Of these, not present yet.",
    "pages_removed": "Pages given back by the guest.",
    "pages_foreign": "Pages that another process made, of zeros, before they were filled: damage.",
}


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


class GuestCollector:
    """What prometheus-client asks at each scrape."""

    def collect(self) -> Iterator[Any]:
        """The metrics of all guests of this moment."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        guests = collect()
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
        yield from _vcpus(guests)
        yield from _blocks(guests)
        for family, texts in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for key, text in texts.items():
                metric = family(PREFIX + key, text, labels=["guest"])
                for guest in guests:
                    if key in guest["statistics"]:
                        metric.add_metric([guest["name"]], guest["statistics"][key])
                yield metric


def _vcpus(guests: list[dict[str, Any]]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    each = CounterMetricFamily(
        PREFIX + "vcpu_stopped_seconds",
        "How long a virtual CPU waited for pages.",
        labels=["guest", "vcpu"],
    )
    together = CounterMetricFamily(
        PREFIX + "all_vcpus_stopped_seconds",
        "How long all virtual CPUs waited for pages at the same time.",
        labels=["guest"],
    )
    now = GaugeMetricFamily(
        PREFIX + "vcpus_stopped", "Virtual CPUs that wait for a page.", labels=["guest"]
    )
    share = GaugeMetricFamily(
        PREFIX + "async_fault_share",
        "Share of faults that the kernel made on a virtual CPU's behalf, 0 to 1.",
        labels=["guest"],
    )
    for guest in guests:
        vcpus = guest["vcpus"]
        if not vcpus:
            continue
        share.add_metric([guest["name"]], vcpus["async_share"])
        for name, microseconds in vcpus["stopped_us"].items():
            each.add_metric([guest["name"], name], microseconds / 1e6)
        if vcpus["count"]:
            together.add_metric([guest["name"]], vcpus["all_stopped_us"] / 1e6)
            now.add_metric([guest["name"]], vcpus["stopped"])
    yield from (each, together, now, share)


def _blocks(guests: list[dict[str, Any]]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    labels = ["guest", "block"]
    faults = CounterMetricFamily(
        PREFIX + "block_faults", "Faults read, by RAM block.", labels=labels
    )
    gauges = {
        key: GaugeMetricFamily(PREFIX + "block_" + key, text, labels=labels)
        for key, text in BLOCK_GAUGES.items()
    }
    for guest in guests:
        for block in guest["blocks"]:
            faults.add_metric([guest["name"], block["name"]], block["faults"])
            for key, gauge in gauges.items():
                gauge.add_metric([guest["name"], block["name"]], block[key])
    yield from (faults, *gauges.values())


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
