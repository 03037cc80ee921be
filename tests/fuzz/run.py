"""Searches for inputs that do harm, guided by coverage: ``tox -e fuzz -- SECONDS [TARGET...]``.

Each target of targets.py runs in a process of its own under atheris, the C half of the stream
reader (``stream-core``) under libFuzzer with clang's sanitizers.  It starts from the seeds in
corpus/ and works in a temporary directory; what it found new is told, with the inputs that did
harm, and ``--keep`` adds the smallest set that reaches as much to corpus/.  The exit status is 1 if
there was a finding.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
CORE = HERE.parents[1] / "qemu_postcopy" / "_native"
PYTHON_TARGETS = ("handshake", "control", "ledger", "manifest", "stream")
CORE_TARGET = "stream-core"
LONGEST_INPUT_BYTES = 64 << 10
HANG_SECONDS = 20
MEMORY_MIB = 2048
#: Kept seeds are few and small: they are replayed by every test run.
KEPT_BYTES_MAX = 8 << 10
KEPT_MOST = 40


@dataclass(frozen=True)
class Outcome:
    """What came of one target."""

    target: str
    executions: int
    edges: int
    inputs: int
    findings: list[Path]
    log: Path

    def line(self) -> str:
        found = ", ".join(map(str, self.findings)) or "none"
        return (
            f"{self.target:12} {self.executions:>10} executions, {self.edges} edges, "
            f"{self.inputs} inputs kept; findings: {found} (log: {self.log})"
        )


def fuzz_here(target: str, arguments: list[str]) -> None:
    """The body of a target's process; does not return."""
    atheris: Any = import_module("atheris")  # has no types
    sys.path.insert(0, str(HERE.parent))
    with atheris.instrument_imports(include=["qemu_postcopy"]):
        from fuzz.targets import TARGETS

    # A merge starts its program anew by a shell: argv[0] is all of the command.
    again = shlex.join([sys.executable, str(Path(__file__)), "--here", target])
    atheris.Setup([again, *arguments], TARGETS[target])
    atheris.Fuzz()


def build_core(folder: Path) -> Path:
    """The libFuzzer binary of the C half."""
    clang = shutil.which("clang")
    if clang is None:
        raise SystemExit(f"{CORE_TARGET} needs clang: apt-get install clang libclang-rt-14-dev")
    binary = folder / CORE_TARGET
    sources = [path for path in sorted(CORE.glob("*.c")) if path.name != "_core.c"]
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", "-fsanitize=fuzzer,address,undefined"]
    subprocess.run(
        [clang, *flags, "-fno-sanitize-recover=all", f"-I{CORE}", HERE / "stream_fuzz.c",
         *sources, "-o", binary],
        check=True,
    )  # fmt: skip
    return binary


def run(target: str, seconds: int, folder: Path, *, keep: bool) -> Outcome:
    """Fuzzes one target for so long."""
    place = folder / target
    found, harm, log = place / "corpus", place / "harm", place / "log"
    for directory in (found, harm):
        directory.mkdir(parents=True)
    command = (
        [str(build_core(place))]
        if target == CORE_TARGET
        else [sys.executable, str(Path(__file__)), "--here", target]
    )
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={LONGEST_INPUT_BYTES}",
        f"-timeout={HANG_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={harm}/",
        "-print_final_stats=1",
    ]
    dictionary = HERE / f"{target}.dict"
    if dictionary.exists():
        options.append(f"-dict={dictionary}")
    with log.open("wb") as output:
        status = subprocess.run(
            [*command, *options, str(found), str(CORPUS / target)],
            stdout=output, stderr=subprocess.STDOUT, cwd=place,
        ).returncode  # fmt: skip
    said = log.read_text(errors="replace")
    findings = sorted(harm.iterdir())
    if status and not findings:
        findings = [log]
    edges = [int(number) for number in re.findall(r"cov: (\d+)", said)]
    executions = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    executions = executions or re.findall(r"^#(\d+)", said, re.MULTILINE)
    kept = keep_smallest(command, target, found, place) if keep else len(list(found.iterdir()))
    return Outcome(
        target, int(executions[-1]) if executions else 0, max(edges, default=0), kept, findings, log
    )


def keep_smallest(command: list[str], target: str, found: Path, place: Path) -> int:
    """Adds to corpus/ what reaches something that the seeds do not; returns how many there are."""
    merged = place / "merged"
    shutil.copytree(CORPUS / target, merged)
    small = place / "small"
    small.mkdir()
    for path in found.iterdir():
        if path.stat().st_size <= KEPT_BYTES_MAX:
            shutil.copy(path, small)
    subprocess.run(
        [*command, "-merge=1", str(merged), str(small)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, cwd=place,
    )  # fmt: skip
    seeds = {path.name for path in (CORPUS / target).iterdir()}
    new = sorted(
        (path for path in merged.iterdir() if path.name not in seeds),
        key=lambda path: path.stat().st_size,
    )
    for path in new[: max(0, KEPT_MOST - len(seeds))]:
        shutil.copy(path, CORPUS / target)
    return len(list((CORPUS / target).iterdir()))


def main() -> int:
    """Two targets at a time, so that a machine of two processors is used and not flooded."""
    if sys.argv[1:2] == ["--here"]:
        fuzz_here(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=int, nargs="?", default=60, help="for each target")
    parser.add_argument("targets", nargs="*", help="default: all")
    parser.add_argument("--keep", action="store_true", help="add what is new to corpus/")
    options = parser.parse_args()
    targets = options.targets or [*PYTHON_TARGETS, CORE_TARGET]
    if unknown := set(targets) - {*PYTHON_TARGETS, CORE_TARGET}:
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")
    folder = Path(tempfile.mkdtemp(prefix="qpc-fuzz-"))
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(
            lambda target: run(target, options.seconds, folder, keep=options.keep), targets
        )
        failed = 0
        for outcome in outcomes:
            print(outcome.line(), flush=True)
            failed |= bool(outcome.findings)
    return failed


if __name__ == "__main__":
    sys.exit(main())
