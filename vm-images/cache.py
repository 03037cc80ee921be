"""The cache directory of built images: where it is, and how several builders share it.

Whoever builds holds the lock; a finished directory appears under its final name by one rename and
is never written again, so readers need no lock.  Safe between processes and threads.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qemu_postcopy.errors import HostError

Progress = Callable[[str], None]


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/qemu-postcopy/images, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "qemu-postcopy" / "images"


@contextmanager
def build_lock(cache_dir: Path, progress: Progress) -> Iterator[None]:
    """Holds the cache directory's lock (made if missing); waits for another builder to finish."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(
            f"cannot use the cache directory {cache_dir}: {error.strerror}",
            hint="name another one with --cache DIR or XDG_CACHE_HOME",
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another build in {cache_dir}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A new directory that is renamed to `final` when the block ends well, else removed."""
    with tempfile.TemporaryDirectory(prefix=".building-", dir=final.parent) as temporary:
        staged = Path(temporary) / final.name
        staged.mkdir()
        yield staged
        staged.rename(final)
