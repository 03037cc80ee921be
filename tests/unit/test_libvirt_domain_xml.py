"""A domain whose memory cannot be paged is known by its XML, before anything was done."""

from __future__ import annotations

import pytest

from qemu_postcopy.libvirt import domain_xml
from qemu_postcopy.libvirt.hook_xml import QEMU_NAMESPACE


def refusals(devices: str = "", *arguments: str) -> list[str]:
    passed = "".join(f"<qemu:arg value='{text}'/>" for text in arguments)
    return domain_xml.refusals(
        domain_xml.parse(
            f"<domain xmlns:qemu='{QEMU_NAMESPACE}'><name>web</name><uuid>u</uuid>"
            f"<devices>{devices}</devices>"
            f"<qemu:commandline>{passed}<qemu:env name='A' value='b'/></qemu:commandline></domain>"
        )
    )


@pytest.mark.parametrize(
    ("devices", "arguments", "word"),
    [
        ("<video><model type='virtio' heads='1' blob='on'/></video>", (), "blob"),
        ("", ("-device", "virtio-gpu-pci,id=g,blob=on"), "blob"),
        ("", ("-device", '{"driver":"virtio-gpu-pci","blob":true}'), "blob"),
        ("", ("-device", "vfio-pci,host=1:2.3"), "pins"),
        ("", ("-device", '{"driver":"vhost-vdpa-device-pci"}'), "pins"),
        ("", ("-device", "vhost-user-fs-pci,chardev=c"), "zeros"),
        ("", ("-netdev", "type=vhost-user,chardev=c,id=n"), "zeros"),
        ("", ("-netdev", "vhost-vdpa,id=n"), "pins"),
        ("", ("-object", "cryptodev-vhost-user,id=c"), "zeros"),
    ],
)
def test_what_reads_memory_past_us_is_refused(
    devices: str, arguments: tuple[str, ...], word: str
) -> None:
    (reason,) = refusals(devices, *arguments)
    assert word in reason


def test_everything_else_is_not() -> None:
    video = "<video><model type='virtio' blob='off'/></video>"
    rest = ("-device", "virtio-gpu-pci,blob=off", "-device", "virtio-net-pci,vhost=on")
    assert refusals(video, *rest, "-msg", "timestamp=on") == []
