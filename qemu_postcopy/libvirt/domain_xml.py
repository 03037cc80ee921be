"""What a domain's XML says that matters for paging its memory, before anything is started.

The monitor is asked again when it can be had; what maps guest memory from outside of QEMU must be
known earlier, because it would do so while QEMU starts.  The XML comes from a save file and is not
trusted: it is only looked at, libvirt itself decides what becomes of it.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from qemu_postcopy.errors import ImageError
from qemu_postcopy.vm.refusals import (
    BLOB,
    BLOB_TYPES,
    ENCRYPTED,
    PINNED,
    PINNING_TYPES,
    REMAPPED,
    REMAPPING_TYPES,
    SHARED,
    SHARING_OBJECTS,
    SHARING_TYPES,
)

#: What libvirt passes on to QEMU as it is (docs/schemas/domaincommon.rng of libvirt).
ARGUMENTS = "{http://libvirt.org/schemas/domain/qemu/1.0}commandline/{*}arg"
#: Of networks and disks.  The driver nvme has the name of a device that is emulated: QEMU is asked.
PINNING_BACKENDS = ("vhost-vdpa", "virtio-blk-vfio-pci", "virtio-blk-vhost-vdpa")
SHARING_BACKENDS = ("vhost-user", "virtio-blk-vhost-user")


def parse(xml: str) -> ElementTree.Element:
    """The ``<domain>`` element.

    Raises:
        ImageError: there is none, or it declares entities, which libvirt never writes.
    """
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ImageError("the domain XML declares entities", hint="libvirt never writes such XML")
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ImageError(
            f"the domain XML is malformed: {error}", hint="save the domain again"
        ) from error
    if root.tag != "domain" or not root.findtext("name") or not root.findtext("uuid"):
        raise ImageError(
            "the domain XML names no domain", hint="a file that virsh save wrote has one"
        )
    return root


def refusals(domain: ElementTree.Element) -> list[str]:
    """Why the domain's memory cannot be paged on demand, a sentence each; empty if it can."""
    reasons = []
    for device in domain.iterfind("devices/hostdev"):
        if device.get("type") in ("pci", "mdev") or device.get("mode") == "capabilities":
            reasons.append(f"a host device ({device.get('type')}): {PINNED}")
    for interface in domain.iterfind("devices/interface"):
        kind = interface.get("type")
        if kind in ("vdpa", "hostdev"):
            reasons.append(f"an interface of type {kind}: {PINNED}")
        elif kind == "vhostuser":
            reasons.append(f"an interface of type {kind}: {SHARED}")
    for disk in domain.iterfind("devices/disk"):
        kind = disk.get("type")
        if kind in ("nvme", "vhostvdpa"):
            reasons.append(f"a disk of type {kind}: {PINNED}")
        elif kind == "vhostuser":
            reasons.append(f"a disk of type {kind}: {SHARED}")
    for driver in domain.iterfind("devices/filesystem/driver"):
        if driver.get("type") == "virtiofs":
            reasons.append(f"a virtiofs file system: {SHARED}")
    for backend in domain.iterfind("devices/crypto/backend"):
        if backend.get("model") == "vhost-user":
            reasons.append(f"a vhost-user crypto device: {SHARED}")
    for model in domain.iterfind("devices/video/driver"):
        if model.get("name") == "vhostuser":
            reasons.append(f"a vhost-user video device: {SHARED}")
    for model in domain.iterfind("devices/video/model"):
        if model.get("blob") == "on":
            reasons.append(f"a video device: {BLOB}")
    reasons += _passed_through(domain)
    if domain.find("launchSecurity") is not None:
        reasons.append(f"launch security: {ENCRYPTED}")
    return reasons


def _passed_through(domain: ElementTree.Element) -> list[str]:
    """Of what libvirt passes on unread: looked at for the words that matter, also in a JSON."""
    reasons = []
    for argument in domain.iterfind(ARGUMENTS):
        text = argument.get("value") or ""
        words = set(re.findall(r"[\w-]+", text))
        for kinds, reason in (
            ((*PINNING_TYPES, "vhost-vdpa", *PINNING_BACKENDS), PINNED),
            ((*SHARING_TYPES, *SHARING_OBJECTS, *SHARING_BACKENDS), SHARED),
            (REMAPPING_TYPES, REMAPPED),
        ):
            if any(word.startswith(kinds) for word in words):
                reasons.append(f"the argument {text!r}: {reason}")
        shows = any(word.startswith(BLOB_TYPES) for word in words)
        if shows and "blob" in words and words & {"on", "true"}:
            reasons.append(f"the argument {text!r}: {BLOB}")
    return reasons
