"""``qemu-postcopy bench``: each bench is a command; a table by default, JSON on request.

Only click is imported before a bench runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from qemu_postcopy.bench.report import Report

SHIFTS = {"K": 10, "M": 20}
DEFAULT_PAGES = {"memfd": 20000, "anonymous": 20000, "hugetlb": 64}


def listed(
    parse: Callable[[str], int],
) -> Callable[[click.Context, click.Parameter, str], tuple[int, ...]]:
    """A callback for an option that takes values separated by commas."""

    def convert(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
        try:
            return tuple(dict.fromkeys(parse(part.strip()) for part in value.split(",")))
        except ValueError as error:
            raise click.BadParameter(str(error), context, parameter) from error

    return convert


def thread_count(text: str) -> int:
    """1 to 64."""
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise ValueError(f"{text!r} is not a number from 1 to 64")
    return int(text)


def chunk_size(text: str) -> int:
    """Bytes: 4KiB, 64K, 2M, or "default"."""
    if text == "default":
        from qemu_postcopy.paging.pager import DEFAULT_CHUNK_SIZE

        return DEFAULT_CHUNK_SIZE
    digits = text.upper().removesuffix("IB").removesuffix("B")
    shift = SHIFTS.get(digits[-1:], 0)
    digits = digits[:-1] if shift else digits
    size = int(digits) << shift if digits.isdigit() else 0
    if not 4096 <= size <= 2 << 20 or size & (size - 1):
        raise ValueError(
            f"{text!r} is not a chunk size: a power of two from 4KiB to 2MiB, or 'default'"
        )
    return size


def show(report: Report, as_json: bool) -> None:
    """Writes a report to standard output."""
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
        return
    from rich.console import Console

    # A file or pipe has no width: long lines are better there than columns cut to 80.
    report.print(Console(width=None if sys.stdout.isatty() else 160, highlight=False))


def say(line: str) -> None:
    """Progress goes to standard error."""
    click.echo(line, err=True)


@click.group("bench")
def bench_commands() -> None:
    """Measure this host.

    Every bench alternates between what it compares, and reports ratios of what was measured within
    moments of each other.
    """


@bench_commands.command("faults")
@click.option("--pages", type=click.IntRange(64, 1 << 22), help="Pages to touch in each run.")
@click.option(
    "--order",
    type=click.Choice(["sequential", "random", "both"]),
    default="both",
    show_default=True,
    help="The order of touches.",
)
@click.option(
    "--threads",
    callback=listed(thread_count),
    default="1,4",
    show_default=True,
    help="Threads that touch.",
)
@click.option(
    "--descriptors",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Equal parts of the memory, each with a userfaultfd and a handling thread of its own.",
)
@click.option(
    "--chunk",
    "chunk_sizes",
    callback=listed(chunk_size),
    default="4KiB,default",
    show_default=True,
    help="Bytes filled around a fault.",
)
@click.option(
    "--memory",
    type=click.Choice(sorted(DEFAULT_PAGES)),
    default="memfd",
    show_default=True,
    help="What the memory is made of.",
)
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds of each."
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default="/dev/shm",
    show_default=True,
    help="Where the page data is put for the time being.",
)
@click.option("--trace", is_flag=True, help="Also with every fault recorded, and what that costs.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def faults_command(
    pages: int | None,
    order: str,
    threads: tuple[int, ...],
    descriptors: int,
    chunk_sizes: tuple[int, ...],
    memory: str,
    runs: int,
    directory: Path,
    trace: bool,
    as_json: bool,
) -> None:
    """Answer page faults: our pager against a bare C handler, blocking and spinning.

    \b
    Examples:
      qemu-postcopy bench faults
      qemu-postcopy bench faults --threads 1 --chunk 4KiB --order random --json
    """
    from qemu_postcopy.bench.faults import FaultBench

    bench = FaultBench(
        pages=pages or DEFAULT_PAGES[memory],
        orders=("sequential", "random") if order == "both" else (order,),
        threads=threads,
        descriptors=descriptors,
        chunk_sizes=chunk_sizes,
        memory=memory,
        runs=runs,
        directory=directory,
        trace=trace,
        say=say,
    )
    show(bench.run(), as_json)


def memory_mib(text: str) -> int:
    """MiB of filled memory: 256M, 1G, 8GiB."""
    digits = text.upper().removesuffix("IB").removesuffix("B")
    shift = {"M": 0, "G": 10}.get(digits[-1:])
    if shift is None or not digits[:-1].isdigit() or not 16 <= int(digits[:-1]) << shift <= 1 << 20:
        raise ValueError(f"{text!r} is not a memory size from 16M to 1T; examples: 256M, 4GiB")
    return int(digits[:-1]) << shift


@bench_commands.command("restore")
@click.option(
    "--sizes",
    callback=listed(memory_mib),
    default="256M,1G,4G,8G",
    show_default=True,
    help="Memory that the guest has filled.",
)
@click.option(
    "--eager-up-to",
    callback=listed(memory_mib),
    default="4G",
    show_default=True,
    help="Largest size for the eager ways (each needs a copy of the memory on disk).",
)
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds of each."
)
@click.option("--qemu", default="", help="QEMU binary; default: this architecture's.")
@click.option(
    "--chunk", callback=lambda _c, _p, v: chunk_size(v) if v else None, help="Bytes around a fault."
)
@click.option("--background/--no-background", default=True, show_default=True)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default="/var/tmp",
    show_default=True,
    help="Where images and streams are put for the time being: three times the largest eager size.",
)
@click.option(
    "--connect",
    metavar="URI",
    help="A domain of that libvirt, saved by virsh: lazily, by virsh restore, and by the hook.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def restore_command(
    sizes: tuple[int, ...],
    eager_up_to: tuple[int, ...],
    runs: int,
    qemu: str,
    chunk: int | None,
    background: bool,
    directory: Path,
    connect: str | None,
    as_json: bool,
) -> None:
    """Resume guests: lazily, eagerly by stock QEMU, and by the kernel's private mapping.

    Measured is the time from the start of QEMU (or of our command) to the guest's first whole line
    of output, with a warm page cache. With --connect plain virsh restores by the hook too, where
    install-hooks has put one (and libvirt's daemon was started since).

    \b
    Examples:
      qemu-postcopy bench restore
      qemu-postcopy bench restore --sizes 256M,1G --runs 9 --json
      qemu-postcopy bench restore --connect qemu:///system --sizes 4G
    """
    import asyncio
    import os

    if connect is not None:
        from qemu_postcopy.bench.libvirt_restore import LibvirtRestoreBench

        if qemu or chunk or not background:
            raise click.UsageError("--qemu, --chunk and --no-background are not for --connect")
        domains = LibvirtRestoreBench(connect, sizes, runs, directory, say)
        show(domains.run(), as_json)
        return

    from qemu_postcopy.bench.restore import RestoreBench

    bench = RestoreBench(
        sizes_mib=sizes,
        runs=runs,
        directory=directory,
        qemu=qemu or f"qemu-system-{os.uname().machine}",
        eager_mib=max(eager_up_to),
        background=background,
        chunk_size=chunk,
        say=say,
    )
    show(asyncio.run(bench.run()), as_json)


@bench_commands.command("guests")
@click.option(
    "--count", type=click.IntRange(1, 1000), default=64, show_default=True, help="Guests at once."
)
@click.option(
    "--fill",
    "fill_mib",
    callback=lambda _c, _p, v: memory_mib(v),
    default="16M",
    show_default=True,
    help="Memory that each has filled and verifies; its RAM is some 112 MiB more.",
)
@click.option(
    "--at-once",
    type=click.IntRange(1, 64),
    default=2,
    show_default=True,
    help="Restores at a time.",
)
@click.option(
    "--idle",
    "idle_seconds",
    type=click.FloatRange(0.1, 3600),
    default=10.0,
    show_default=True,
    help="Seconds for which they are paused and their use of the processor is counted.",
)
@click.option("--qemu", default="", help="QEMU binary; default: this architecture's.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default="/var/tmp",
    show_default=True,
    help="Where the image and the run directories are put for the time being.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def guests_command(
    count: int,
    fill_mib: int,
    at_once: int,
    idle_seconds: float,
    qemu: str,
    directory: Path,
    as_json: bool,
) -> None:
    """Run many guests from one image: memory, processor time, and whether all go on.

    Each guest verifies its memory all the while; one wrong word is an error.

    \b
    Examples:
      qemu-postcopy bench guests
      qemu-postcopy bench guests --count 8 --json
    """
    import asyncio
    import os

    from qemu_postcopy.bench.guests import GuestsBench

    bench = GuestsBench(
        count=count,
        fill_mib=fill_mib,
        at_once=at_once,
        idle_seconds=idle_seconds,
        directory=directory,
        qemu=qemu or f"qemu-system-{os.uname().machine}",
        say=say,
    )
    show(asyncio.run(bench.run()), as_json)


@bench_commands.command("replay")
@click.argument("trace", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--image",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="What the traced guest was restored from.",
)
@click.option(
    "--timed/--fast",
    default=False,
    show_default=True,
    help="Touch at the times of the trace, or as fast as it goes.",
)
@click.option(
    "--chunk",
    callback=lambda _c, _p, v: chunk_size(v) if v else None,
    help="Bytes around a fault; default: the image's.",
)
@click.option(
    "--background/--no-background",
    default=False,
    show_default=True,
    help="Fill the rest meanwhile, as a restore does.",
)
@click.option(
    "--chaos",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Let page data fail as this schedule says; see restore --chaos.",
)
@click.option(
    "--runs", type=click.IntRange(1, 1000), default=3, show_default=True, help="Times to replay it."
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default="/dev/shm",
    show_default=True,
    help="Where schedule and ledger are put for the time being.",
)
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def replay_command(
    trace: Path,
    image: Path,
    timed: bool,
    chunk: int | None,
    background: bool,
    chaos: Path | None,
    runs: int,
    directory: Path,
    as_json: bool,
) -> None:
    """Replay the faults of TRACE against the pager, without a guest.

    For each thread that had faulted there is one that touches the same pages in the same order. The
    memory comes from the image as in a restore, and is compared with it. Needs as much memory as
    the traced guest had touched.

    \b
    Examples:
      qemu-postcopy restore --trace vm.trace --wait complete vm.qpc
      qemu-postcopy bench replay vm.trace --image vm.qpc
      qemu-postcopy bench replay vm.trace --image vm.qpc --timed --chaos chaos.toml
    """
    from qemu_postcopy.bench.replay import ReplayBench
    from qemu_postcopy.paging.chaos import ChaosSchedule

    bench = ReplayBench(
        trace=trace,
        image=image,
        timed=timed,
        runs=runs,
        directory=directory,
        chunk_size=chunk,
        background=background,
        chaos=ChaosSchedule.load(chaos) if chaos is not None else None,
        say=say,
    )
    show(bench.run(), as_json)
