"""``qemu-postcopy image``: look at images and streams, check them, convert them.

The command line's face of this package; everything heavy is imported by the command that needs it.
Errors are ``PostcopyError`` and left to ``main``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from qemu_postcopy.image.image import Image
    from qemu_postcopy.image.libvirt_save import SaveHeader
    from qemu_postcopy.image.stream import StreamSummary

_JSON_HELP = "Print JSON to stdout."


@click.group("image")
def image_commands() -> None:
    """Look at images and migration streams, check them, convert them."""


@image_commands.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def inspect_command(path: Path, as_json: bool) -> None:
    """Print the structure of an image, a migration stream, a mapped-ram or a libvirt save file.

    \b
    Examples:
      qemu-postcopy image inspect ./booted
      qemu-postcopy image inspect --json /var/lib/libvirt/qemu/save/guest.save
    """
    from qemu_postcopy.image.convert import inspect_file
    from qemu_postcopy.image.image import Image

    image = Image.open(path) if path.is_dir() else None
    summary, header = inspect_file(path / image.manifest.state.file if image else path)
    if as_json:
        click.echo(json.dumps(_describe(image, summary, header), indent=2))
    else:
        _print_structure(image, summary, header)


@image_commands.command("verify")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def verify_command(image: Path, as_json: bool) -> None:
    """Read all of IMAGE and compare every checksum.

    Exits with 4 if the image is damaged, and says where.

    \b
    Example:
      qemu-postcopy image verify ./booted
    """
    from qemu_postcopy.image.image import Image

    opened = Image.open(image)
    with _ProgressBar("verifying") as (progress, task):
        opened.verify(lambda done, total: progress.update(task, completed=done, total=total))
    data = sum(block.data_bytes for block in opened.manifest.blocks)
    if as_json:
        click.echo(json.dumps({"image": str(image), "ok": True, "data_bytes": data}))
    else:
        click.echo(f"{image}: intact, {_size(data)} of page data")


@image_commands.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
@click.option("--lazy", multiple=True, metavar="BLOCK", help="RAM block to page; may be repeated.")
@click.option("--architecture", help="As in the QEMU binary's name, where SOURCE does not tell.")
@click.option("--qemu-version", help="Version of the QEMU that wrote SOURCE, such as 7.2.22.")
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def import_command(
    source: Path,
    image: Path,
    lazy: tuple[str, ...],
    architecture: str | None,
    qemu_version: str | None,
    as_json: bool,
) -> None:
    """Make IMAGE of SOURCE: a migration stream, a mapped-ram file or a libvirt save file.

    Without --lazy, RAM blocks of 16 MiB and more are paged that are no ROM, flash or video memory.

    \b
    Examples:
      qemu-postcopy image import guest.stream ./guest-image
      qemu-postcopy image import --lazy pc.ram /var/lib/libvirt/qemu/save/guest.save ./guest-image
    """
    from qemu_postcopy.image.convert import import_image

    with _ProgressBar("checksums") as (progress, task):
        made = import_image(
            source,
            image,
            lazy_block_names=lazy or None,
            architecture=architecture,
            qemu_version=qemu_version,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    blocks = {block.name: block.data_bytes for block in made.manifest.blocks}
    if as_json:
        click.echo(json.dumps({"image": str(image), "lazy_blocks": blocks}))
    else:
        for name, data in blocks.items():
            click.echo(f"{name}: {_size(data)} of page data")


@image_commands.command("export")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["plain", "mapped-ram"]),
    default="plain",
    show_default=True,
    help="plain: any QEMU; mapped-ram: QEMU 9 and newer.",
)
@click.option("--json", "as_json", is_flag=True, help=_JSON_HELP)
def export_command(image: Path, file: Path, format_name: Any, as_json: bool) -> None:
    """Write all of IMAGE to FILE, which a stock QEMU restores (eagerly) with -incoming.

    \b
    Examples:
      qemu-postcopy image export ./booted booted.stream
      qemu-system-x86_64 ... -incoming 'exec:cat booted.stream'
    """
    from qemu_postcopy.image.convert import export
    from qemu_postcopy.image.image import Image

    export(Image.open(image), file, format_name)
    size = file.stat().st_size
    if as_json:
        click.echo(json.dumps({"file": str(file), "format": format_name, "size_bytes": size}))
    else:
        click.echo(f"{file}: {_size(size)}")


class _ProgressBar:
    """A bar on stderr while it is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title

    def __enter__(self) -> tuple[Progress, TaskID]:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        return self._progress, self._progress.add_task(self._title, total=None)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _size(size_bytes: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes} bytes"


def _describe(
    image: Image | None, summary: StreamSummary, header: SaveHeader | None
) -> dict[str, Any]:
    from dataclasses import asdict

    description: dict[str, Any] = {"stream": asdict(summary)}
    if image is not None:
        description["manifest"] = json.loads(image.manifest.to_json())
    if header is not None:
        description["libvirt_save"] = asdict(header)
    return description


def _print_structure(
    image: Image | None, summary: StreamSummary, header: SaveHeader | None
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    facts = Table.grid(padding=(0, 2))
    kind = "image" if image else f"{summary.format} migration stream"
    if header is not None:
        kind = f"libvirt save file ({header.format}) with a {kind}"
    facts.add_row("kind", kind)
    facts.add_row("machine", escape(summary.machine))
    facts.add_row("target page", _size(summary.target_page_size_bytes))
    facts.add_row("capabilities", escape(", ".join(summary.capabilities)) or "none")
    if image is not None:
        manifest = image.manifest
        facts.add_row("QEMU", escape(manifest.qemu_version or "unknown"))
        facts.add_row("architecture", escape(manifest.architecture))
        facts.add_row("made", escape(f"{manifest.provenance.created}, {manifest.provenance.tool}"))
        facts.add_row("from", escape(manifest.provenance.source))
        facts.add_row("guest", escape(manifest.provenance.guest_name or "unnamed"))
    console.print(facts)

    blocks = Table(title="Memory")
    for heading in ("RAM block", "size", "page", "data", "zero", "kept as"):
        blocks.add_column(heading, overflow="fold")
    lazy = {block.name: block for block in image.manifest.blocks} if image else {}
    for block in summary.blocks:
        stored = lazy.get(block.name)
        if stored:
            page, data = _size(stored.page_size_bytes), _size(stored.data_bytes)
            zero, kept = _size(stored.size_bytes - stored.data_bytes), escape(stored.file)
        else:
            page = _size(block.page_size_bytes or summary.target_page_size_bytes)
            data = _size(block.pages_data * summary.target_page_size_bytes)
            zero = _size(block.pages_zero * summary.target_page_size_bytes)
            kept = "in the stream"
        blocks.add_row(escape(block.name), _size(block.size_bytes), page, data, zero, kept)
    console.print(blocks)

    sections = Table(title="Stream")
    for heading in ("section", "name", "id", "offset", "size", "count"):
        sections.add_column(heading, overflow="fold")
    for section in summary.sections:
        sections.add_row(
            section.kind,
            escape(section.name),
            str(section.section_id),
            str(section.offset_bytes),
            _size(section.size_bytes),
            str(section.count),
        )
    for device in summary.devices:
        sections.add_row(
            "FULL",
            escape(device.name),
            f"instance {device.instance_id}",
            str(device.offset_bytes),
            _size(device.size_bytes),
            "1",
        )
    console.print(sections)
