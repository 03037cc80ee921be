"""Lazy save files: what ``virsh restore`` takes for a save file, and only our hook can restore.

A save file's header and XML, and in the place of the stream the name of an image.  Where the hook
is installed plain virsh restores the domain from that image, lazily.  Everywhere else QEMU says
"not a migration stream" and libvirt gives up: the domain never runs on memory that is not there.
What such a file says is not trusted: the image is opened and checked like any other.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from qemu_postcopy.errors import HostError, ImageError, UsageError
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.libvirt_save import MAGIC, pack_save_head, read_save_header
from qemu_postcopy.image.records import LAZY_MAGIC
from qemu_postcopy.libvirt import domain_xml, hook_xml
from qemu_postcopy.libvirt.metadata import Settings, settings_in

#: After it a line of JSON; QEMU looks at its first four bytes.
POINTER = LAZY_MAGIC + b" image of qemu-postcopy: "
POINTER_BYTES_MAX = 65536


def write_lazy_save(image_path: Path, file: Path) -> None:
    """Writes a save file that stands for an image of a domain, which must stay where it is.

    Raises:
        ImageError: it is no image of a libvirt domain.
        UsageError: the file is there already.
        HostError: it cannot be written.
    """
    image = Image.open(image_path)
    noted = image.manifest.launch.get("libvirt")
    if image.manifest.domain_xml is None or not isinstance(noted, dict):
        raise ImageError(
            f"{image_path} is no image of a libvirt domain",
            hint="make one by: qemu-postcopy snapshot --connect URI DOMAIN IMAGE",
        )
    if file.exists():
        raise UsageError(f"{file} is there already", hint="choose another name, or remove it first")
    domain_xml.parse(image.manifest.domain_xml)
    domain = hook_xml.parse(image.manifest.domain_xml)
    hook_xml.strip_offer(domain)
    if settings_in(domain) is None:
        hook_xml.add_settings(domain, Settings())
    head = pack_save_head(
        hook_xml.serialize(domain),
        str(noted.get("cookie", "")),
        was_running=bool(noted.get("was_running", True)),
    )
    target, place = image_path.resolve(), file.resolve().parent
    name = str(target.relative_to(place)) if target.is_relative_to(place) else str(target)
    pointer = {"image": name, "key": image.manifest.state.sha256}
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.qpc-partial")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as out:
            out.write(head + POINTER + json.dumps(pointer).encode() + b"\n")
        temporary.rename(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HostError(
            f"{file} cannot be written: {error.strerror}", hint="look at the path and the room"
        ) from error


def image_behind(file: Path) -> Path | None:
    """The image that a lazy save file stands for; None for any other file.

    Raises:
        ImageError: it is damaged, or the image is another one by now.
        HostError: the file cannot be read.
    """
    try:
        with file.open("rb") as opened:
            if opened.read(len(MAGIC)) != MAGIC:
                return None
            header = read_save_header(opened.fileno())
            at = header.stream_offset_bytes
            text = os.pread(opened.fileno(), POINTER_BYTES_MAX, at)
    except OSError as error:
        raise HostError(
            f"{file} cannot be read: {error.strerror}", hint="look at the path and its permissions"
        ) from error
    if header.format != "raw" or not text.startswith(POINTER):
        return None
    try:
        pointer = json.loads(text[len(POINTER) :])
        path: Path = file.resolve().parent / str(pointer["image"])
        key = pointer["key"]
    except (ValueError, KeyError, TypeError) as error:
        raise ImageError(
            f"{file} does not say which image it stands for", hint="write it anew"
        ) from error
    if Image.open(path).manifest.state.sha256 != key:
        raise ImageError(
            f"{path} is not the image that {file} stands for any more",
            hint="write it anew by: qemu-postcopy libvirt save-file IMAGE FILE",
        )
    return path
