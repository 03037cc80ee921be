"""The options of virsh restore: each does what virsh does by it, or is refused by name."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from libvirtd.conftest import Hosts
from libvirtd.daemons import Host
from libvirtd.domains import start_domain
from libvirtd.saved import left_beside, restore, run_directories, saved_domain, sidecars
from vm.guests import GuestConsole

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "ptrace", "root")

SEABIOS = Path("/usr/share/seabios/bios-256k.bin")
VARIABLES_BYTES = 128 << 10


def test_another_xml_is_restored_with_and_one_that_does_not_fit_leaves_nothing(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    _, path = saved_domain(host, shared_guest, shared_dir, fill_mib=8)
    xml = host.virsh("save-image-dumpxml", path)
    other = shared_dir / "other.xml"
    other.write_text(xml.replace("<vcpu", "<!-- --><vcpu").replace(">1</vcpu>", ">2</vcpu>"))
    restore_fails = ("restore", "--connect", "qemu:///system", "--xml", other, path)
    assert "vCPU" in host.tool(*restore_fails, status=14).stderr
    other.write_text(xml.replace("<devices>", "<launchSecurity type='sev'/><devices>"))
    assert "launch security" in host.tool(*restore_fails, status=5).stderr
    assert (host.qemus(), sidecars(host), left_beside(shared_dir)) == ([], [], [])

    elsewhere = shared_dir / "elsewhere.console"
    other.write_text(xml.replace(f"{shared_dir}/guest.console", str(elsewhere)))
    restore(host, path, "--xml", other, "--paused")
    assert host.virsh("domstate", "--reason", "guest").startswith("paused")
    assert str(elsewhere) in host.virsh("dumpxml", "guest")
    host.virsh("resume", "guest")
    # It goes on in the middle of its work, so nothing of its beginning is said there.
    moved = GuestConsole(elsewhere)
    moved.wait_passes(1)
    host.virsh("destroy", "guest")


def test_a_save_file_is_kept_out_of_the_page_cache(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    domain, path = saved_domain(host, shared_guest, shared_dir, fill_mib=8)
    restore(host, path, "--bypass-cache")
    said = subprocess.run(
        ["fincore", "--bytes", "--noheadings", "--output", "RES", path],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(said.stdout) == 0
    domain.console.wait_passes(1)


def test_nvram_is_made_anew_if_asked_for(
    host: Host, shared_guest: GuestImage, shared_dir: Path
) -> None:
    code, template, nvram = (shared_dir / name for name in ("code", "template", "nvram"))
    code.write_bytes(SEABIOS.read_bytes())
    template.write_bytes(bytes(VARIABLES_BYTES))
    domain = start_domain(
        host, shared_guest, shared_dir, fill_mib=8,
        firmware=f"<loader readonly='yes' type='pflash'>{code}</loader>"
        f"<nvram template='{template}'>{nvram}</nvram>",
    )  # fmt: skip
    domain.wait_ready()
    path = shared_dir / "saved"
    host.virsh("save", "guest", path)
    # QEMU writes the flash memory that it is given back to the file, but only to a whole one.
    nvram.write_bytes(bytes(4096))
    host.virsh("restore", path, status=1)
    host.tool("restore", "--connect", "qemu:///system", path, status=14)
    restore(host, path, "--reset-nvram")
    assert nvram.stat().st_size == VARIABLES_BYTES
    domain.console.wait_passes(1)


@pytest.mark.needs("libvirt")
def test_options_that_make_no_sense_are_refused_before_anything_is_converted(
    hosts: Hosts, shared_dir: Path
) -> None:
    host = hosts.get("libvirt")
    before = run_directories(host)
    path = shared_dir / "saved"
    path.write_bytes(b"no save file")
    uri = ("restore", "--connect", "qemu:///system")
    for options, name, status in (
        (("--running", "--paused"), "--running and --paused", 2),
        (("--attach-by", "preload"), "--attach-by preload", 2),
        (("--qemu", "qemu-system-x86_64"), "libvirt starts QEMU itself", 2),
        ((), "libvirt save file", 4),
    ):
        assert name in host.tool(*uri, *options, path, status=status).stderr
    assert run_directories(host) == before and left_beside(shared_dir) == []
