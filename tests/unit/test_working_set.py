"""The file that remembers what guests want first: a hint that can be lost, never a danger."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qemu_postcopy.paging import prefetch
from qemu_postcopy.paging.pager import FIRST_FAULTS, PagerBlock
from qemu_postcopy.paging.prefetch import BYTES_MAX, WorkingSet

KEY = "ab" * 32
PLACES = (("m1", 8192), ("m0", 0), ("m1", 4096))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QEMU_POSTCOPY_CACHE_DIR", str(tmp_path))
    return tmp_path / "working-sets"


def block(name: str, page_size: int = 4096, length: int = 1 << 20) -> PagerBlock:
    return PagerBlock(name, 0, length, page_size, None, 0, b"")  # type: ignore[arg-type]


def test_it_comes_back_as_it_was_written(cache: Path) -> None:
    assert WorkingSet.read(KEY) is None
    WorkingSet(KEY, PLACES).write()
    assert WorkingSet.read(KEY) == WorkingSet(KEY, PLACES)
    assert [path.name for path in cache.iterdir()] == [f"{KEY}.json"]
    assert (cache / f"{KEY}.json").stat().st_mode & 0o777 == 0o600


GOOD = {"format": prefetch.FORMAT, "version": 1, "blocks": ["m0"], "pages": [[0, 0]]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({**GOOD, "version": 2}),
        json.dumps({**GOOD, "format": "other"}),
        json.dumps({**GOOD, "pages": [[1, 0]]}),
        json.dumps({**GOOD, "pages": [[0]]}),
        json.dumps({**GOOD, "pages": [[0, "x"]]}),
        json.dumps({**GOOD, "pages": 7}),
        json.dumps({**GOOD, "pages": [[0, 1e400]]}),
        json.dumps({**GOOD, "blocks": None}),
    ],
)
def test_a_file_that_is_none_is_not_used(text: str, cache: Path) -> None:
    cache.mkdir()
    (cache / f"{KEY}.json").write_text(text)
    assert WorkingSet.read(KEY) is None


def test_a_directory_that_cannot_be_written_costs_nothing_else(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("in the way")
    WorkingSet(KEY, PLACES).write()
    assert "cannot be kept" in caplog.text


def test_a_user_without_a_home_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("QEMU_POSTCOPY_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert WorkingSet.read(KEY) is None
    WorkingSet(KEY, PLACES).write()
    assert "cannot be kept" in caplog.text


def test_places_become_pages_of_this_restore_and_strangers_are_left_out() -> None:
    places = (*PLACES, ("m2", 0), ("m0", 1 << 20), ("m0", -4096))
    blocks = [block("m0"), block("m1", page_size=8192)]
    assert WorkingSet(KEY, places).pages(blocks) == [(1, 1), (0, 0), (1, 0)]


def test_no_more_than_its_bounds_is_filled_ahead() -> None:
    many = WorkingSet(KEY, tuple(("m0", 4096 * i) for i in range(FIRST_FAULTS + 5)))
    assert len(many.pages([block("m0", length=1 << 30)])) == FIRST_FAULTS
    huge = WorkingSet(KEY, tuple(("m0", (2 << 20) * i) for i in range(100)))
    found = huge.pages([block("m0", page_size=2 << 20, length=1 << 30)])
    assert len(found) == BYTES_MAX // (2 << 20)


def test_the_oldest_are_forgotten(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "FILES_MAX", 3)
    keys = [f"{number:064x}" for number in range(5)]
    for age, key in enumerate(keys):
        WorkingSet(key, PLACES).write()
        if (cache / f"{key}.json").exists():
            os.utime(cache / f"{key}.json", (age, age))
    assert sorted(path.stem for path in cache.iterdir()) == keys[2:]
