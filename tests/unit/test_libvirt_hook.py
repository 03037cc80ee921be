"""The hook changes what it must in a domain's XML, takes that out again, and lets all others be."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.libvirt import hook, hook_install, hook_xml
from qemu_postcopy.libvirt.commands import run_name_of
from qemu_postcopy.libvirt.metadata import NAMESPACE
from qemu_postcopy.sidecar.rundir import NAME

QEMU = hook_xml.QEMU_NAMESPACE
PLAIN = "<domain type='kvm'><name>web</name><uuid>u</uuid></domain>"
OURS = (
    f"<domain xmlns:qemu='{QEMU}'><name>web</name><!-- kept --><metadata>"
    f"<p:paging xmlns:p='{NAMESPACE}'/><os:x xmlns:os='http://elsewhere'/></metadata>"
    "<qemu:commandline><qemu:arg value='-foo'/>"
    "<qemu:env name='LD_PRELOAD' value='/usr/lib/theirs.so'/></qemu:commandline></domain>"
)


def variables(text: str) -> dict[str, str]:
    domain = ElementTree.fromstring(text)
    found = domain.findall(f"{hook_xml.COMMAND_LINE}/{hook_xml.VARIABLE}")
    return {entry.get("name", ""): entry.get("value", "") for entry in found}


@pytest.mark.parametrize("text", [PLAIN, OURS])
def test_what_is_added_is_taken_out_again_and_the_rest_stays(text: str) -> None:
    domain = hook_xml.parse(text)
    before = hook_xml.serialize(domain)
    assert not hook_xml.strip_offer(domain)
    hook_xml.add_offer(domain, hook.LIBRARY, Path("/run/secret"))
    offered = hook_xml.serialize(domain)
    found = variables(offered)
    theirs = ":/usr/lib/theirs.so" if "theirs" in text else ""
    assert found["LD_PRELOAD"] == f"{hook.LIBRARY}{theirs}"
    assert found["QEMU_POSTCOPY_PRELOAD_SOCKET"] == "/run/secret"
    again = hook_xml.parse(offered)
    assert hook_xml.strip_offer(again)
    assert ElementTree.canonicalize(hook_xml.serialize(again)) == ElementTree.canonicalize(before)
    if text == OURS:
        assert "<!-- kept -->" in offered
        for prefix in ("p:paging", "os:x", "qemu:arg"):
            assert prefix in offered


def test_entities_are_not_expanded() -> None:
    with pytest.raises(ElementTree.ParseError):
        hook_xml.parse("<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>")


def test_a_migrated_domain_arrives_without_the_offer_of_the_host_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = hook_xml.parse(OURS)
    hook_xml.add_offer(domain, hook.LIBRARY, Path("/run/secret"))
    for text, expected in ((hook_xml.serialize(domain), True), (OURS, False), ("<domain", False)):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert hook.main(["1", "web", "migrate", "begin", "-"]) == 0
        said = capsys.readouterr().out
        assert bool(said) == expected
        assert "PRELOAD_SOCKET" not in said


def run_script(script: Path, operation: str, xml: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script, "web", operation, "begin", "-"], input=xml, capture_output=True, text=True
    )


@pytest.fixture
def hooks(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hook_install, "LIBRARY", run_dir / "lib" / "qemu-postcopy-preload.so")
    path = run_dir / "hooks"
    (path / "qemu.d").mkdir(parents=True)
    return path


def test_installing_is_idempotent_beside_other_hooks_and_is_taken_back(hooks: Path) -> None:
    theirs = hooks / "qemu.d" / "10-theirs"
    first = hook_install.install(hooks)
    assert (first.changed, first.restart) == (True, True)
    again = hook_install.install(hooks)
    assert (again.changed, again.restart) == (False, False)
    theirs.write_text("#!/bin/sh\n")
    first.script.write_text(first.script.read_text() + "# an older version\n")
    assert hook_install.install(hooks).changed
    assert hook_install.remove(hooks).changed
    assert not hook_install.remove(hooks).changed
    assert [path.name for path in (hooks / "qemu.d").iterdir()] == ["10-theirs"]
    assert not first.library.exists()


def test_qemus_user_can_read_the_library_whatever_the_umask(hooks: Path) -> None:
    previous = os.umask(0o077)
    try:
        for _ in range(2):  # also if it was installed wrongly before
            library = hook_install.install(hooks).library
            assert stat.S_IMODE(library.parent.stat().st_mode) == 0o755
            assert stat.S_IMODE(library.stat().st_mode) == 0o644
            library.parent.chmod(0o700)
    finally:
        os.umask(previous)


def test_somebody_elses_script_of_our_name_stays(hooks: Path) -> None:
    script = hooks / "qemu.d" / hook_install.SCRIPT_NAME
    script.write_text("#!/bin/sh\n")
    for do in (hook_install.install, hook_install.remove):
        with pytest.raises(UsageError, match="is not ours"):
            do(hooks)
    assert script.read_text() == "#!/bin/sh\n"


def test_the_script_starts_nothing_for_a_domain_or_step_that_is_not_ours(hooks: Path) -> None:
    script = hook_install.install(hooks).script
    witness = hooks / "started"
    program = hooks / "python"
    program.write_text(f"#!/bin/sh\ntouch {witness}\ncat\n")
    program.chmod(0o755)
    script.write_text(script.read_text().replace(sys.executable, str(program)))
    for operation, xml in (("restore", PLAIN), ("prepare", OURS), ("started", OURS)):
        done = run_script(script, operation, xml)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not witness.exists()
    assert run_script(script, "restore", OURS).stdout == f"{OURS}\n"
    assert witness.exists()


@pytest.mark.parametrize(("status", "expected"), [(1, 0), (3, 1), (127, 0)])
def test_only_a_refusal_stops_libvirt(hooks: Path, status: int, expected: int) -> None:
    script = hook_install.install(hooks).script
    program = hooks / "python"
    program.write_text(f"#!/bin/sh\necho half a domain\nexit {status}\n")
    program.chmod(0o755)
    script.write_text(script.read_text().replace(sys.executable, str(program)))
    done = run_script(script, "restore", OURS)
    assert (done.returncode, done.stdout) == (expected, "")


def test_every_domain_has_a_run_directory_of_its_own() -> None:
    domains = ["web", "my web", "my_web", "my/web", "-web", "ä", "x" * 48, "x" * 49, "x" * 50, "."]
    names = [run_name_of(domain) for domain in domains]
    assert names[0] == "web" and names[1].startswith("my_web-")
    assert len(set(names)) == len(domains)
    assert all(NAME.fullmatch(name) for name in names)
