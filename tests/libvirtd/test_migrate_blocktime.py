"""What virtual CPUs wait for pages is counted by QEMU where it was told to, and libvirt has no way
to tell it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from libvirtd.daemons import Host
from libvirtd.domains import MIB, Domain, domain_xml
from libvirtd.pairs import FILL_MIB, SLOW, Pair
from vm.guests import PATIENCE, GuestConsole

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = pytest.mark.needs("guest", "uffd", "root")

#: Below /var/lib/libvirt, which each host has for itself.
MONITOR = "qemu/second.monitor"
COUNT = {"capabilities": [{"capability": "postcopy-blocktime", "state": True}]}
#: Long enough for what is done in pre-copy, and within its first pass (QEMU 7.2).
POLICY = ("--switch-after", 4, "--after-passes", 1000, "--no-on-stall", "--accept-lost-writes")


def ask(host: Host, command: str, arguments: object) -> Any:
    """Of the second monitor of the host's only QEMU."""
    with socket.socket(socket.AF_UNIX) as stream, stream.makefile("rw") as file:
        stream.connect(str(host.directory / "lib" / MONITOR))
        file.readline()
        answers = []
        for message in (
            {"execute": "qmp_capabilities"},
            {"execute": command, "arguments": arguments},
        ):
            file.write(json.dumps(message) + "\n")
            file.flush()
            while "event" in (answer := json.loads(file.readline())):
                pass
            answers.append(answer)
    return answers[-1]["return"]


def with_monitor(xml: str) -> str:
    """A domain whose QEMU has a monitor beside libvirt's, wherever it is started."""
    argument = f"unix:/var/lib/libvirt/{MONITOR},server=on,wait=off"
    return xml.replace(
        "<domain ", "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' ", 1
    ).replace(
        "</domain>",
        f"<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='{argument}'/>"
        "</qemu:commandline></domain>",
    )


@pytest.mark.soak
def test_blocked_times_are_reported_where_qemu_has_counted_them(
    pair: Pair, shared_guest: GuestImage, shared_dir: Path
) -> None:
    console = shared_dir / "guest.console"
    xml = with_monitor(domain_xml("guest", shared_guest, console, fill_mib=FILL_MIB, vcpus=2))
    file = shared_dir / "guest.xml"
    file.write_text(xml)
    pair.source.virsh("create", file)
    domain = Domain(pair.source, "guest", GuestConsole(console), xml)
    domain.wait_ready()
    pair.link.limit(4 * MIB)
    begun = pair.begin(*POLICY)
    begun.wait_said("pre-copy, pass 1")
    # libvirt's own way to that QEMU is closed, also for a question, until the guest is whole.
    question = ("qemu-monitor-command", "guest", '{"execute":"query-version"}')
    asking = pair.target.popen("virsh", *question)
    assert ask(pair.target, "migrate-set-capabilities", COUNT) == {}
    pair.wait_postcopy()
    assert asking.poll() is None
    pair.link.limit(SLOW)
    blocktime = begun.report()["blocktime"]
    assert len(blocktime["cpu_ms"]) == 2 and max(blocktime["cpu_ms"]) > 0
    assert blocktime["all_ms"] <= min(blocktime["cpu_ms"])
    assert pair.where() == ([], ["guest"])
    domain.console.wait_passes(1)
    assert asking.wait(PATIENCE) == 0
