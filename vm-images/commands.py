"""The image commands: ``build``, ``check``, ``qemu``, ``libvirt``.

Results go to stdout, progress to stderr.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

_CACHE = click.option(
    "--cache",
    "cache_dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Cache directory.  [default: $XDG_CACHE_HOME/qemu-postcopy/images]",
)
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def _progress(line: str) -> None:
    click.echo(line, err=True)


def _show(result: dict[str, object], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            click.echo(f"{name}: {value}")


@click.group("images")
def images_commands() -> None:
    """Test guests, and other QEMU versions to run them on."""


@images_commands.command("build")
@_CACHE
@_JSON
def build_command(cache_dir: Path | None, as_json: bool) -> None:
    """Build the test guest, or find it in the cache.

    \b
    Example:
      qemu-postcopy images build
    """
    from qemu_postcopy.images.builder import build

    image = build(cache_dir, _progress)
    packages = {name: f"{used.version} {used.sha256}" for name, used in image.packages.items()}
    result: dict[str, object] = {
        "kernel": str(image.kernel),
        "initramfs": str(image.initramfs),
        "compiler": image.compiler,
        "digest": image.digest,
        "example": image.kernel_command_line("check", fill_mib=512, zero_percent=10),
    }
    _show(result | ({"packages": packages} if as_json else packages), as_json)


@images_commands.command("check")
@_CACHE
@_JSON
def check_command(cache_dir: Path | None, as_json: bool) -> None:
    """Build the test guest twice and compare the bytes.  Exit status 1 if they differ.

    \b
    Example:
      qemu-postcopy images check
    """
    from qemu_postcopy.images.builder import check

    report = check(cache_dir, _progress)
    _show(
        {
            "reproducible": report.reproducible,
            "digest": report.digest,
            "differing_files": list(report.differing_files),
        },
        as_json,
    )
    if not report.reproducible:
        raise click.exceptions.Exit(1)


@images_commands.command("qemu")
@click.option("--suite", default="bookworm-backports", show_default=True, help="Debian suite.")
@_CACHE
@_JSON
def qemu_command(suite: str, cache_dir: Path | None, as_json: bool) -> None:
    """Unpack the QEMU of another suite beside the host's own.

    \b
    Example:
      qemu-postcopy images qemu --suite bookworm-backports
    """
    from qemu_postcopy.images.qemu_versions import fetch_qemu

    install = fetch_qemu(suite, cache_dir, _progress)
    _show(
        {
            "binary": str(install.binary),
            "version": install.version,
            "real_binary": str(install.real_binary),
            "data_dir": str(install.data_dir),
            "environment": dict(install.environment),
        },
        as_json,
    )


@images_commands.command("libvirt")
@click.option("--suite", default="bookworm-backports", show_default=True, help="Debian suite.")
@_CACHE
@_JSON
def libvirt_command(suite: str, cache_dir: Path | None, as_json: bool) -> None:
    """Unpack the libvirt and the QEMU of another suite beside the host's own.

    \b
    Example:
      qemu-postcopy images libvirt --json
    """
    from qemu_postcopy.images.libvirt_versions import fetch_libvirt

    install = fetch_libvirt(suite, cache_dir, _progress)
    _show(
        {
            "prefix": str(install.prefix),
            "version": install.version,
            "overlays": [str(path) for path in install.overlays()],
            "qemu": str(install.qemu.binary),
        },
        as_json,
    )
