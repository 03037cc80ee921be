"""The working set of an image: which pages its guests want first, remembered between restores.

Step "serve" of the flow.  At the first restore of an image the pages of the first tenth of a second
are noted, in a file of the user's cache directory (an image itself is never written); at later
ones they are filled before the guest asks, and what it still asks for then is noted too.  It is a
hint and nothing else: what it names is filled from the image like any other page, so a file that is
missing, old or damaged costs time only.  Runs in the control plane.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.paging.pager import FIRST_FAULTS, Pager, PagerBlock

log = logging.getLogger(__name__)

FORMAT = "qemu-postcopy-working-set"
FORMAT_VERSION = 1
FILE_BYTES_MAX = 1 << 20
#: Most that is filled ahead.
BYTES_MAX = 64 << 20
#: Files kept; the oldest go.
FILES_MAX = 256
KEY = re.compile(r"[0-9a-f]{64}")

#: A page by its block's name and its offset in that block in bytes.
Place = tuple[str, int]


def cache_directory() -> Path:
    """``$QEMU_POSTCOPY_CACHE_DIR``, else ``$XDG_CACHE_HOME/qemu-postcopy``, by default below
    ~/.cache."""
    override = os.environ.get("QEMU_POSTCOPY_CACHE_DIR")
    if override:
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "qemu-postcopy"


@dataclass(frozen=True)
class WorkingSet:
    """The first pages of one image's guests, in the order in which they were wanted.

    ``key`` identifies the image (the SHA-256 of its device state, which no two snapshots share).
    """

    key: str
    places: tuple[Place, ...]

    @staticmethod
    def _path(key: str) -> Path:
        return cache_directory() / "working-sets" / f"{key}.json"

    @classmethod
    def read(cls, key: str) -> WorkingSet | None:
        """What is known of that image; None where nothing is, or the file is not usable."""
        try:
            with cls._path(key).open("rb") as file:
                document = json.loads(file.read(FILE_BYTES_MAX))
            if (document["format"], document["version"]) != (FORMAT, FORMAT_VERSION):
                raise ValueError("another format")
            names = document["blocks"]
            places = tuple((str(names[index]), int(offset)) for index, offset in document["pages"])
        except FileNotFoundError:
            return None
        # OverflowError: a number that is none; RuntimeError: Path.home, where there is no such
        # user, or (RecursionError) the file nests too deeply.
        except (
            OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RuntimeError
        ) as error:  # fmt: skip
            log.warning("the working set of image %s is not used: %r", key, error)
            return None
        return cls(key, places)

    @classmethod
    def of(cls, key: str, pager: Pager) -> WorkingSet:
        """What a pager has noted, in a form that outlives this restore's order of blocks."""
        blocks = pager.blocks
        return cls(
            key,
            tuple(
                (blocks[number].name, page * blocks[number].page_size)
                for number, page in pager.first_faults()
            ),
        )

    def followed_by(self, known: WorkingSet | None) -> WorkingSet:
        """This one and what was known before: what was wanted although the known was there comes
        first, since it comes again; what is then too much was wanted last."""
        places = dict.fromkeys((*self.places, *(known.places if known is not None else ())))
        return WorkingSet(self.key, tuple(places)[:FIRST_FAULTS])

    def write(self) -> None:
        """Keeps it for the next restore.  Nothing depends on it, so a failure is logged only."""
        names = sorted({name for name, _ in self.places})
        index = {name: number for number, name in enumerate(names)}
        document = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "blocks": names,
            "pages": [(index[name], offset) for name, offset in self.places],
        }
        try:
            path = self._path(self.key)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new-")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(document, file)
                Path(temporary).rename(path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
            _forget_oldest(path.parent)
        except (OSError, RuntimeError) as error:
            log.warning("the working set of image %s cannot be kept: %s", self.key, error)

    def pages(self, blocks: Sequence[PagerBlock]) -> list[tuple[int, int]]:
        """Indices of block and page, for :meth:`Pager.prefetch`, at most BYTES_MAX of memory.

        What is in no block is left out.
        """
        numbers = {block.name: number for number, block in enumerate(blocks)}
        found = []
        room = BYTES_MAX
        for name, offset in self.places[:FIRST_FAULTS]:
            number = numbers.get(name)
            if number is None or not 0 <= offset < blocks[number].length:
                continue
            room -= blocks[number].page_size
            if room < 0:
                break
            found.append((number, offset // blocks[number].page_size))
        return found


def _forget_oldest(directory: Path) -> None:
    files = [path for path in directory.iterdir() if KEY.fullmatch(path.stem)]
    if len(files) <= FILES_MAX:
        return
    for path in sorted(files, key=lambda path: path.stat().st_mtime)[: len(files) - FILES_MAX]:
        path.unlink(missing_ok=True)
