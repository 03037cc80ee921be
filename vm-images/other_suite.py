"""Packages of another suite than the host's own: listed and downloaded, never installed.

Flow: the host's apt sources -> a private apt configuration with one more suite -> download what
installing that suite's packages would add.  It trusts apt.  Blocks for seconds; any thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images.cache import Progress
from qemu_postcopy.images.packages import parse_stanza, run_tool


@dataclass(frozen=True)
class AptSource:
    """One archive of the host's apt configuration, sources.list(5)."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str


def require_suite_name(suite: str) -> None:
    """Raises UsageError for what cannot be a suite's name."""
    if not suite.replace("-", "").isalnum():
        raise UsageError(f"{suite!r} is not the name of a suite", hint="such as bookworm-backports")


def read_apt_sources(etc_apt: Path = Path("/etc/apt")) -> list[AptSource]:
    """Binary package sources of the host, one-line and deb822 files alike."""
    sources: list[AptSource] = []
    parts = etc_apt / "sources.list.d"
    for path in [etc_apt / "sources.list", *sorted(parts.glob("*.list"))]:
        if path.is_file():
            sources += _one_line_sources(path.read_text(errors="replace"))
    for path in sorted(parts.glob("*.sources")):
        sources += _deb822_sources(path.read_text(errors="replace"))
    return sources


def _one_line_sources(text: str) -> Iterator[AptSource]:
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] != "deb":
            continue
        del words[0]
        signed_by = ""
        if words and words[0].startswith("["):
            while words:  # options in brackets may hold spaces
                option = words.pop(0)
                name, _, value = option.strip("[]").partition("=")
                if name == "signed-by":
                    signed_by = value
                if option.endswith("]"):
                    break
        if len(words) >= 2:
            yield AptSource((words[0],), (words[1],), tuple(words[2:]), signed_by)


def _deb822_sources(text: str) -> Iterator[AptSource]:
    stanza: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            stanza.append(line)
            continue
        fields = {name.lower(): value for name, value in parse_stanza("\n".join(stanza)).items()}
        stanza = []
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes") == "no":
            continue
        yield AptSource(
            tuple(fields.get("uris", "").split()),
            tuple(fields.get("suites", "").split()),
            tuple(fields.get("components", "").split()),
            fields.get("signed-by", ""),
        )


def sources_with_suite(sources: Sequence[AptSource], suite: str) -> str:
    """deb822 text of the host's sources of one release, and of `suite` at the same mirrors.

    Raises HostError if the host has no source of that release.
    """
    release = suite.partition("-")[0]
    of_release = [
        source
        for source in sources
        if any(name.partition("-")[0].partition("/")[0] == release for name in source.suites)
    ]
    archives = [source for source in of_release if release in source.suites]
    if not archives:
        raise HostError(
            f"this host's apt sources do not hold {release}",
            hint=f"name a suite of the host's own release instead of {suite}",
        )
    stanzas = []
    for source in [*of_release, *(replace(archive, suites=(suite,)) for archive in archives)]:
        stanza = f"Types: deb\nURIs: {' '.join(source.uris)}\nSuites: {' '.join(source.suites)}\n"
        stanza += f"Components: {' '.join(source.components)}\n"
        if source.signed_by:
            stanza += f"Signed-By: {source.signed_by}\n"
        if stanza not in stanzas:
            stanzas.append(stanza)
    return "\n".join(stanzas)


def download(apt_dir: Path, suite: str, packages: Sequence[str], progress: Progress) -> list[Path]:
    """What installing `packages` from `suite` would put on this host, as archives.

    `apt_dir` keeps lists and archives; the archives of an earlier call are removed from it.

    Raises HostError: no such suite or package at the host's mirrors.
    """
    lists, archives = apt_dir / "lists", apt_dir / "archives"
    for directory in (lists / "partial", archives / "partial"):
        directory.mkdir(parents=True, exist_ok=True)
    sources = apt_dir / "private.sources"
    sources.write_text(sources_with_suite(read_apt_sources(), suite))
    # The host's own configuration (proxies, keys) stays in force; hooks that would clean the host's
    # caches do not.  Its dpkg status is read, so only what the host lacks is downloaded.
    configuration = apt_dir / "apt.conf"
    configuration.write_text(
        "#clear APT::Update::Pre-Invoke;\n"
        "#clear APT::Update::Post-Invoke;\n"
        "#clear APT::Update::Post-Invoke-Success;\n"
        f'Dir::Etc::sourcelist "{sources}";\n'
        'Dir::Etc::sourceparts "/dev/null";\n'
        f'Dir::State::lists "{lists}";\n'
        f'Dir::Cache::archives "{archives}";\n'
        f'Dir::Cache::pkgcache "";\n'
        f'Dir::Cache::srcpkgcache "";\n'
        'APT::Sandbox::User "root";\n'
        'Debug::NoLocking "true";\n'
    )
    apt_get = ["apt-get", "-q", "-y", "-c", str(configuration)]
    hint = f"see whether the host's mirror has {suite}: {sources}"
    progress(f"package lists of {suite}")
    run_tool([*apt_get, "update"], hint=hint)
    progress(f"downloading {', '.join(packages)} of {suite}")
    for old in archives.glob("*.deb"):
        old.unlink()
    install = ["--no-install-recommends", "--reinstall", "--download-only", "-t", suite, "install"]
    run_tool([*apt_get, *install, *packages], hint=hint)
    return sorted(archives.glob("*.deb"))
