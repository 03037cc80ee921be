"""A domain's metadata is read as the schema has it, and by nobody's guess."""

from __future__ import annotations

import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.libvirt.metadata import (
    NAMESPACE,
    SCHEMA,
    Settings,
    parse_settings,
    settings_in,
)

ROOT = f'<p:paging xmlns:p="{NAMESPACE}"'
GOOD = {
    f"{ROOT}/>": Settings(),
    f'{ROOT}><sidecar restore="eager"/></p:paging>': Settings(restore="eager"),
    f'{ROOT}><p:background fill="no"/></p:paging>': Settings(fill=False),
    f'{ROOT}> <!-- a word --> <background rate="1048576"/> </p:paging>': Settings(rate=1 << 20),
    f'{ROOT}><supervision restart="yes"/><background/></p:paging>': Settings(supervise=True),
    f'{ROOT}><postcopy passes="3"/></p:paging>': Settings(postcopy_passes=3),
}
BAD = [
    "<paging",
    f"{ROOT}>text</p:paging>",
    f'{ROOT} restore="lazy"/>',
    f'{ROOT}><sidecar restore="sometimes"/></p:paging>',
    f'{ROOT}><sidecar restor="lazy"/></p:paging>',
    f"{ROOT}><sidecar/><sidecar/></p:paging>",
    f"{ROOT}><sidecar>lazy</sidecar></p:paging>",
    f"{ROOT}><sidecars/></p:paging>",
    f'{ROOT}><q:sidecar xmlns:q="http://elsewhere"/></p:paging>',
    f'{ROOT}><background rate="-1"/></p:paging>',
    f'{ROOT}><background rate="100M"/></p:paging>',
    f'{ROOT}><background rate="{1 << 60}"/></p:paging>',
    f'{ROOT}><background fill="true"/></p:paging>',
    f'{ROOT}><postcopy passes="1001"/></p:paging>',
    f'{ROOT}><postcopy passes=""/></p:paging>',
    '<q:paging xmlns:q="http://elsewhere"/>',
]


@pytest.mark.parametrize("text", GOOD)
def test_what_it_says(text: str) -> None:
    assert parse_settings(text) == GOOD[text]
    domain = ElementTree.fromstring(f"<domain><metadata>{text}</metadata></domain>")
    assert settings_in(domain) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_what_is_misspelt_is_no_default(text: str) -> None:
    with pytest.raises(UsageError, match="metadata is not as it must be") as caught:
        parse_settings(text)
    assert "qemu-postcopy libvirt set --help" in caught.value.hint


def test_what_is_written_is_read_back() -> None:
    settings = Settings("eager", fill=False, rate=5, supervise=True, postcopy_passes=2)
    assert parse_settings(settings.as_xml()) == settings


def test_a_domain_without_it_asks_for_nothing() -> None:
    assert settings_in(ElementTree.fromstring("<domain><metadata/></domain>")) is None
    assert settings_in(ElementTree.fromstring("<domain/>")) is None


@pytest.mark.needs("checkers")
def test_the_schema_and_the_parser_agree(run_dir: Path) -> None:
    for number, text in enumerate([*GOOD, *BAD]):
        path = run_dir / f"{number}.xml"
        path.write_text(text)
        done = subprocess.run(
            ["xmllint", "--noout", "--relaxng", str(SCHEMA), str(path)], capture_output=True
        )
        assert (done.returncode == 0) == (text in GOOD), (text, done.stderr)
