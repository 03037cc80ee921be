"""``qemu-postcopy migrate``: arguments in, a driven migration, a report out."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from qemu_postcopy.cli import size
from qemu_postcopy.errors import PostcopyError, UsageError
from qemu_postcopy.libvirt.connection import Connection
from qemu_postcopy.migrate import checks as checking
from qemu_postcopy.migrate.drive import Drive, DriveOptions
from qemu_postcopy.migrate.native import NativeEngine
from qemu_postcopy.migrate.native_terms import NativeOptions
from qemu_postcopy.migrate.policy import Policy
from qemu_postcopy.migrate.progress import shown
from qemu_postcopy.migrate.report import Report


@click.command()
@click.argument("domain")
@click.argument("destination", metavar="[DESTURI]", required=False, default="")
@click.option(
    "--connect",
    metavar="URI",
    default="qemu:///system",
    show_default=True,
    help="Of the libvirt that runs DOMAIN now.",
)
@click.option(
    "--after-passes",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    metavar="N",
    help="Switch when N passes are complete; 0: at once.",
)
@click.option(
    "--on-stall/--no-on-stall",
    default=True,
    show_default=True,
    help="Switch when a pass leaves nearly as much as the one before.",
)
@click.option(
    "--dirty-rate",
    callback=size,
    metavar="SIZE",
    help="Switch when the guest writes more than this per second.",
)
@click.option(
    "--switch-after",
    type=click.FloatRange(0),
    metavar="SECONDS",
    help="Switch when the migration has taken so long.",
)
@click.option("--precopy-only", is_flag=True, help="Never switch.")
@click.option(
    "--bandwidth",
    callback=size,
    default="0",
    metavar="SIZE",
    help="Limit of pre-copy, bytes per second, in whole MiB; 0: none.",
)
@click.option(
    "--postcopy-bandwidth",
    callback=size,
    default="0",
    metavar="SIZE",
    help="Limit of post-copy, also after a resume; 0: none.",
)
@click.option(
    "--preempt",
    is_flag=True,
    help="Insist on a channel of its own for pages that the guest waits for.",
)
@click.option(
    "--multifd",
    type=click.IntRange(1, 255),
    metavar="N",
    help="Send by N connections, where QEMU can do that with post-copy.",
)
@click.option(
    "--direct",
    is_flag=True,
    help="Carry libvirt's messages between the hosts, as virsh does without --p2p: where the "
    "source's libvirtd cannot reach the destination's. If this command dies in pre-copy, the "
    "migration ends; the guest runs on.",
)
@click.option("--migrateuri", help="Where QEMU connects to, as virsh migrate --migrateuri.")
@click.option("--listen-address", help="Where the destination's QEMU listens.")
@click.option("--dname", metavar="NAME", help="Its name at the destination.")
@click.option("--xml", type=click.File(), help="Domain XML for the destination.")
@click.option("--persistent", is_flag=True, help="Define it at the destination.")
@click.option(
    "--persistent-xml",
    type=click.File(),
    help="With --persistent: domain XML that is defined there.",
)
@click.option("--undefinesource", is_flag=True, help="Undefine it at the source.")
@click.option("--unsafe", is_flag=True, help="Migrate although disks may not be shared safely.")
@click.option(
    "--accept-lost-writes",
    is_flag=True,
    help="Whole passes also under TCG in a QEMU older than 9.0, which loses writes then.",
)
@click.option("--resume", is_flag=True, help="Take up a post-copy that was interrupted.")
@click.option(
    "--watch", is_flag=True, help="Drive a migration that is under way already, such as virsh's."
)
@click.option(
    "--watch-only",
    is_flag=True,
    help="Only look at it: no switch, no recovery. "
    "A domain with `libvirt set --postcopy-after N` is switched by that too, whatever is said "
    "here.",
)
@click.option(
    "--supervise",
    is_flag=True,
    help="Recover an interrupted post-copy, again and again until it is done.",
)
@click.option(
    "--stall",
    type=click.FloatRange(1),
    default=10,
    show_default=True,
    metavar="SECONDS",
    help="A post-copy without a page for so long is interrupted.",
)
@click.option("--dry-run", is_flag=True, help="Only check both hosts and the domain.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON on stdout.")
def migrate_command(domain: str, destination: str, connect: str, **choices: Any) -> None:
    """Move a running DOMAIN of libvirt's to the host of DESTURI.

    Its memory is copied while it runs; when the policy says so it goes on at the destination and
    gets the rest when it wants it (post-copy). DESTURI is as the source's libvirt reaches it, which
    does the work: the migration goes on if this command dies, and --watch looks at it again.

    Ctrl-C during pre-copy aborts, the guest runs on at the source. Post-copy cannot be aborted. If
    it is interrupted the guest waits: --resume takes it up with the options of the first command,
    --supervise does that by itself.

    \b
    Examples:
      qemu-postcopy migrate web qemu+ssh://beta/system
      qemu-postcopy migrate --dry-run web qemu+ssh://beta/system
      qemu-postcopy migrate --after-passes 0 --supervise web qemu+ssh://beta/system
      qemu-postcopy migrate --switch-after 60 --bandwidth 500M web qemu+ssh://beta/system
      qemu-postcopy migrate --resume web qemu+ssh://beta/system
      qemu-postcopy migrate --watch --supervise web qemu+ssh://beta/system
    """
    as_json = choices["as_json"]
    attached = choices["watch"] or choices["watch_only"]
    if attached + choices["resume"] + choices["dry_run"] > 1:
        raise UsageError(
            "--resume, --watch, --watch-only and --dry-run exclude each other", hint="choose one"
        )
    if choices["resume"] and choices["precopy_only"]:
        raise UsageError(
            "--resume is of a post-copy, --precopy-only has none", hint="leave one out"
        )
    if not destination and (not attached or choices["supervise"]):
        raise UsageError(
            "DESTURI is missing", hint="qemu-postcopy migrate web qemu+ssh://beta/system"
        )
    if choices["persistent_xml"] and not choices["persistent"]:
        raise UsageError("--persistent-xml is what --persistent defines", hint="add --persistent")
    if choices["watch_only"] and choices["supervise"]:
        raise UsageError("--watch-only does nothing, --supervise does", hint="say --watch")
    options = native_options(choices)
    if choices["dry_run"]:
        found = asyncio.run(_check(connect, domain, destination, options, choices))
        if as_json:
            click.echo(json.dumps([check.as_json() for check in found], indent=2))
        else:
            _show_checks(found)
        checking.refuse(found)
        return
    report = asyncio.run(_drive(connect, domain, destination, options, choices))
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else report.as_text())


def native_options(choices: dict[str, Any]) -> NativeOptions:
    """The engine's options of the command's."""
    return NativeOptions(
        bandwidth=choices["bandwidth"],
        postcopy_bandwidth=choices["postcopy_bandwidth"],
        parallel=choices["multifd"] or 0,
        persistent=choices["persistent"],
        undefine_source=choices["undefinesource"],
        unsafe=choices["unsafe"],
        migrate_uri=choices["migrateuri"],
        listen_address=choices["listen_address"],
        new_name=choices["dname"],
        xml=choices["xml"].read() if choices["xml"] else None,
        persistent_xml=choices["persistent_xml"].read() if choices["persistent_xml"] else None,
        postcopy=not choices["precopy_only"],
        direct=choices["direct"],
    )


def drive_options(choices: dict[str, Any]) -> DriveOptions:
    """The driver's options of the command's."""
    attached = choices["watch"] or choices["watch_only"]
    return DriveOptions(
        policy=Policy(
            passes=choices["after_passes"],
            stalled=choices["on_stall"],
            dirty_rate=choices["dirty_rate"],
            seconds=choices["switch_after"],
            never=choices["precopy_only"] or choices["watch_only"],
        ),
        begin="resume" if choices["resume"] else "watch" if attached else "start",
        supervise=choices["supervise"],
        stall=choices["stall"],
    )


async def _check(
    connect: str, name: str, destination: str, options: NativeOptions, choices: dict[str, Any]
) -> list[checking.Check]:
    async with (
        await Connection.open(connect) as source,
        await Connection.open(destination) as target,
    ):
        domain = await source.domain(name)
        return await checking.check_all(source, target, domain, options, **_check_options(choices))


def _check_options(choices: dict[str, Any]) -> dict[str, bool]:
    return {
        "preempt": choices["preempt"],
        "passes": choices["precopy_only"] or choices["after_passes"] > 0,
        "accept_lost_writes": choices["accept_lost_writes"],
    }


def _show_checks(found: list[checking.Check]) -> None:
    for check in found:
        click.echo(f"{check.verdict:8}{check.name}: {check.found}", err=check.verdict == "refused")
        if check.advice and check.verdict != "ok":
            click.echo(f"{'':8}  {check.advice}", err=check.verdict == "refused")


async def _drive(
    connect: str, name: str, destination: str, options: NativeOptions, choices: dict[str, Any]
) -> Report:
    source = await Connection.open(connect)
    try:
        domain = await _find(source, name, destination)
        uuid = domain.UUIDString()
        if not (choices["resume"] or choices["watch"] or choices["watch_only"]):
            async with await Connection.open(destination) as target:
                found = await checking.check_all(
                    source, target, domain, options, **_check_options(choices)
                )
            checking.refuse(found)
            for check in found:
                if check.verdict == "hint":
                    advice = f" ({check.advice})" if check.advice else ""
                    click.echo(f"{check.name}: {check.found}{advice}", err=True)
        engine = NativeEngine(source, uuid, destination, options)
    except BaseException:
        await source.close()
        raise
    try:
        with shown() as listener:
            drive = Drive(engine, name, drive_options(choices), listener)
            drive.report.destination = destination
            with _cancelled_by_signals(drive):
                return await drive.run()
    finally:
        await engine.close()


async def _find(source: Connection, name: str, destination: str) -> Any:
    """The domain at the source, or (transient, and moved meanwhile) at the destination."""
    try:
        return await source.domain(name)
    except PostcopyError:
        if destination:
            with suppress(PostcopyError):
                async with await Connection.open(destination) as target:
                    return await target.domain(name)
        raise


@contextmanager
def _cancelled_by_signals(drive: Drive) -> Iterator[None]:
    """Ctrl-C and SIGTERM ask the driver, which knows whether that can be."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, drive.request_cancel)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
