"""A guest whose record is damaged is shown with its trouble, not left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qemu_postcopy import status
from qemu_postcopy.errors import SidecarError
from qemu_postcopy.metrics import GuestCollector
from qemu_postcopy.sidecar.rundir import RunDirectory, SessionRecord

DAMAGED = {
    "cut": '{"image": "/im',
    "empty": "",
    "lies": json.dumps({"image": "/image", "state": "running", "pid": "1"}),
    "newer": json.dumps({"image": "/image", "state": "running", "unknown": 1}),
    "listed": "[]",
}


@pytest.fixture
def base(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five guests with damaged records beside a good one."""
    monkeypatch.setenv("QEMU_POSTCOPY_RUN_DIR", str(run_dir / "base"))
    good = RunDirectory.create("good")
    good.write_record(SessionRecord("/image", "detached", os.getpid()))
    good.release()
    for name, text in DAMAGED.items():
        run = RunDirectory.create(name)
        (run.path / "session.json").write_text(text)
        run.release()
    return run_dir / "base"


def tool(*words: str) -> str:
    command = [sys.executable, "-m", "qemu_postcopy", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_damaged_records_are_entries_with_their_trouble(base: Path) -> None:
    found = {entry["name"]: entry for entry in status.collect()}
    assert found.keys() == {"good", *DAMAGED}
    assert (found["good"]["state"], found["good"]["trouble"]) == ("detached", "")
    for name in DAMAGED:
        assert found[name]["state"] == "damaged"
        assert "session.json is damaged" in found[name]["trouble"]
        assert found[name].keys() == found["good"].keys()
        with pytest.raises(SidecarError, match="damaged"):
            status.collect(name)
    # One that goes away while it is looked at is none.
    entry = status._entry_if_there(RunDirectory(base / "gone"), 1)
    assert entry is None


def test_status_and_top_show_them(base: Path) -> None:
    for words in (("status",), ("top", "--once")):
        said = tool(*words)
        for name in ("good", *DAMAGED):
            assert name in said
        assert "damaged" in said


def test_prometheus_is_told_of_trouble(base: Path) -> None:
    families: dict[str, Any] = {family.name: family for family in GuestCollector().collect()}
    trouble = {
        sample.labels["guest"]: sample.value for sample in families["qemu_postcopy_trouble"].samples
    }
    assert trouble == {"good": 0, **dict.fromkeys(DAMAGED, 1)}
    states = {
        sample.labels["guest"]: sample.labels["state"]
        for sample in families["qemu_postcopy_guest"].samples
    }
    assert states == {"good": "detached", **dict.fromkeys(DAMAGED, "damaged")}
