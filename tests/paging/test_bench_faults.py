"""Promise: ``bench faults`` measures all it says it does, and refuses figures of wrong content."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from qemu_postcopy.bench import faults
from qemu_postcopy.bench.commands import bench_commands
from qemu_postcopy.errors import ContentError, HostError

pytestmark = pytest.mark.needs("uffd", "cc")


@pytest.mark.parametrize("memory", ["memfd", "anonymous"])
def test_every_combination_is_measured(memory: str) -> None:
    words = ["faults", "--pages", "200", "--runs", "2", "--memory", memory, "--json"]
    result = CliRunner().invoke(bench_commands, words, catch_exceptions=False)
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["bench"] == "faults"
    # order x threads x chunk, and for each four handlers with three quantities, four ratios
    assert len(report["results"]) == 2 * 2 * 2 * 12
    assert len(report["ratios"]) == 2 * 2 * 2 * 4
    for entry in report["results"]:
        assert entry["runs"] == 2
        assert 0 < entry["min"] <= entry["median"] <= entry["max"]


def test_wrong_content_is_an_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = run_dir / "programs"
    programs.mkdir()
    for program in faults.compiled_programs().iterdir():
        (programs / program.name).symlink_to(program)
    (programs / "write_source").unlink()
    script = programs / "write_source"
    # One word of one page is not what it should be.
    script.write_text(
        f'#!/bin/sh\n"{faults.compiled_programs()}/write_source" "$@" &&\n'
        'printf X | dd of="$1" bs=1 seek=123456 conv=notrunc 2>/dev/null\n'
    )
    script.chmod(0o700)
    monkeypatch.setattr(faults, "compiled_programs", lambda: programs)
    bench = faults.FaultBench(
        pages=100,
        orders=("random",),
        threads=(1,),
        chunk_sizes=(4096,),
        memory="memfd",
        runs=1,
        directory=run_dir,
    )
    with pytest.raises(ContentError, match="1 words of memory differ"):
        bench.run()
    assert [path.name for path in run_dir.iterdir()] == ["programs"], "page data was left behind"


def test_too_few_huge_pages_are_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "free").write_text("3\n")
    monkeypatch.setattr(faults, "HUGE_PAGES_FREE", run_dir / "free")
    bench = faults.FaultBench(
        pages=4,
        orders=("random",),
        threads=(1,),
        chunk_sizes=(4096,),
        memory="hugetlb",
        runs=1,
        directory=run_dir,
    )
    with pytest.raises(HostError, match="4 huge pages"):
        bench.run()


def test_programs_are_compiled_once_for_each_source(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(run_dir))
    folder = faults.compiled_programs()
    assert sorted(path.name for path in folder.iterdir()) == sorted(faults.PROGRAMS)
    monkeypatch.setattr(subprocess, "run", None)
    assert faults.compiled_programs() == folder
