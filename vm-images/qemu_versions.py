"""Another QEMU version beside the host's own: unpacked packages of another suite, never installed.

Flow: the host's apt sources -> a private apt configuration with one more suite -> download what
installing that suite's QEMU would add -> unpack into the cache -> a wrapper that starts it with its
own data files and libraries.  It trusts apt.  Blocks for seconds; any thread, any process.
"""

from __future__ import annotations

import json
import os
import shlex
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images.builder import Architecture, host_architecture
from qemu_postcopy.images.cache import (
    Progress,
    build_lock,
    default_cache_dir,
    staged_directory,
)
from qemu_postcopy.images.packages import (
    parse_stanza,
    require_apt,
    run_tool,
    unpack_package,
)

_RECORD_NAME = "install.json"
# where Debian's packages qemu-system-data, seabios and ipxe-qemu put what QEMU looks up by -L
_DATA_DIRS = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


@dataclass(frozen=True)
class QemuInstall:
    """A QEMU that lies in the cache.

    `binary` is a wrapper that can be used wherever one path is asked for; it becomes `real_binary`
    (which is what /proc/PID/exe shows) with the arguments and environment it needs.
    `version` is like "10.0.2"; `packages` are what was unpacked, by name.
    """

    binary: Path
    real_binary: Path
    environment: Mapping[str, str]
    data_dir: Path
    version: str
    packages: Mapping[str, str]

    def argv_prefix(self) -> list[str]:
        """The start of a command line that does without the wrapper; needs `environment`."""
        prefix = self.real_binary.parents[2]
        data_dirs = [prefix / name for name in _DATA_DIRS if (prefix / name).is_dir()]
        return [str(self.real_binary), *(word for path in data_dirs for word in ("-L", str(path)))]


@dataclass(frozen=True)
class AptSource:
    """One archive of the host's apt configuration, sources.list(5)."""

    uris: tuple[str, ...]
    suites: tuple[str, ...]
    components: tuple[str, ...]
    signed_by: str


def fetch_qemu(
    suite: str = "bookworm-backports",
    cache_dir: Path | None = None,
    progress: Progress = lambda line: None,
) -> QemuInstall:
    """The system emulator of `suite` for this host's architecture, from the cache if it is there.

    Args:
        suite: of the host's own release ("bookworm-backports" on bookworm), since the packages run
            on the host's libraries.
        cache_dir: default :func:`default_cache_dir`.

    Raises:
        UsageError: that is no suite's name.
        HostError: no such suite at the host's mirrors, or its QEMU does not run here.
    """
    if not suite.replace("-", "").isalnum():
        raise UsageError(f"{suite!r} is not the name of a suite", hint="such as bookworm-backports")
    cache_dir = (cache_dir or default_cache_dir()).absolute()
    architecture = host_architecture()
    prefix = cache_dir / f"qemu-{suite}-{architecture.name}"
    if not (prefix / _RECORD_NAME).exists():
        require_apt()
        with build_lock(cache_dir, progress):
            if not (prefix / _RECORD_NAME).exists():  # not made while we waited for the lock
                apt_dir = cache_dir / f"apt-{suite}"
                archives = _download(apt_dir, suite, architecture.qemu_package, progress)
                with staged_directory(prefix) as staged:
                    _unpack(staged, prefix, archives, architecture, progress)
    return _load(prefix)


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


def _download(apt_dir: Path, suite: str, package: str, progress: Progress) -> list[Path]:
    """What installing `package` from `suite` would put on this host, as archives."""
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
    progress(f"downloading {package} of {suite}")
    for old in archives.glob("*.deb"):
        old.unlink()
    install = ["--no-install-recommends", "--reinstall", "--download-only", "-t", suite, "install"]
    run_tool([*apt_get, *install, package], hint=hint)
    return sorted(archives.glob("*.deb"))


def _unpack(
    staged: Path,
    prefix: Path,
    archives: Sequence[Path],
    architecture: Architecture,
    progress: Progress,
) -> None:
    """Unpacks into `staged`, which will be renamed to `prefix`, and tries the result."""
    packages = {}
    for archive in archives:
        name, version = archive.name.split("_")[:2]
        packages[name] = version.replace("%3a", ":")
        progress(f"unpacking {name} {packages[name]}")
        unpack_package(archive, staged)
    program = Path("usr/bin") / f"qemu-system-{architecture.name}"
    if not (staged / program).exists():
        raise HostError(
            f"{architecture.qemu_package} holds no {program}",
            hint="correct qemu_package in vm-images/manifest.toml",
        )
    _write_wrapper(staged, prefix, program)
    # The wrapper names the final place, where nothing is yet: try the program itself.
    trial = _environment(staged)
    said = run_tool(
        ["env", *(f"{name}={trial[name]}" for name in trial), str(staged / program), "--version"],
        hint="this host's libraries are too old or too new for that QEMU: take another suite",
    )
    version = said.partition("version ")[2].split()[0]
    record = {"program": str(program), "version": version, "packages": packages}
    (staged / _RECORD_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    progress(f"QEMU {version}")


def _environment(prefix: Path) -> dict[str, str]:
    """What the program needs if it lies (or will lie) in `prefix`."""
    triplet = sysconfig.get_config_var("MULTIARCH") or f"{os.uname().machine}-linux-gnu"
    libraries = [f"usr/lib/{triplet}", f"lib/{triplet}"]
    return {
        "LD_LIBRARY_PATH": ":".join(str(prefix / path) for path in libraries),
        "QEMU_MODULE_DIR": str(prefix / "usr/lib" / triplet / "qemu"),
    }


def _write_wrapper(staged: Path, prefix: Path, program: Path) -> None:
    wrapper = staged / "bin" / program.name
    wrapper.parent.mkdir(exist_ok=True)
    data_dirs = [prefix / name for name in _DATA_DIRS if (staged / name).is_dir()]
    arguments = " ".join(f"-L {shlex.quote(str(path))}" for path in data_dirs)
    exports = "".join(
        f"export {name}={shlex.quote(value)}\n" for name, value in _environment(prefix).items()
    )
    wrapper.write_text(
        "#!/bin/sh\n"
        "# Becomes the real program with its own data files and libraries.\n"
        f'{exports}exec {shlex.quote(str(prefix / program))} {arguments} "$@"\n'
    )
    wrapper.chmod(0o755)


def _load(prefix: Path) -> QemuInstall:
    record = json.loads((prefix / _RECORD_NAME).read_text())
    program = Path(record["program"])
    return QemuInstall(
        binary=prefix / "bin" / program.name,
        real_binary=prefix / program,
        environment=_environment(prefix),
        data_dir=prefix / _DATA_DIRS[0],
        version=record["version"],
        packages=record["packages"],
    )
