"""Fixtures for all tests, what a test may need of the host, and evidence when one fails.

Environment: ``QPC_CACHE`` (where the test guest is kept), ``QPC_QEMU10`` (a QEMU 10 binary),
``QPC_LIBVIRT11`` (where `qemu-postcopy images libvirt` has put a libvirt 11),
``QPC_EVIDENCE`` (where the run directories of failed tests are kept).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import capabilities
import pytest

if TYPE_CHECKING:
    from qemu_postcopy.images.guest_image import GuestImage

RUN_DIR = pytest.StashKey[Path]()
FAILED = pytest.StashKey[bool]()
KEPT = pytest.StashKey[list[tuple[str, Path]]]()
LACKS = pytest.StashKey[bool]()

#: Beside lacks that ``--require`` does not name, these skips are none of the host's: why.
ALLOWED_SKIPS = {
    "tests/unit/test_distribution.py": "there is only a wheel to look into where one is installed",
}

#: Every process that a test starts inherits it, so leftovers are told from other people's guests.
MARK = "QPC_TEST_RUN"
#: How long a process whose guest has just been ended may take to notice it.
EXIT_SECONDS = 5.0

HUGE_PAGE_BYTES = 2 << 20
HUGE_PAGE_ATTEMPTS = 3
COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")
HUGE_PAGES_LOCK = Path(tempfile.gettempdir(), "qpc-huge-pages.lock")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        metavar="NAMES",
        help="comma-separated capabilities whose lack is a failure, not a skip, as is every other "
        f"skip then; all: every one ({', '.join(capabilities.PROBES)})",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): capabilities that the host must have")
    config.addinivalue_line("markers", "soak: takes many minutes; run by `tox -e soak` only")
    try:
        capabilities.parse_required(config.getoption("--require"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    os.environ[MARK] = uuid.uuid4().hex

    import qemu_postcopy

    # The tested thing is the wheel: under tox a package found in the source tree is a mistake.
    if "TOX_ENV_NAME" in os.environ:
        where = Path(qemu_postcopy.__file__).resolve()
        if not where.is_relative_to(Path(sys.prefix).resolve()):
            raise pytest.UsageError(f"qemu_postcopy comes from {where}, not from the built wheel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the long tests out, unless -m says otherwise."""
    if config.option.markexpr:
        return
    soaks = [item for item in items if item.get_closest_marker("soak")]
    if soaks:
        config.hook.pytest_deselected(items=soaks)
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = [name for marker in item.iter_markers("needs") for name in marker.args]
    lacks = capabilities.lacks(dict.fromkeys(names))
    if not lacks:
        return
    text = "; ".join(f"needs {name}: {reason}" for name, reason in lacks.items())
    if capabilities.parse_required(item.config.getoption("--require")) & lacks.keys():
        pytest.fail(text, pytrace=False)
    item.stash[LACKS] = True
    pytest.skip(text)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keeps the run directory of a failed test, and names it in the report.

    With ``--require`` a test, or a subtest, that skips itself has failed.
    """
    report = yield
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and item.config.getoption("--require")
        and not item.stash.get(LACKS, False)
        and not any(item.nodeid.startswith(f"{path}::") for path in ALLOWED_SKIPS)
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped, though --require was given: {skip_reason(report)}"
    item.stash[FAILED] = item.stash.get(FAILED, False) or report.failed
    run_directory = item.stash.get(RUN_DIR, None)
    if run_directory is not None and report.when == "teardown":
        if item.stash[FAILED]:
            kept = keep_evidence(run_directory, item.nodeid)
            item.config.stash.setdefault(KEPT, []).append((item.nodeid, kept))
        shutil.rmtree(run_directory, ignore_errors=True)
    return report


def skip_reason(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        return f"{reason} ({path}:{line})"
    return str(report.longrepr)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    for nodeid, kept in config.stash.get(KEPT, []):
        terminalreporter.write_line(f"evidence of {nodeid}: {kept}")


def keep_evidence(run_directory: Path, nodeid: str) -> Path:
    """Copies files (not sockets, and no big page data) to where they are kept."""
    base = Path(os.environ.get("QPC_EVIDENCE") or Path(tempfile.gettempdir(), "qpc-evidence"))
    kept = base / os.environ[MARK][:8] / re.sub(r"[^\w.-]+", "_", nodeid)

    def left_out(folder: str, names: list[str]) -> list[str]:
        paths = [Path(folder, name) for name in names]
        return [
            path.name
            for path in paths
            if not path.is_dir()
            and (path.is_symlink() or not path.is_file() or path.stat().st_size > 16 << 20)
        ]

    shutil.copytree(run_directory, kept, ignore=left_out, dirs_exist_ok=True)
    return kept


@pytest.fixture
def run_dir(request: pytest.FixtureRequest) -> Path:
    """A private directory with a short path (a UNIX socket's may have 107 bytes).

    What a test leaves in it (console, QMP log, standard error, traces) is kept if the test fails.
    """
    path = Path(tempfile.mkdtemp(prefix="qpc-"))
    request.node.stash[RUN_DIR] = path
    return path


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The test guest, built on first use; ``needs("guest")`` goes with it."""
    from qemu_postcopy.images.builder import build

    cache = os.environ.get("QPC_CACHE")
    return build(Path(cache) if cache else None)


@pytest.fixture(
    params=[
        pytest.param("qemu", marks=pytest.mark.needs("qemu")),
        pytest.param("qemu10", marks=pytest.mark.needs("qemu10")),
    ]
)
def qemu_binary(request: pytest.FixtureRequest) -> Path:
    """Each QEMU that the host has: the system's, and the one that QPC_QEMU10 names."""
    if request.param == "qemu10":
        return Path(os.environ["QPC_QEMU10"])
    return Path(shutil.which("qemu-system-x86_64") or "qemu-system-x86_64")


def add_huge_pages(count: int) -> int:
    """Changes the pool by ``count`` and returns how much was really added."""
    with HUGE_PAGES_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = int(capabilities.HUGE_PAGES.read_text())
        for attempt in range(HUGE_PAGE_ATTEMPTS):
            if attempt:
                # Free memory is there, but not in pieces of 2 MiB (admin-guide/sysctl/vm.rst).
                COMPACT_MEMORY.write_text("1")
            capabilities.HUGE_PAGES.write_text(str(before + count))
            added = int(capabilities.HUGE_PAGES.read_text()) - before
            if added >= count:
                break
        return added


@pytest.fixture
def reserve_huge_pages() -> Iterator[Callable[[int], None]]:
    """Reserves so many bytes of 2 MiB pages, and gives them back after the test."""
    reserved = 0

    def reserve(size_bytes: int) -> None:
        nonlocal reserved
        wanted = -(-size_bytes // HUGE_PAGE_BYTES)
        got = add_huge_pages(wanted)
        reserved += got
        if got < wanted:
            pytest.skip(
                f"only {got} of {wanted} huge pages could be reserved: memory is fragmented"
            )

    yield reserve
    if reserved:
        add_huge_pages(-reserved)


def processes_of_this_run() -> dict[int, str]:
    """PID and command line of each program that this run has started, and that still runs."""
    mark = f"{MARK}={os.environ[MARK]}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark not in (folder / "environ").read_bytes().split(b"\0"):
                continue
            command = (
                (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            )
        except OSError:
            continue
        # A zombie has an empty command line: it is dead, and its parent's to collect.
        if command and "multiprocessing.resource_tracker" not in command:
            found[int(folder.name)] = command
    return found


def wait_gone(pid: int, deadline: float) -> bool:
    """Whether the process ends before the deadline (of time.monotonic)."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        left_seconds = max(0.0, deadline - time.monotonic())
        return bool(select.select([pidfd], [], [], left_seconds)[0])
    finally:
        os.close(pidfd)


@pytest.fixture(autouse=True)
def no_process_is_left_behind() -> Iterator[None]:
    """Fails a test after which a QEMU or a sidecar runs on, and ends that process."""
    before = processes_of_this_run()
    yield
    deadline = time.monotonic() + EXIT_SECONDS
    left = {
        pid: command
        for pid, command in processes_of_this_run().items()
        if pid not in before and not wait_gone(pid, deadline)
    }
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if left:
        pytest.fail(
            "left running: " + "; ".join(f"{pid}: {text}" for pid, text in left.items()),
            pytrace=False,
        )
