"""Makes an image: in a temporary directory beside its target, renamed when all of it is on disk.

The last step of a snapshot or an import.  What stands under the target's name is therefore whole;
a killed program leaves a directory that only :func:`find_leftovers` knows.  A writer belongs to one
thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qemu_postcopy import __version__
from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.image.image import Image, Progress, Steps, hash_block
from qemu_postcopy.image.manifest import (
    DEFAULT_CHUNK_BYTES,
    MANIFEST_FILE,
    RAM_DIRECTORY,
    STATE_FILE,
    Block,
    Manifest,
    Provenance,
    StateFile,
    parse_manifest,
)
from qemu_postcopy.image.page_data import hash_file
from qemu_postcopy.image.stream import BlockSummary, StreamSummary

_LEFTOVER_SUFFIX = ".qpc-partial"


class ImageWriter:
    """Context manager around the making of an image.

    Fill :attr:`directory` (see ``demultiplex``), then call :meth:`finish`; leaving the context
    without it removes everything.

    Args:
        target: where the image is to be; must not be there yet, its parent must.

    Raises:
        UsageError: the target is there already, or its parent is not.
        HostError: the parent cannot be written.
    """

    def __init__(self, target: str | Path) -> None:
        self.target = Path(os.path.abspath(target))  # noqa: PTH100 (symbolic links stay)
        self.directory = self.target.with_name(
            f".{self.target.name}.{secrets.token_hex(4)}{_LEFTOVER_SUFFIX}"
        )
        self._lock_fd = -1
        self._finished = False

    def __enter__(self) -> ImageWriter:
        if self.target.exists() or self.target.is_symlink():
            raise UsageError(
                f"{self.target} is there already",
                hint="images are never written again: choose another name, or remove it first",
            )
        try:
            with _locked(self.target.parent):
                _remove(find_leftovers(self.target))
                self.directory.mkdir(mode=0o700)
                # Held as long as we live: tells a leftover from a directory at work.
                self._lock_fd = os.open(self.directory, os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError as error:
            raise UsageError(
                f"the directory {self.target.parent} is not there", hint="make it first"
            ) from error
        except OSError as error:
            raise HostError(
                f"an image cannot be made in {self.target.parent}: {error.strerror}",
                hint="choose a directory that you may write to and that has room",
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def finish(
        self,
        summary: StreamSummary,
        *,
        architecture: str,
        source: str,
        qemu_version: str | None = None,
        guest_name: str | None = None,
        launch: Mapping[str, Any] | None = None,
        page_sizes_bytes: Mapping[str, int] | None = None,
        chunk_size_bytes: int = DEFAULT_CHUNK_BYTES,
        domain_xml: str | None = None,
        disks: Sequence[Mapping[str, Any]] = (),
        progress: Progress | None = None,
    ) -> Image:
        """Makes checksums and the manifest, brings all to disk and renames.

        Takes long for a large guest, which can run on meanwhile.

        Args:
            summary: what ``demultiplex`` gave for :attr:`directory`.
            architecture: as in the name of the QEMU binary.
            page_sizes_bytes: of blocks whose back-end has other pages than 4 KiB, by block name.
            progress: called from several threads, one at a time, with bytes done and in all.

        Raises:
            ImageError: a value makes no valid manifest.
            HostError: disk full, or the target appeared meanwhile.
        """
        lazy = [block for block in summary.blocks if block.lazy]
        state_path = self.directory / STATE_FILE
        total = state_path.stat().st_size + sum(block.size_bytes for block in lazy)
        step = Steps(total, progress)
        sizes = page_sizes_bytes or {}
        try:
            manifest = Manifest(
                qemu_version=qemu_version,
                machine=summary.machine,
                architecture=architecture,
                target_page_size_bytes=summary.target_page_size_bytes,
                chunk_size_bytes=chunk_size_bytes,
                state=self._finish_state(step),
                blocks=tuple(
                    self._finish_block(
                        block, sizes.get(block.name, block.page_size_bytes or 4096), step
                    )
                    for block in lazy
                ),
                provenance=Provenance(
                    datetime.now(UTC).isoformat(timespec="seconds"),
                    f"qemu-postcopy {__version__}",
                    source,
                    guest_name,
                ),
                launch=dict(launch or {}),
                domain_xml=domain_xml,
                disks=tuple(disks),
            )
            text = manifest.to_json()
            manifest = parse_manifest(text)
            self._write_manifest(text)
            self.put_in_place()
        except OSError as error:
            raise HostError(
                f"the image {self.target} cannot be finished: {error.strerror}",
                hint="free disk space"
                if error.errno in (errno.ENOSPC, errno.EDQUOT)
                else "look at the target's directory",
            ) from error
        return Image(self.target, manifest)

    def _finish_state(self, step: Steps) -> StateFile:
        with (self.directory / STATE_FILE).open("rb") as file:
            digest = hash_file(file.fileno(), step)
            os.fsync(file.fileno())
            return StateFile(STATE_FILE, os.fstat(file.fileno()).st_size, digest)

    def _finish_block(self, block: BlockSummary, page_size_bytes: int, step: Steps) -> Block:
        assert block.file is not None
        with (self.directory / block.file).open("rb") as file:
            hashes, data_bytes = hash_block(file.fileno(), 0, block.size_bytes, step)
            os.fsync(file.fileno())
        return Block(
            block.name,
            block.size_bytes,
            page_size_bytes,
            block.file,
            0,
            data_bytes,
            tuple(hashes),
        )

    def _write_manifest(self, text: str) -> None:
        fd = os.open(self.directory / MANIFEST_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def put_in_place(self, *, durable: bool = True) -> None:
        """Gives the directory its name: it is finished.

        Args:
            durable: it is to outlive a crash of the host.

        Raises: OSError, if something has that name by now.
        """
        if durable:
            _sync_directory(self.directory / RAM_DIRECTORY)
            _sync_directory(self.directory)
        # rename(2) replaces an empty directory only: an image that appeared meanwhile stays.
        self.directory.rename(self.target)
        self._finished = True
        if durable:
            _sync_directory(self.target.parent)


def find_leftovers(target: str | Path) -> list[Path]:
    """Directories that killed writers of ``target`` left; not those of writers still alive."""
    target = Path(os.path.abspath(target))  # noqa: PTH100
    found = []
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{_LEFTOVER_SUFFIX}"):
        try:
            fd = os.open(path, os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
    return found


def remove_leftovers(target: Path) -> None:
    """Removes what :func:`find_leftovers` finds.

    Raises: OSError where the directory of the target is not there, or closed to us.
    """
    with _locked(target.parent):
        _remove(find_leftovers(target))


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keeps other writers out between the making of a directory and its lock."""
    fd = os.open(directory, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
