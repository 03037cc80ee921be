"""The host's apt sources, read from both file formats, and the private ones made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.images.other_suite import AptSource, read_apt_sources, sources_with_suite
from qemu_postcopy.images.qemu_versions import fetch_qemu

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://mirror.example/debian
  http://second.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://third-party.example/node
Suites: nodistro
Components: main
"""
ONE_LINE = """\
deb http://mirror.example/debian bookworm main # the archive
# deb http://off.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/etc/key.gpg] http://mirror.example/security bookworm/updates main
deb [ trusted=yes ] file:/srv/flat ./
"""


@pytest.fixture
def etc_apt(tmp_path: Path) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/debian.sources").write_text(DEB822)
    (tmp_path / "sources.list").write_text(ONE_LINE)
    (tmp_path / "sources.list.d/ignored.sources.save").write_text(DEB822)
    return tmp_path


def test_both_formats_are_read(etc_apt: Path) -> None:
    sources = read_apt_sources(etc_apt)
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    mirrors = ("http://mirror.example/debian", "http://second.example/debian")
    block = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc"
    assert sources == [
        AptSource(("http://mirror.example/debian",), ("bookworm",), ("main",), ""),
        AptSource(
            ("http://mirror.example/security",), ("bookworm/updates",), ("main",), "/etc/key.gpg"
        ),
        AptSource(("file:/srv/flat",), ("./",), (), ""),
        AptSource(mirrors, ("bookworm", "bookworm-updates"), ("main", "contrib"), key),
        AptSource(
            ("http://mirror.example/debian-security",), ("bookworm-security",), ("main",), block
        ),
        AptSource(("http://third-party.example/node",), ("nodistro",), ("main",), ""),
    ]


def test_a_suite_is_added_at_the_mirrors_of_its_release_only(etc_apt: Path) -> None:
    stanzas = sources_with_suite(read_apt_sources(etc_apt), "bookworm-backports").split("\n\n")
    backports = [stanza for stanza in stanzas if "bookworm-backports" in stanza]
    assert len(backports) == 2
    assert all("URIs: http://mirror.example/debian" in stanza for stanza in backports)
    text = "\n".join(stanzas)
    assert "security" in text and "third-party" not in text and "flat" not in text
    assert " -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc" in text


def test_a_suite_of_another_release_is_refused(etc_apt: Path) -> None:
    with pytest.raises(HostError, match="trixie"):
        sources_with_suite(read_apt_sources(etc_apt), "trixie-backports")


@pytest.mark.parametrize("suite", ["", "../etc", "a b", "x\nSuites: y"])
def test_what_is_no_suite_is_refused(suite: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the name of a suite"):
        fetch_qemu(suite, tmp_path)
