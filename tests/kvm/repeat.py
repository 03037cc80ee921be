"""Runs all KVM cases again and again: ``tox -e kvm-repeat -- [RUNS] [--first N] [OPTION...]``.

A flake shows in many runs, so each is a pytest of its own (with these options of pytest's), and
the run's number is the seed of what is random in it (QPC_SEED).  A case that is skipped is not
green: whatever one needs is required, unless a later ``--require=`` says otherwise.  The first
failure ends it with exit status 1; the log of that run and the evidence of its tests are kept and
named.  The last line says what was run.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = (HERE, HERE.parent / "vm" / "test_restore_kvm.py")
FAILED_LINES = 60


def run(number: int, folder: Path, options: list[str]) -> tuple[bool, Counter[str], Path]:
    """One run: whether it was green, what pytest counted, and its log."""
    log = folder / f"run-{number}.log"
    environment = {
        **os.environ,
        "QPC_SEED": str(number),
        "QPC_EVIDENCE": os.environ.get("QPC_EVIDENCE", str(folder / "evidence")),
    }
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "--require=all", *options, *CASES],
            stdout=output, stderr=subprocess.STDOUT, env=environment,
        ).returncode  # fmt: skip
    lines = log.read_text(errors="replace").splitlines()
    counts = Counter(
        {word: int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", lines[-1])}
        if lines
        else {}
    )
    return status == 0 and counts["passed"] > 0 and not counts["skipped"], counts, log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=int, nargs="?", default=25)
    parser.add_argument("--first", type=int, default=1, help="number of the first run, its seed")
    arguments, options = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp(prefix="qpc-kvm-repeat-"))
    begun = time.monotonic()
    total: Counter[str] = Counter()
    green = 0
    for number in range(arguments.first, arguments.first + arguments.runs):
        good, counts, log = run(number, folder, options)
        total += counts
        if not good:
            print(*log.read_text(errors="replace").splitlines()[-FAILED_LINES:], sep="\n")
            print(f"run {number} failed: {log}")
            break
        green += 1
    print(
        f"runs {arguments.first} to {arguments.first + arguments.runs - 1}: {green} of "
        f"{arguments.runs} green in a row; {total['passed']} cases passed, {total['failed']} "
        f"failed, {total['skipped']} skipped; {time.monotonic() - begun:.0f} s"
    )
    return 1 if green < arguments.runs else 0


if __name__ == "__main__":
    sys.exit(main())
