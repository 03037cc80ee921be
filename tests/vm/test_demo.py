"""`qemu-postcopy demo` says "verified" only where a real guest has found every word right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from vm.guests import PATIENCE, cli, cli_command, ends_within, wait_until

from qemu_postcopy import demo
from qemu_postcopy.errors import ContentError
from qemu_postcopy.image.image import Image
from qemu_postcopy.sidecar.rundir import RunDirectory
from qemu_postcopy.vm.process import ProcessIdentity

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


@pytest.mark.soak
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


def test_demo_that_is_interrupted_leaves_no_guest_behind(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the demo and the restore that it waits for."""
    monkeypatch.setenv("TMPDIR", str(run_dir))
    tool = subprocess.Popen(
        cli_command("demo", "--memory", "32M"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def lazy_qemu() -> int:
        for path in run_dir.glob("qpc-demo-*/run/demo"):
            if (record := RunDirectory(path).read_record(missing_ok=True)) is not None:
                return record.pid
        return 0

    with ProcessIdentity.open(wait_until(lazy_qemu, "the lazy restore has a QEMU")) as qemu:
        os.killpg(tool.pid, signal.SIGINT)
        _, said = tool.communicate(timeout=PATIENCE)
        assert tool.returncode == 130, said
        assert ends_within(qemu, PATIENCE), "its guest runs on"
    assert list(run_dir.glob("qpc-demo-*")) == []
