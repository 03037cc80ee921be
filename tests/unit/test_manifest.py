"""The manifest: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_postcopy.errors import ImageError
from qemu_postcopy.image.manifest import Block, Manifest, Provenance, StateFile, parse_manifest

HASH = "0" * 64
MANIFEST = Manifest(
    qemu_version="7.2.22",
    machine="pc-i440fx-7.2",
    architecture="x86_64",
    target_page_size_bytes=4096,
    chunk_size_bytes=65536,
    state=StateFile("state.bin", 1000, HASH),
    blocks=(
        Block("m0", 65 << 20, 4096, "ram/m0", 0, 4096, (HASH, HASH)),
        Block("/objects/m1", 2 << 20, 2 << 20, "ram/%2Fobjects%2Fm1", 0, 0, (HASH,)),
    ),
    provenance=Provenance("2026-01-01T00:00:00+00:00", "qemu-postcopy 0", "PID 1", "web"),
    launch={"argv": ["qemu-system-x86_64", "-name", "ü"], "backends": [{"id": "m0"}]},
    domain_xml="<domain/>",
    disks=({"device": "virtio0", "filename": "/disk"},),
)


def document() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(MANIFEST.to_json())
    return parsed


def test_manifest_is_read_back_as_written() -> None:
    assert parse_manifest(MANIFEST.to_json()) == MANIFEST


def test_newer_format_says_what_to_do() -> None:
    newer = document() | {"format_version": 2, "unknown": 1}
    with pytest.raises(ImageError, match="version is 2") as caught:
        parse_manifest(json.dumps(newer))
    assert "update" in caught.value.hint


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key whose value this program gives a meaning to."""
    found = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        here = (*path, key)
        if isinstance(key, str):
            found.append(here)
        opaque = here[0] in ("launch", "disks")
        if isinstance(inner, dict | list) and not opaque:
            found += paths(inner, here)
    return found


def at(parsed: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        parsed = parsed[key]
    return parsed


@pytest.mark.parametrize("path", paths(document()), ids=lambda path: ".".join(map(str, path)))
def test_missing_or_mistyped_key_is_named(path: tuple[Any, ...]) -> None:
    key = str(path[-1])
    missing = document()
    del at(missing, path[:-1])[key]
    with pytest.raises(ImageError, match=rf"{key} is missing"):
        parse_manifest(json.dumps(missing))
    wrong_values: tuple[Any, ...] = (True, 1.5, [[]], {"a": 1}, -1, "")
    for wrong in wrong_values:
        if wrong == {"a": 1} and key == "launch":
            continue
        changed = document()
        at(changed, path[:-1])[key] = wrong
        with pytest.raises(ImageError, match=key):
            parse_manifest(json.dumps(changed))


@pytest.mark.parametrize("path", [(), ("state",), ("blocks", 0), ("provenance",)])
def test_unknown_key_is_named(path: tuple[Any, ...]) -> None:
    changed = document()
    at(changed, path)["surplus"] = 1
    with pytest.raises(ImageError, match="surplus is not a known key"):
        parse_manifest(json.dumps(changed))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format",), "other", "format"),
        (("architecture",), "../x", "architecture"),
        (("target_page_size_bytes",), 5000, "power of two"),
        (("chunk_size_bytes",), 1 << 22, "chunk_size_bytes"),
        (("segment_bytes",), 4096, "segment_bytes"),
        (("state", "file"), "/etc/passwd", "state.file"),
        (("state", "sha256"), "0" * 63, "sha256"),
        (("state", "sha256"), "G" * 64, "sha256"),
        (("blocks", 0, "file"), "../m0", r"blocks\[0\].file"),
        (("blocks", 0, "file"), "ram/../state.bin", "file"),
        (("blocks", 0, "file"), "ram/..", "file"),
        (("blocks", 0, "file"), "ram/", "file"),
        (("blocks", 0, "file"), "/ram/m0", "file"),
        (("blocks", 0, "file"), "ram/a/b", "file"),
        (("blocks", 0, "file"), "ram/m0\n", "file"),
        (("blocks", 0, "name"), "a\0b", "NUL"),
        (("blocks", 0, "size_bytes"), 1 << 60, "size_bytes"),
        (("blocks", 0, "size_bytes"), 4097, "multiple"),
        (("blocks", 1, "page_size_bytes"), 3 << 20, "power of two"),
        (("blocks", 1, "offset_bytes"), 4096, "multiple"),
        (("blocks", 0, "data_bytes"), 1 << 40, "data_bytes"),
        (("blocks", 0, "segment_sha256"), [HASH], "2 SHA-256"),
        (("blocks", 1, "name"), "m0", "twice"),
        (("blocks", 1, "file"), "ram/m0", "overlap"),
        (("blocks",), [{}] * 5000, "at most 4096"),
        (("launch",), [], "launch"),
    ],
)
def test_value_that_makes_no_sense_is_named(path: tuple[Any, ...], value: Any, words: str) -> None:
    changed = copy.deepcopy(document())
    at(changed, path[:-1])[path[-1]] = value
    with pytest.raises(ImageError, match=words) as caught:
        parse_manifest(json.dumps(changed))
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '"a"', "\x00", b"\xff\xfe"])
def test_file_that_is_no_manifest_is_refused(text: str | bytes) -> None:
    with pytest.raises(ImageError):
        parse_manifest(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=10,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(paths(document())), json_values)
def test_any_value_anywhere_is_accepted_or_refused_in_our_words(
    path: tuple[Any, ...], value: Any
) -> None:
    changed = document()
    at(changed, path[:-1])[path[-1]] = value
    try:
        parse_manifest(json.dumps(changed))
    except ImageError as error:
        assert error.hint
