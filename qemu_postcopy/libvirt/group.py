"""``qemu-postcopy libvirt``: what a domain asks for, and what has plain virsh give it that.

Only arguments are understood here; each command imports what it needs when it runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from qemu_postcopy.cli import size

CONNECT = click.option(
    "--connect", "uri", default="qemu:///system", show_default=True, metavar="URI"
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Result as JSON on stdout.")


@click.group("libvirt")
def libvirt_commands() -> None:
    """Domains whose memory plain virsh pages: settings in their XML, and the hook that reads them.

    \b
    Examples:
      qemu-postcopy libvirt set web --restore lazy --supervise
      qemu-postcopy libvirt show web
    """


@libvirt_commands.command("set")
@click.argument("domain")
@CONNECT
@click.option(
    "--restore",
    type=click.Choice(["lazy", "eager"]),
    help="How virsh restore (and start, of a managed save) brings memory back.",
)
@click.option(
    "--background/--no-background",
    "fill",
    default=None,
    help="Whether memory is also filled that nobody asks for.",
)
@click.option(
    "--rate", callback=size, metavar="SIZE", help="At most so many bytes a second of that; 0: all."
)
@click.option(
    "--supervise/--no-supervise",
    default=None,
    help="Whether another sidecar takes over if one dies.",
)
@click.option(
    "--postcopy-after",
    "passes",
    type=click.IntRange(0, 1000),
    metavar="PASSES",
    help="Switch a live migration (virsh migrate --live --postcopy) after so many passes; 0: no.",
)
@AS_JSON
def set_command(
    domain: str,
    uri: str,
    restore: str | None,
    fill: bool | None,
    rate: int | None,
    supervise: bool | None,
    passes: int | None,
    as_json: bool,
) -> None:
    """Write into the XML of DOMAIN how its memory is to be paged.

    What is not named stays as it is; without any option the defaults are written. Both the running
    domain and its definition are changed; it counts for what is saved or migrated from then on,
    where `qemu-postcopy libvirt install-hooks` was done. A file that was saved before keeps what it
    says (virsh save-image-edit FILE, managedsave-edit DOMAIN).

    \b
    Examples:
      qemu-postcopy libvirt set web
      qemu-postcopy libvirt set web --rate 200M --supervise
      qemu-postcopy libvirt set --connect qemu:///session web --restore eager
    """
    import asyncio
    from dataclasses import replace

    from qemu_postcopy.libvirt.settings import change_settings

    given: dict[str, Any] = {
        "restore": restore,
        "fill": fill,
        "rate": rate,
        "supervise": supervise,
        "postcopy_passes": passes,
    }
    given = {name: value for name, value in given.items() if value is not None}
    settings = asyncio.run(change_settings(uri, domain, lambda before: replace(before, **given)))
    assert settings is not None
    click.echo(
        json.dumps(settings.as_json(), indent=2) if as_json else f"{domain}: {_say(settings)}"
    )
    _warn_of_managed_save(uri, domain)


def _warn_of_managed_save(uri: str, domain: str) -> None:
    import asyncio

    from qemu_postcopy.libvirt.settings import has_managed_save

    if asyncio.run(has_managed_save(uri, domain)):
        click.echo(
            f"warning: {domain} has a managed save, which its next start restores as it says "
            f"itself; change that too: virsh managedsave-edit {domain}",
            err=True,
        )


@libvirt_commands.command("show")
@click.argument("domain")
@CONNECT
@AS_JSON
def show_command(domain: str, uri: str, as_json: bool) -> None:
    """What the XML of DOMAIN says, of the running one and of its definition.

    \b
    Examples:
      qemu-postcopy libvirt show web
      qemu-postcopy libvirt show web --json | jq .live.restore
    """
    import asyncio

    from qemu_postcopy.libvirt.settings import read_settings

    live, config = asyncio.run(read_settings(uri, domain))
    if as_json:
        found = {"live": live, "config": config}
        click.echo(json.dumps({key: s.as_json() if s else None for key, s in found.items()}))
        return
    if live == config:
        click.echo(f"{domain}: {_say(live)}")
        return
    click.echo(f"{domain}, as it runs: {_say(live)}")
    click.echo(f"{domain}, as it is defined: {_say(config)}")


@libvirt_commands.command("unset")
@click.argument("domain")
@CONNECT
def unset_command(domain: str, uri: str) -> None:
    """Remove from the XML of DOMAIN what `set` wrote: virsh does with it as ever.

    \b
    Example:
      qemu-postcopy libvirt unset web
    """
    import asyncio

    from qemu_postcopy.libvirt.settings import change_settings

    asyncio.run(change_settings(uri, domain, lambda _: None))
    _warn_of_managed_save(uri, domain)


@libvirt_commands.command("install-hooks")
@click.option("--remove", is_flag=True, help="Take the hook away again.")
@AS_JSON
def install_hooks_command(remove: bool, as_json: bool) -> None:
    """Install the hook that has plain virsh do what a domain's settings say.

    One script in /etc/libvirt/hooks/qemu.d, beside those that are there, and the library that QEMU
    loads. Domains without settings of ours are not touched. Installing again changes nothing, or
    renews what an update of this program has changed. libvirt looks for hooks when it starts: where
    these are its first, it is to be started again (guests run on).

    \b
    Examples:
      qemu-postcopy libvirt install-hooks && systemctl restart libvirtd
      qemu-postcopy libvirt install-hooks --remove
    """
    from dataclasses import asdict

    from qemu_postcopy.libvirt import hook_install

    done = hook_install.remove() if remove else hook_install.install()
    if as_json:
        click.echo(json.dumps(asdict(done), default=str))
        return
    what = "removed" if remove else "installed"
    click.echo(f"{done.script}: {what if done.changed else f'was {what} already'}")
    if done.restart:
        click.echo("start libvirt's daemon again: systemctl restart libvirtd (or virtqemud)")


@libvirt_commands.command("save-file")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
def save_file_command(image: Path, file: Path) -> None:
    """Write FILE, from which plain `virsh restore` restores the domain in IMAGE lazily.

    IMAGE is what `snapshot --connect` made, and must stay where it is; FILE says only where. Where
    the hook of install-hooks is not there, virsh restore fails, and says "not a migration stream".

    \b
    Example:
      qemu-postcopy snapshot --connect qemu:///system --then quit web web.qpc
      qemu-postcopy libvirt save-file web.qpc web.save
      virsh restore web.save
    """
    from qemu_postcopy.libvirt.lazy_save import write_lazy_save

    write_lazy_save(image, file)
    click.echo(f"{file}: restore it by virsh restore")


@libvirt_commands.command("watch")
@click.argument("domain")
@CONNECT
@click.option(
    "--passes", type=click.IntRange(1, 1000), required=True, help="Over memory, before the switch."
)
def watch_command(domain: str, uri: str, passes: int) -> None:
    """Have live migrations of DOMAIN, whoever starts them, go on to post-copy after so many passes.

    Only those that may (virsh migrate --live --postcopy). Returns when the domain has ended or has
    moved away. The hook starts it for domains with `libvirt set --postcopy-after`.

    \b
    Example:
      qemu-postcopy libvirt watch web --passes 2
    """
    import asyncio

    from qemu_postcopy.libvirt.watch import watch_migrations

    asyncio.run(watch_migrations(uri, domain, passes))


@libvirt_commands.command("confinement")
@AS_JSON
def confinement_command(as_json: bool) -> None:
    """How QEMU is allowed under AppArmor or SELinux what paging its memory needs.

    Prints where the rules lie and the commands that put them in force, and changes nothing. No
    security driver has to be switched off, and libvirt's own sandbox needs nothing at all.

    \b
    Examples:
      qemu-postcopy libvirt confinement
      qemu-postcopy libvirt confinement --json | jq -r '.steps.selinux[]'
    """
    from qemu_postcopy.libvirt import confinement

    active, steps = confinement.in_force(), confinement.steps()
    if as_json:
        click.echo(json.dumps({"in_force": active, "steps": steps}, indent=2))
        return
    click.echo(f"in force on this host: {' and '.join(active) or 'neither AppArmor nor SELinux'}")
    for driver, commands in steps.items():
        click.echo(f"\n{driver}, as root:")
        for command in commands:
            click.echo(f"  {command}")


def _say(settings: Any) -> str:
    """In words."""
    if settings is None:
        return "nothing is set; virsh does with it as ever"
    parts = [f"{settings.restore} restores"]
    if settings.restore == "lazy":
        filled = f"at {settings.rate} bytes/s" if settings.rate else "at full speed"
        parts.append(f"filled {filled}" if settings.fill else "filled on demand only")
        parts.append("supervised" if settings.supervise else "not supervised")
    if settings.postcopy_passes:
        parts.append(f"migrations switch to post-copy after {settings.postcopy_passes} passes")
    return ", ".join(parts)
