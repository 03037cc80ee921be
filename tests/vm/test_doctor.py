"""The doctor against the real host: what it says must be so, also with fewer rights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qemu_postcopy.doctor import commands, host, probe_host

NOBODY = 65534
ESSENTIAL = {
    "userfaultfd.access",
    "userfaultfd.feature.EVENT_REMOVE",
    "userfaultfd.feature.MISSING_SHMEM",
    "attaching.ptrace",
    "attaching.pidfd_getfd",
    "host.architecture",
    "qemu.native",
}


def report_as_nobody() -> dict[str, Any]:
    """The report of a process that has given up root (a fork: nobody may not read our Python)."""
    probe_host()  # Whatever is imported late is imported now.
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with os.fdopen(writer, "w") as pipe:
                json.dump(probe_host().to_json(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    document: dict[str, Any] = json.loads(text)
    return document


@pytest.mark.needs("uffd", "ptrace", "qemu", "root")
def test_a_host_that_runs_these_tests_is_found_fit() -> None:
    report = probe_host()
    assert report.can_restore, report.blockers
    assert {f.id for f in report.findings if f.essential} == ESSENTIAL
    for finding in report.findings:
        assert finding.cost, finding
        assert bool(finding.advice) == (finding.status != "ok"), finding
    assert len({f.id for f in report.findings}) == len(report.findings)


@pytest.mark.needs("qemu")
def test_the_version_is_the_one_that_qemu_prints() -> None:
    finding = probe_host().finding("qemu.qemu-system-x86_64")
    printed = subprocess.run(
        [finding.data["path"], "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert f"version {finding.data['version']}" in printed
    assert "tcg" in finding.data["accelerators"]


@pytest.mark.needs("root", "uffd", "restricted")
def test_without_rights_the_access_is_missing_and_the_device_is_named() -> None:
    document = report_as_nobody()
    findings = {f["id"]: f for f in document["findings"]}
    assert document["host"]["user"] == "nobody"
    assert not document["can_restore"]
    assert findings["userfaultfd.access"]["status"] == "missing"
    assert "/dev/userfaultfd" in findings["userfaultfd.access"]["advice"]
    # The kernel tells its features to everybody, by a descriptor for user mode.
    assert findings["userfaultfd.feature.MISSING_SHMEM"]["status"] == "ok"
    assert findings["attaching.cap_sys_ptrace"]["status"] == "warn"


def test_probing_leaves_no_process_no_descriptor_and_no_file(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(run_dir))
    descriptors = Path("/proc/self/fd")
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    probe_host()
    before = {path.name for path in descriptors.iterdir()}, children.read_text()
    probe_host()
    assert ({path.name for path in descriptors.iterdir()}, children.read_text()) == before
    assert list(run_dir.iterdir()) == []


@pytest.mark.needs("qemu")
def test_a_path_without_qemu_ends_with_status_3(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path
) -> None:
    cc = shutil.which("cc")
    if cc:
        (run_dir / "cc").symlink_to(cc)
    monkeypatch.setenv("PATH", str(run_dir))
    result = CliRunner().invoke(commands.doctor_command, ["--json"])
    assert result.exit_code == 3
    findings = {f["id"]: f for f in json.loads(result.stdout)["findings"]}
    assert findings["qemu.native"]["status"] == "missing"
    assert findings["qemu.native"]["advice"] == "qemu-postcopy doctor --install"


def test_a_directory_on_tmpfs_keeps_holes() -> None:
    assert host.keeps_holes(Path("/dev/shm"))
