"""The command line: ``qemu-postcopy COMMAND``.

Only arguments are understood here; each command imports what it needs when it runs, because the
time from the command to the guest's first instruction is what users wait for.  Results go to
stdout, logs and progress to stderr; the exit status is that of the exception (errors.py).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from qemu_postcopy import __version__
from qemu_postcopy.errors import (
    LeftRunningError,
    OperationCancelledError,
    PostcopyError,
    UsageError,
)

#: Commands that live with what they command: name -> (module, attribute, one line of help).
ELSEWHERE = {
    "doctor": ("qemu_postcopy.doctor.commands", "doctor_command", "What this host can do."),
    "image": ("qemu_postcopy.image.commands", "image_commands", "Look into and convert images."),
    "libvirt": (
        "qemu_postcopy.libvirt.group",
        "libvirt_commands",
        "Settings and hooks of libvirt.",
    ),
    "bench": ("qemu_postcopy.bench.commands", "bench_commands", "Measure this host."),
    "images": ("qemu_postcopy.images.commands", "images_commands", "Build test guests."),
    "serve": ("qemu_postcopy.serve", "serve_command", "Serve a VMM's own userfaultfd."),
    "metrics": ("qemu_postcopy.metrics", "metrics_command", "Export figures to Prometheus."),
    "top": ("qemu_postcopy.top.commands", "top_command", "Watch all guests on one screen."),
    "report": ("qemu_postcopy.report.commands", "report_command", "Show a trace as an HTML page."),
    "migrate": ("qemu_postcopy.migrate.commands", "migrate_command", "Move a domain, driven."),
    "demo": ("qemu_postcopy.demo", "demo_command", "Snapshot and resume a real guest, verified."),
}


class LazyGroup(click.Group):
    """Loads a command's module when it is used, or its help is shown; not to list it."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*self.commands, *ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in ELSEWHERE:
            module, attribute, _ = ELSEWHERE[name]
            command: click.Command = getattr(import_module(module), attribute)
            return command
        return super().get_command(context, name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        rows = {name: command.get_short_help_str(70) for name, command in self.commands.items()}
        rows.update({name: entry[2] for name, entry in ELSEWHERE.items()})
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))


def parse_size(text: str) -> int:
    """Bytes of 65536, 64K, 64KiB, 2M, 1G.

    Raises:
        ValueError: it is none of these.
    """
    number = text.strip().upper().removesuffix("IB").removesuffix("B")
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(number[-1:], 0)
    digits = number[:-1] if shift else number
    if not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{text!r} is not a size; examples: 65536, 64K, 2MiB")
    return int(digits) << shift


def size(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """Callback of an option that takes bytes."""
    if value is None:
        return None
    try:
        return parse_size(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from error


class JsonLog(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="qemu-postcopy")
@click.option("-v", "--verbose", count=True, help="Log more; twice: everything.")
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
def commands(verbose: int, log_json: bool) -> None:
    """Resume QEMU/KVM guests at once, their memory paged in on demand.

    \b
    Examples:
      qemu-postcopy doctor                        what this host can do
      qemu-postcopy demo                          see it work on a real guest
      qemu-postcopy snapshot /run/vm.qmp vm.qpc   save a running guest
      qemu-postcopy restore vm.qpc                resume it, in a fraction of a second
      qemu-postcopy status                        what is being served

    Shell completion: eval "$(_QEMU_POSTCOPY_COMPLETE=bash_source qemu-postcopy)"
    """
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonLog() if log_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    )
    level = [logging.WARNING, logging.INFO, logging.DEBUG][min(verbose, 2)]
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("qemu_postcopy").setLevel(level)


def _show(result: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(result, indent=2) if as_json else text)


@commands.command()
@click.argument("qmp", metavar="QMP|DOMAIN")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--connect", metavar="URI", help="Of the libvirt that runs DOMAIN.")
@click.option(
    "--then",
    type=click.Choice(["as-before", "run", "stop", "quit"]),
    default="as-before",
    show_default=True,
    help="What the guest does afterwards.",
)
@click.option(
    "--max-downtime",
    type=click.IntRange(1, 2_000_000),
    metavar="MS",
    help="Copy while the guest runs until stopping it takes no longer than this. A guest that "
    "writes faster than the disk never gets there: interrupt, and it runs on unharmed.",
)
@click.option(
    "--accept-lost-writes",
    is_flag=True,
    help="With --max-downtime: also under TCG in a QEMU older than 9.0, which loses writes then.",
)
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
def snapshot(
    qmp: str,
    image: Path,
    connect: str | None,
    then: str,
    max_downtime: int | None,
    accept_lost_writes: bool,
    as_json: bool,
) -> None:
    """Save a running guest into the directory IMAGE.

    QMP is the guest's monitor socket; with --connect it is a domain's name or UUID.

    The guest stops while its memory is written and then goes on as before (a paused one stays
    stopped, in QEMU's state `postmigrate`). Interrupting (Ctrl-C) leaves no image and the guest
    running. Disks are not part of an image: keep them as they were
    at that moment.

    \b
    Examples:
      qemu-postcopy snapshot /run/vm.qmp vm.qpc
      qemu-postcopy snapshot --max-downtime 300 /run/vm.qmp vm.qpc
      qemu-postcopy snapshot --then quit /run/vm.qmp vm.qpc
      qemu-postcopy snapshot --connect qemu:///system --then quit web web.qpc
    """
    import asyncio

    from qemu_postcopy.progress import byte_progress
    from qemu_postcopy.snapshot import SnapshotOptions
    from qemu_postcopy.snapshot import snapshot as take

    options = SnapshotOptions(
        qmp=qmp,
        image=image,
        then=then,
        max_downtime_ms=max_downtime,
        connect=connect,
        accept_lost_writes=accept_lost_writes,
    )
    with byte_progress("saving") as progress:
        result = asyncio.run(take(options, progress))
    _show(
        result.as_json(),
        as_json,
        f"{image}: {result.ram_bytes >> 20} MiB of RAM, {result.data_bytes >> 20} MiB of data; "
        f"the guest stood still for {result.downtime_ms} ms",
    )


SERVING_OPTIONS = [
    click.option("--name", help="The guest's name; default: the image's."),
    click.option(
        "--chunk", callback=size, metavar="SIZE", help="Bytes filled around a fault, 4K to 2M."
    ),
    click.option(
        "--background/--no-background",
        default=True,
        show_default=True,
        help="Fill what nobody asks for while the guest runs, then detach.",
    ),
    click.option(
        "--rate",
        callback=size,
        default="0",
        metavar="SIZE",
        help="Limit of that, bytes per second; 0: none.",
    ),
    click.option(
        "--working-set/--no-working-set",
        default=True,
        show_default=True,
        help="Fill ahead what guests of this image wanted first, as noted at its first restore.",
    ),
    click.option("--paused", is_flag=True, help="Leave the guest stopped (`cont` lets it run)."),
    click.option("--verify", is_flag=True, help="Check the whole image first (reads all of it)."),
    click.option(
        "--wait",
        type=click.Choice(["running", "complete"]),
        default="running",
        show_default=True,
        help="Return when the guest runs, or when it has all of its memory.",
    ),
    click.option("--foreground", is_flag=True, help="Serve in this process; return when complete."),
    click.option(
        "--trace",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Record every fault, up to a million, in this new file.",
    ),
    click.option(
        "--supervise",
        is_flag=True,
        help="Start a second process that has another sidecar take over if this one dies.",
    ),
    click.option(
        "--chaos",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Let page data fail as this schedule says (TOML or JSON), to see that all holds.",
    ),
    click.option("--allow-newer-qemu", is_flag=True, help="Accept a QEMU newer than the image's."),
    click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout."),
]


def serving_options(function: Any) -> Any:
    """The options that restore and attach share."""
    for option in reversed(SERVING_OPTIONS):
        function = option(function)
    return function


@commands.command(context_settings={"ignore_unknown_options": False})
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("--qemu", help="QEMU binary, instead of the one that made the image.")
@click.option("--qemu-arg", multiple=True, metavar="ARG", help="One more argument for QEMU.")
@click.option(
    "--attach-by",
    type=click.Choice(["auto", "ptrace", "preload"]),
    default="auto",
    show_default=True,
    help="How QEMU's memory is got at: by tracing it for a moment, or by a library that it loads, "
    "for hosts that allow no tracing; auto: the first of these that is allowed.",
)
@click.option(
    "--connect",
    metavar="URI",
    help="Have libvirt restore it: IMAGE is what virsh save or snapshot --connect wrote.",
)
@click.option("--xml", type=click.File(), help="Domain XML instead of the saved one (--connect).")
@click.option("--running", is_flag=True, help="Let it run even if it was saved paused (--connect).")
@click.option("--reset-nvram", is_flag=True, help="Make its NVRAM anew (--connect).")
@click.option("--bypass-cache", is_flag=True, help="Keep the file out of the page cache.")
@click.option(
    "--keep-image",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep what a save file is converted to, for further restores (--connect).",
)
@click.option(
    "--in-place/--no-in-place",
    default=None,
    help="Read pages from the save file itself, whoever writes to it waiting until all are read; "
    "or convert it first. Default: read from a private copy that shares its data, where the file "
    "system can make one, else convert (--connect).",
)
@serving_options
def restore(
    image: Path,
    command: tuple[str, ...],
    qemu: str | None,
    qemu_arg: tuple[str, ...],
    attach_by: str,
    connect: str | None,
    xml: Any,
    running: bool,
    reset_nvram: bool,
    bypass_cache: bool,
    keep_image: Path | None,
    in_place: bool | None,
    **rest: Any,
) -> None:
    """Resume the guest in IMAGE: it runs at once, its memory follows.

    QEMU is started with the command line recorded in the image, or with COMMAND (given after --,
    without monitor and -incoming). A sidecar process serves the memory and goes when all of it is
    there; until then, leave it alone.

    Ctrl-C: before there is a guest nothing is left of it (exit status 130), later the guest runs on
    and is served (16). 13: QEMU ended before it had all of its memory.

    \b
    Examples:
      qemu-postcopy restore vm.qpc
      qemu-postcopy restore --wait complete --rate 200M vm.qpc
      qemu-postcopy restore --name two vm.qpc
      qemu-postcopy restore --attach-by preload vm.qpc
      qemu-postcopy restore vm.qpc -- qemu-system-x86_64 -m 4G -machine pc ...
      qemu-postcopy restore --connect qemu:///system vm.save
      qemu-postcopy restore --connect qemu:///system --in-place vm.save
    """
    if connect is not None:
        from qemu_postcopy.libvirt.commands import restore_by_libvirt

        if command or qemu or qemu_arg:
            raise UsageError("libvirt starts QEMU itself", hint="change its XML instead: --xml")
        if attach_by == "preload":
            raise UsageError(
                "--attach-by preload is for a QEMU of our own, and libvirt starts this one",
                hint="leave it out",
            )
        restore_by_libvirt(
            connect,
            image,
            xml=xml.read() if xml else None,
            running=running,
            reset_nvram=reset_nvram,
            bypass_cache=bypass_cache,
            keep_image=keep_image,
            in_place=in_place,
            rest=rest,
        )
        return
    if xml or running or reset_nvram or keep_image or bypass_cache or in_place is not None:
        raise UsageError(
            "--xml, --running, --reset-nvram, --keep-image, --bypass-cache and --in-place are for "
            "libvirt",
            hint="say --connect URI too",
        )
    target = {"qemu": qemu, "command": command, "extra_arguments": qemu_arg}
    _serve(image, target, rest, attach_by)


@commands.command()
@click.argument("qmp", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@serving_options
def attach(qmp: Path, image: Path, **rest: Any) -> None:
    """Resume IMAGE in a QEMU that waits for it.

    Somebody else has started it with -incoming defer -S. QMP is its monitor socket. Nothing else
    may be connected to it meanwhile.

    \b
    Example:
      qemu-system-x86_64 ... -incoming defer -S -qmp unix:/run/vm.qmp,server=on,wait=off &
      qemu-postcopy attach /run/vm.qmp vm.qpc
    """
    _serve(image, {"qmp": qmp}, rest)


def session_options(rest: dict[str, Any], attach_by: Any = "ptrace") -> Any:
    """The SessionOptions that :func:`serving_options` have brought."""
    from qemu_postcopy.session import SessionOptions

    schedule = None
    if rest["chaos"] is not None:
        from qemu_postcopy.paging.chaos import ChaosSchedule

        schedule = ChaosSchedule.load(rest["chaos"])
    if rest["trace"] is not None and rest["trace"].exists():
        raise UsageError(f"{rest['trace']} exists", hint="give the trace another name")
    return SessionOptions(
        chunk_size=rest["chunk"],
        background=rest["background"],
        paused=rest["paused"],
        background_rate=rest["rate"],
        working_set=rest["working_set"],
        allow_newer_qemu=rest["allow_newer_qemu"],
        chaos=schedule,
        trace=rest["trace"],
        attach_by=attach_by,
    )


def _serve(
    image: Path, target: dict[str, Any], rest: dict[str, Any], attach_by: Any = "ptrace"
) -> None:
    from qemu_postcopy.restore import RestoreOptions
    from qemu_postcopy.sidecar import process
    from qemu_postcopy.sidecar.rundir import RunDirectory

    options = RestoreOptions(
        image=image,
        name=rest["name"],
        paused=rest["paused"],
        verify=rest["verify"],
        session=session_options(rest, attach_by),
        **target,
    )
    run = RunDirectory.create(options.run_name())
    start_sidecar(process.restoring(options, run), run, rest, f"monitor {run.qmp_socket}")


def start_sidecar(job: Any, run: Any, rest: dict[str, Any], reached_by: str) -> None:
    """Starts a job's sidecar, or does the job here, and tells how it went.

    Args:
        reached_by: how operators reach the guest, in words.

    Raises:
        OperationCancelledError, LeftRunningError: Ctrl-C; without and with a guest.
        GuestEndedError: the guest ended before it had all of its memory.
        PostcopyError: there is no guest, or one that is served on in spite of this.
    """
    from qemu_postcopy.sidecar import process

    if rest["foreground"]:
        if rest["supervise"]:
            from qemu_postcopy.sidecar import supervisor

            supervisor.start(run)
        status = process.serve(job, sys.stderr)
        run.discard_unused()
        sys.exit(status)
    sidecar: process.Sidecar | None = None
    reached: dict[str, float] = {}
    try:
        with process.interrupts_held():
            sidecar = process.spawn(job, run)
        if rest["supervise"]:
            from qemu_postcopy.sidecar import supervisor

            supervisor.start(run)
        _wait_and_tell(sidecar, run, rest, reached, reached_by)
    except KeyboardInterrupt:
        if sidecar is None:
            run.discard_unused()
            raise
        if "loaded" in reached:
            words = f"{run.name} runs on; PID {sidecar.pid} serves it while memory is missing"
            raise sidecar.left(words) from None
        try:
            sidecar.interrupt(run)
        except OperationCancelledError:
            run.discard_unused()
            raise
    except PostcopyError:
        run.discard_unused()
        raise


def _wait_and_tell(
    sidecar: Any, run: Any, rest: dict[str, Any], reached: dict[str, float], reached_by: str
) -> None:
    """Until what is waited for has come; notes in ``reached`` what comes before."""
    last: dict[str, Any] = {}
    goal = "end" if rest["wait"] == "complete" else "loaded" if rest["paused"] else "running"
    for event in sidecar.events():
        last = event
        if event["event"] == "state":
            reached[event["state"]] = event["elapsed"]
            if goal in reached:
                break
    record = run.read_record(missing_ok=True)
    result = {
        "name": run.name,
        "run_directory": str(run.path),
        "qmp": str(run.qmp_socket),
        "pid": record.pid if record else 0,
        "sidecar_pid": sidecar.pid,
        "attached_by": record.attached_by if record else "",
        "launched_ns": record.launched_ns if record else 0,
        "seconds": reached,
        "statistics": last.get("statistics", {}),
        "vcpus": record.vcpus if record and goal == "end" else {},
    }
    if goal == "end":
        text = f"{run.name} has all of its memory (PID {result['pid']})"
        if result["vcpus"]:
            from qemu_postcopy.status import async_words

            text += f"; {async_words(result['vcpus'])}"
    else:
        text = (
            f"{run.name} {'is loaded' if rest['paused'] else 'runs'} after "
            f"{reached[goal] * 1000:.0f} ms (PID {result['pid']}, {reached_by})"
        )
    _show(result, rest["as_json"], text)


@commands.command()
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option(
    "--all", "everyone", is_flag=True, help="Every guest of yours that waits for a sidecar."
)
@click.option("--foreground", is_flag=True, help="Serve in this process; return when complete.")
@click.option(
    "--supervise",
    is_flag=True,
    help="Start a second process that has another sidecar take over if the new one dies.",
)
@click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")
def recover(
    names: tuple[str, ...], everyone: bool, foreground: bool, supervise: bool, as_json: bool
) -> None:
    """Serve guests on whose sidecar has died.

    `status` shows such a guest as `waiting`: it stands still at the next page that is missing, and
    loses nothing. A new sidecar goes on from what is in the guest's run directory and in QEMU, with
    the options of the old one, but for --chaos. Works for restore, attach and serve. If it fails
    the guest waits on: mend what the error says, and try again.

    Exit status 10: a sidecar lives, or none is needed; or the restore had not come so far as a
    guest, and is to be begun anew (its QEMU was ended; one of somebody else is left as it was
    found). 13: QEMU has ended. 16: interrupted, the new sidecar goes on.

    \b
    Examples:
      qemu-postcopy recover vm
      qemu-postcopy recover --all
    """
    from qemu_postcopy.recover import needs_sidecar
    from qemu_postcopy.sidecar import process, supervisor
    from qemu_postcopy.sidecar.rundir import RunDirectory, list_directories

    if bool(names) == everyone:
        raise UsageError("name the guests, or give --all", hint="see: qemu-postcopy status")
    runs = [RunDirectory.find(name) for name in names]
    failed: PostcopyError | None = None
    for run in list_directories() if everyone else []:
        try:
            record = run.read_record()
        except PostcopyError as error:  # its damage is no reason to let the others wait
            click.echo(f"{run.name}: {error.message}", err=True)
            failed = error
            continue
        if record is not None and needs_sidecar(run, record) and not run.is_served():
            runs.append(run)
    if foreground:
        if len(runs) != 1:
            raise UsageError("--foreground serves one guest", hint="name it")
        if supervise:
            supervisor.start(runs[0])
        sys.exit(process.serve(process.recovering(runs[0]), sys.stderr))
    results = []
    for run in runs:
        try:
            results.append(_taken_over(run, supervise))
        except PostcopyError as error:
            if isinstance(error, LeftRunningError):
                raise
            click.echo(f"{run.name}: {error.message}", err=True)
            failed = error
    lines = [
        f"{result['name']} is served again, by PID {result['sidecar_pid']}" for result in results
    ]
    _show(results, as_json, "\n".join(lines) or "no guest waits for a sidecar")
    if failed is not None:
        raise failed


def _taken_over(run: Any, supervised: bool) -> dict[str, Any]:
    """Returns when another sidecar serves it, with what `recover --json` says of that.

    Raises:
        LeftRunningError: Ctrl-C; that sidecar goes on.
    """
    from qemu_postcopy.sidecar import process, supervisor

    began = time.monotonic()
    served = 0.0
    sidecar: process.Sidecar | None = None
    try:
        with process.interrupts_held():
            sidecar = process.spawn(process.recovering(run), run)
        for event in sidecar.events():
            if event.get("state") == "serving":
                served = time.monotonic() - began
            if event.get("state") == "running":
                break
        if supervised:
            supervisor.start(run)
    except KeyboardInterrupt:
        if sidecar is None:
            raise
        raise sidecar.left(f"{run.name} is taken over by PID {sidecar.pid}") from None
    return {"name": run.name, "sidecar_pid": sidecar.pid, "seconds": {"serving": served}}


@commands.command()
@click.argument("name")
def supervise(name: str) -> None:
    """Watch over the sidecar of the guest NAME until the guest needs none.

    Whenever the sidecar dies, another takes over, as by `recover`. Where that fails it is tried
    again after 0.1 s to 30 s, and `status` says why. Stays in the foreground; returns when the
    guest has all of its memory, or has ended. To stop it (Ctrl-C: exit status 16) harms
    nobody: the sidecar serves on.

    `restore --supervise` starts the same in the background. For systemd there is a unit:
    share/qemu-postcopy/qemu-postcopy-supervise@.service where the package is installed. It says how
    to write the path of a program into it that is neither in /usr/bin nor in /usr/local/bin.

    \b
    Examples:
      qemu-postcopy supervise vm
      systemctl start qemu-postcopy-supervise@vm
    """
    from qemu_postcopy.sidecar import supervisor
    from qemu_postcopy.sidecar.rundir import RunDirectory

    run = RunDirectory.find(name)
    try:
        supervisor.supervise(run, lambda text: click.echo(text, err=True))
    except KeyboardInterrupt:
        raise LeftRunningError(
            f"interrupted: nobody watches over the sidecar of {run.name} any more",
            hint="it serves on; see: qemu-postcopy status",
        ) from None


@commands.command()
@click.argument("name", required=False)
@click.option("--watch", is_flag=True, help="Go on until interrupted.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def status(name: str | None, watch: bool, as_json: bool) -> None:
    """What is served, how far it is, and what waits.

    \b
    Examples:
      qemu-postcopy status
      qemu-postcopy status --watch vm
      qemu-postcopy status --json | jq '.[].statistics.pages_data_missing'
    """
    from qemu_postcopy import status as module

    if watch and not as_json:
        module.watch(name)
    else:
        guests = module.collect(name)
        if as_json:
            click.echo(json.dumps(guests, indent=2))
        else:
            module.show(guests)


@commands.command("list")
@click.option("--prune", is_flag=True, help="Remove your stale run directories first.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout.")
def list_command(prune: bool, as_json: bool) -> None:
    """All guests of this host that are served, or have been.

    Root sees those of every user. The name is the domain's, as libvirt or QEMU's command line has
    it, with that of the run directory behind it (which `status`, `fill` and `recover` take) where
    it differs. `stale`: the guest has ended, or never came to be; only its run directory is left,
    for its log. The next restore of that name replaces it.

    \b
    Examples:
      qemu-postcopy list
      qemu-postcopy list --json | jq '.[] | select(.uuid != "") | .domain, .filled'
      qemu-postcopy list --prune
    """
    from qemu_postcopy import listing

    removed = listing.prune() if prune else []
    entries = listing.collect()
    if as_json:
        click.echo(json.dumps(entries, indent=2))
        return
    if removed:
        click.echo(f"removed: {', '.join(removed)}", err=True)
    listing.show(entries)


@commands.command()
@click.argument("name")
@click.option(
    "--rate", callback=size, default="0", metavar="SIZE", help="Bytes per second; 0: no limit."
)
@click.option("--off", is_flag=True, help="Fill on demand only.")
def fill(name: str, rate: int, off: bool) -> None:
    """Change how the guest NAME is filled in the background.

    \b
    Examples:
      qemu-postcopy fill vm --rate 100M
      qemu-postcopy fill vm --off
    """
    from qemu_postcopy.sidecar.control import ask
    from qemu_postcopy.sidecar.rundir import RunDirectory

    ask(RunDirectory.find(name).control_socket, "background", enabled=not off, rate=rate)


@commands.command()
@click.argument("name")
@click.option("--off", "what", flag_value="off", help="No more failures from now on.")
@click.option("--on", "what", flag_value="on", help="Failures again, as the schedule goes on.")
@click.option(
    "--release", "what", flag_value="release", help="Let the reads go on that stall `until told`."
)
def chaos(name: str, what: str | None) -> None:
    """Steer the failures of a guest that was restored or attached with --chaos FILE.

    What FILE may say is in the manual page, section CHAOS; what was done so far, in `status`.

    \b
    Examples:
      qemu-postcopy restore --chaos chaos.toml vm.qpc
      qemu-postcopy chaos vm --release
      qemu-postcopy chaos vm --off
    """
    from qemu_postcopy.sidecar.control import ask
    from qemu_postcopy.sidecar.rundir import RunDirectory

    if what is None:
        raise click.UsageError("say --off, --on or --release")
    enabled = {"on": True, "off": False}.get(what)
    ask(RunDirectory.find(name).control_socket, "chaos", enabled=enabled)


def _open_standard_streams() -> None:
    """Whoever has closed some of them (cron, a daemon) would have them be what is opened next: the
    lock of a run directory, or a socket of QEMU's."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def main() -> None:
    """Entry point: runs the command, turns our exceptions into a message and an exit status."""
    _open_standard_streams()
    try:
        commands.main(standalone_mode=False)
    except PostcopyError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"  {error.hint}", err=True)
        sys.exit(error.exit_code)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
