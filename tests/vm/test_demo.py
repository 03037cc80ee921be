"""`qemu-postcopy demo` says "verified" only where a real guest has found every word right."""

from __future__ import annotations

import json
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from vm.guests import cli

from qemu_postcopy import demo
from qemu_postcopy.errors import ContentError
from qemu_postcopy.image.image import Image

pytestmark = [pytest.mark.needs("qemu", "uffd", "ptrace", "guest"), pytest.mark.timeout(300)]


def test_demo_resumes_a_guest_both_ways_and_finds_every_word_right() -> None:
    result = json.loads(cli("demo", "--memory", "32M", "--json").stdout)
    assert result["bad_words"] == 0
    eager, lazy = result["outcomes"]
    assert eager["passes_verified"] >= demo.PASSES and lazy["passes_verified"] >= demo.PASSES
    assert 0 < lazy["faults"] == result["statistics"]["faults"]


class Damaging(demo.Demo):
    """One word of every page of the pattern is another before it is resumed lazily."""

    async def resume_lazily(self, before: int) -> Any:
        (block,) = Image.open(self.image).manifest.blocks
        path = self.image / block.file
        data = bytearray(path.read_bytes())
        for begin in range(0, len(data), 4096):
            # The guest's own code and data are left alone: they can be compressed.
            if len(zlib.compress(data[begin : begin + 4096], 1)) > 4000:
                data[begin] ^= 1
        path.write_bytes(data)
        return await super().resume_lazily(before)


def test_demo_of_a_damaged_image_is_no_success(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "Demo", Damaging)
    monkeypatch.setattr(tempfile, "tempdir", str(run_dir))
    done = CliRunner().invoke(demo.demo_command, ["--memory", "32M", "--json"])
    assert isinstance(done.exception, ContentError), done.output
    assert ContentError.exit_code == 12
    (kept,) = run_dir.glob("qpc-demo-*")
    assert (kept / "lazy.log").exists()
