"""Debian packages as the host's apt offers them: found, downloaded and unpacked, never installed.

The first step of an image build.  apt verifies what it downloads against its signed lists; this
module trusts apt and records the SHA-256 of every archive.  Runs programs and blocks; any thread.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.errors import HostError

_UPDATE_HINT = "run 'apt-get update' as root, then try again"


@dataclass(frozen=True)
class Package:
    """One package archive in the cache."""

    name: str
    version: str
    sha256: str
    archive: Path


@dataclass(frozen=True)
class PackageRecord:
    """What apt says of its candidate version of a package."""

    name: str
    version: str
    sha256: str
    dependencies: tuple[str, ...]


def run_tool(command: Sequence[str | Path], *, hint: str, cwd: Path | None = None) -> str:
    """Runs a program in the C locale and returns its standard output.

    Raises HostError with the program's own last words if it is missing or fails.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise HostError(f"{words[0]} is not installed", hint=hint) from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-8:]
        raise HostError(f"{words[0]} failed ({done.returncode}): " + "\n".join(said), hint=hint)
    return done.stdout


def require_apt() -> None:
    """Raises HostError on a host that is not of the Debian family."""
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise HostError(
                f"{program} is not installed: test guests are made of Debian packages",
                hint="build the image on a Debian or Ubuntu host and copy its cache directory here",
            )


def find_package(name: str) -> PackageRecord | None:
    """apt's candidate for `name`; None if apt knows none that can be downloaded."""
    try:
        text = run_tool(["apt-cache", "show", "--no-all-versions", name], hint=_UPDATE_HINT)
    except HostError:
        return None  # apt-cache fails for an unknown name; the caller says which it looked for
    fields = parse_stanza(text.partition("\n\n")[0])
    if not {"Package", "Version", "SHA256"} <= fields.keys():
        return None  # known from an installed package only
    dependencies = re.split(r"[,|]", fields.get("Depends", ""))
    return PackageRecord(
        name=fields["Package"],
        version=fields["Version"],
        sha256=fields["SHA256"],
        dependencies=tuple(word.split()[0] for word in dependencies if word.strip()),
    )


def need_package(name: str) -> PackageRecord:
    """The same; raises HostError if there is none."""
    record = find_package(name)
    if record is None:
        raise HostError(f"apt has no package {name} to download", hint=_UPDATE_HINT)
    return record


def parse_stanza(text: str) -> dict[str, str]:
    """Fields of one deb822 stanza, deb822(5); further lines of a field keep their line breaks."""
    fields: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line[0] in " \t":
            if name:
                fields[name] += "\n" + line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def download_package(record: PackageRecord, package_dir: Path) -> Package:
    """The archive of `record` in `package_dir`, downloaded unless it is there already."""
    file_name = f"{record.name}_{record.version.replace(':', '%3a')}.deb"
    archive = package_dir / file_name
    if not (archive.exists() and file_sha256(archive) == record.sha256):
        package_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=package_dir) as temporary:
            # The unprivileged user of apt's sandbox cannot write here; the files are ours anyway.
            sandbox = ["-o", "APT::Sandbox::User=root"]
            run_tool(
                ["apt-get", "-q", *sandbox, "download", f"{record.name}={record.version}"],
                hint=_UPDATE_HINT,
                cwd=Path(temporary),
            )
            (downloaded,) = Path(temporary).glob("*.deb")
            downloaded.rename(archive)
    return Package(record.name, record.version, file_sha256(archive), archive)


def unpack_package(archive: Path, directory: Path) -> None:
    """Unpacks the files of an archive into `directory`; no maintainer script runs."""
    run_tool(["dpkg-deb", "-x", archive, directory], hint=f"delete {archive} and try again")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
