"""An image's manifest: what is needed to know before any of its other files is read.

Written once, when an image is finished, and read first whenever one is opened.  It comes with the
image, so it is not trusted: every key, type and range is checked, and what becomes a path is a
plain file name in a known place.  Frozen data; any thread.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.page_data import SEGMENT_BYTES
from qemu_postcopy.image.records import BLOCK_BYTES_MAX, BLOCKS_MAX

#: An image is a directory with these in it.
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.bin"
RAM_DIRECTORY = "ram"
FORMAT = "qemu-postcopy-image"
#: of a directory in which a save file is served in place (``in_place.py``)
IN_PLACE_FORMAT = "qemu-postcopy-in-place"
FORMAT_VERSION = 1
MANIFEST_BYTES_MAX = 64 << 20
DEFAULT_CHUNK_BYTES = 64 << 10

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_~%-][A-Za-z0-9_~.%-]{0,199}")
_TEXT_CHARACTERS_MAX = 1 << 20


@dataclass(frozen=True)
class StateFile:
    """The migration stream without pages of lazy blocks; its magic is ``QEVL``."""

    file: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Block:
    """A lazy RAM block and where its pages are."""

    name: str
    size_bytes: int
    #: of the memory back-end: 4096, or a huge page's size
    page_size_bytes: int
    #: relative to the image: ``ram/NAME``
    file: str
    #: of the block's first byte in the file
    offset_bytes: int
    #: in 4 KiB pages that are not all zero
    data_bytes: int
    #: see ``page_data.hash_segment``; one per ``segment_bytes`` of the block
    segment_sha256: tuple[str, ...]


@dataclass(frozen=True)
class Provenance:
    """Where an image comes from."""

    #: UTC, ISO 8601
    created: str
    #: name and version of the program that made it
    tool: str
    #: what it was made from: "snapshot of PID ...", a file's path
    source: str
    guest_name: str | None = None


@dataclass(frozen=True)
class SavedFile:
    """The file that pages are read from where a save file is served in place, by fstat(2)."""

    #: of the operator's file
    path: str
    #: "clone": a private copy; "lease": the operator's file itself, by a hard link
    way: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Manifest:
    """Everything about an image but its data."""

    #: as query-version says it ("7.2.22"); None where a file was imported that does not tell
    qemu_version: str | None
    #: with its version: "pc-i440fx-7.2"
    machine: str
    #: as in the name of the QEMU binary: "x86_64"
    architecture: str
    target_page_size_bytes: int
    #: recommended unit of paging, 4 KiB to 2 MiB
    chunk_size_bytes: int
    state: StateFile
    blocks: tuple[Block, ...]
    provenance: Provenance
    #: how to launch the QEMU that takes it: opaque here; empty where unknown
    launch: Mapping[str, Any] = field(default_factory=dict)
    #: libvirt's domain XML, where the guest came from libvirt
    domain_xml: str | None = None
    #: what the guest had as disks: opaque here
    disks: tuple[Mapping[str, Any], ...] = ()
    segment_bytes: int = SEGMENT_BYTES
    #: where a save file is served in place: blocks' files say then where in it their pages lie, and
    #: have one checksum each, of the whole of that file
    saved: SavedFile | None = None

    def block(self, name: str) -> Block:
        """The lazy block of that name.

        Raises:
            ImageError: the image has none.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        raise ImageError(
            f"the image has no lazy RAM block {name}",
            hint="it has " + ", ".join(block.name for block in self.blocks),
            block=name,
        )

    def to_json(self) -> str:
        """The file's content."""
        name = FORMAT if self.saved is None else IN_PLACE_FORMAT
        document = {"format": name, "format_version": FORMAT_VERSION, **asdict(self)}
        if self.saved is None:
            del document["saved"]
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """Reads and checks a manifest.

    Raises:
        ImageError: no JSON, a newer format, or a key that is missing, unknown or wrong, by name.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{MANIFEST_FILE} is no JSON: {error}", hint=_HINT) from error
    top = _Fields(document, "")
    form = top.text("format")
    if form not in (FORMAT, IN_PLACE_FORMAT):
        top.refuse("format", f"is not {FORMAT}")
    version = top.integer("format_version", 1)
    if version != FORMAT_VERSION:
        raise ImageError(
            f"the image's format version is {version}; this program knows {FORMAT_VERSION}",
            hint="update qemu-postcopy on this host",
        )
    manifest = _parse_top(top, in_place=form == IN_PLACE_FORMAT)
    top.finish()
    _check_blocks(manifest)
    return manifest


def _parse_top(top: _Fields, *, in_place: bool) -> Manifest:
    page_size = top.power_of_two("target_page_size_bytes", 1 << 10, 1 << 16)
    segment = top.integer("segment_bytes", 1)
    if segment != SEGMENT_BYTES:
        top.refuse("segment_bytes", f"is not {SEGMENT_BYTES}")
    return Manifest(
        qemu_version=top.optional_text("qemu_version"),
        machine=top.text("machine"),
        architecture=top.name("architecture"),
        target_page_size_bytes=page_size,
        chunk_size_bytes=top.power_of_two("chunk_size_bytes", 1 << 12, 1 << 21),
        state=_parse_state(top.object("state")),
        blocks=tuple(
            _parse_block(fields, page_size, in_place=in_place)
            for fields in top.objects("blocks", BLOCKS_MAX)
        ),
        provenance=_parse_provenance(top.object("provenance")),
        launch=top.mapping("launch"),
        domain_xml=top.optional_text("domain_xml"),
        disks=tuple(dict(fields.values) for fields in top.objects("disks", 4096)),
        segment_bytes=segment,
        saved=_parse_saved(top.object("saved")) if in_place else None,
    )


def _parse_state(fields: _Fields) -> StateFile:
    state = StateFile(fields.text("file"), fields.integer("size_bytes", 1), fields.sha256("sha256"))
    if state.file != STATE_FILE:
        fields.refuse("file", f"is not {STATE_FILE}")
    fields.finish()
    return state


def _parse_saved(fields: _Fields) -> SavedFile:
    saved = SavedFile(
        fields.text("path"),
        fields.text("way"),
        fields.integer("device", 0, (1 << 64) - 1),
        fields.integer("inode", 0, (1 << 64) - 1),
        fields.integer("size_bytes", 1),
        fields.integer("mtime_ns", -(1 << 63), (1 << 64) - 1),
    )
    if saved.way not in ("clone", "lease"):
        fields.refuse("way", "is not known")
    fields.finish()
    return saved


def _parse_block(fields: _Fields, target_page_size: int, *, in_place: bool) -> Block:
    size = fields.integer("size_bytes", 1, BLOCK_BYTES_MAX)
    page_size = fields.power_of_two("page_size_bytes", 1 << 12, 1 << 34)
    if size % page_size or size % target_page_size:
        fields.refuse("size_bytes", f"is no multiple of the page size {page_size}")
    file = fields.text("file")
    directory, _, name = file.partition("/")
    if directory != RAM_DIRECTORY or not _FILE_NAME.fullmatch(name):
        fields.refuse("file", f"is not the name of a file in {RAM_DIRECTORY}/")
    offset = fields.integer("offset_bytes", 0, BLOCK_BYTES_MAX)
    if offset % page_size:
        fields.refuse("offset_bytes", f"is no multiple of the page size {page_size}")
    hashes = fields.sha256_list("segment_sha256", 1 if in_place else -(-size // SEGMENT_BYTES))
    block = Block(
        fields.text("name"),
        size,
        page_size,
        file,
        offset,
        fields.integer("data_bytes", 0, size),
        hashes,
    )
    fields.finish()
    return block


def _parse_provenance(fields: _Fields) -> Provenance:
    provenance = Provenance(
        fields.text("created"),
        fields.text("tool"),
        fields.text("source"),
        fields.optional_text("guest_name"),
    )
    fields.finish()
    return provenance


def _check_blocks(manifest: Manifest) -> None:
    names = [block.name for block in manifest.blocks]
    if len(set(names)) != len(names):
        raise ImageError(f"{MANIFEST_FILE}: a name in blocks comes twice", hint=_HINT)
    ranges = sorted(
        (b.file, b.offset_bytes, b.offset_bytes + b.size_bytes) for b in manifest.blocks
    )
    for (file, _, end), (next_file, begin, _) in itertools.pairwise(ranges):
        if file == next_file and begin < end:
            raise ImageError(f"{MANIFEST_FILE}: blocks overlap in {file}", hint=_HINT)


_HINT = "the manifest was damaged or altered; take a new snapshot, or copy the image again"


class _Fields:
    """Typed access to one JSON object; every refusal names the key by its path."""

    def __init__(self, values: object, path: str) -> None:
        if not isinstance(values, dict):
            raise ImageError(
                f"{MANIFEST_FILE}: {path.rstrip('.') or 'the whole'} is no object", hint=_HINT
            )
        self.values: dict[str, Any] = values
        self._path = path
        self._left = set(values)

    def refuse(self, key: str, why: str) -> NoReturn:
        raise ImageError(f"{MANIFEST_FILE}: {self._path}{key} {why}", hint=_HINT)

    def finish(self) -> None:
        """Nothing may be left that nobody asked for."""
        if self._left:
            self.refuse(min(self._left), "is not a known key")

    def _take(self, key: str) -> Any:
        if key not in self.values:
            self.refuse(key, "is missing")
        self._left.discard(key)
        return self.values[key]

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not 0 < len(value) <= _TEXT_CHARACTERS_MAX:
            self.refuse(key, "is no text")
        if "\0" in value:
            self.refuse(key, "has a NUL character")
        return value

    def name(self, key: str) -> str:
        value = self.text(key)
        if not re.fullmatch(r"[A-Za-z0-9_]{1,32}", value):
            self.refuse(key, "is no plain name")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if key in self.values and self._take(key) is None else self.text(key)

    def integer(self, key: str, least: int, most: int = 1 << 62) -> int:
        value = self._take(key)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"is no number from {least} to {most}")
        return value

    def power_of_two(self, key: str, least: int, most: int) -> int:
        value = self.integer(key, least, most)
        if value & (value - 1):
            self.refuse(key, "is no power of two")
        return value

    def sha256(self, key: str) -> str:
        value = self.text(key)
        if not _SHA256.fullmatch(value):
            self.refuse(key, "is no SHA-256 in hexadecimal digits")
        return value

    def sha256_list(self, key: str, length: int) -> tuple[str, ...]:
        value = self._take(key)
        if (
            not isinstance(value, list)
            or len(value) != length
            or not all(isinstance(item, str) and _SHA256.fullmatch(item) for item in value)
        ):
            self.refuse(key, f"is no list of {length} SHA-256")
        return tuple(value)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._take(key)
        if not isinstance(value, dict):
            self.refuse(key, "is no object")
        return value

    def object(self, key: str) -> _Fields:
        return _Fields(self._take(key), f"{self._path}{key}.")

    def objects(self, key: str, most: int) -> list[_Fields]:
        value = self._take(key)
        if not isinstance(value, list) or len(value) > most:
            self.refuse(key, f"is no list of at most {most}")
        return [_Fields(item, f"{self._path}{key}[{i}].") for i, item in enumerate(value)]
