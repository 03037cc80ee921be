"""What the hook changes in the domain XML that libvirt is about to start: QEMU's environment.

libvirt keeps the changed XML in the running domain, and so in its next save file and at the other
end of a migration: all that is added here is recognised and taken out again.  Comments and the
prefixes of other namespaces stay.  For a process that does nothing else: the prefixes are kept in a
table of xml.etree's.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from qemu_postcopy.libvirt.metadata import NAMESPACE, PREFIX, Settings
from qemu_postcopy.vm.preload import LIBRARY, OPTIONAL_VARIABLE, SOCKET_VARIABLE

#: libvirt's own, for what it does not know of QEMU (docs/schemas/domaincommon.rng).
QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
LIBRARY_NAME = LIBRARY.name
COMMAND_LINE, VARIABLE = f"{{{QEMU_NAMESPACE}}}commandline", f"{{{QEMU_NAMESPACE}}}env"


def parse(xml: str) -> ElementTree.Element:
    """The ``<domain>``; to be written by :func:`serialize`.

    Raises:
        ElementTree.ParseError: it is malformed, or declares entities.
    """
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise ElementTree.ParseError("it declares entities, which libvirt never writes")
    for _, (prefix, uri) in ElementTree.iterparse(io.StringIO(xml), ("start-ns",)):
        # Reserved by xml.etree for what it names itself, and what would cover plain names.
        if prefix and not re.fullmatch(r"ns\d+", prefix):
            ElementTree.register_namespace(prefix, uri)
    builder = ElementTree.TreeBuilder(insert_comments=True)
    return ElementTree.fromstring(xml, ElementTree.XMLParser(target=builder))


def serialize(domain: ElementTree.Element) -> str:
    """As libvirt reads it."""
    return ElementTree.tostring(domain, encoding="unicode") + "\n"


def strip_offer(domain: ElementTree.Element) -> bool:
    """Takes out what :func:`add_offer` has added, whenever; returns whether there was anything."""
    changed = False
    for parent, entry in list(_variables(domain)):
        name, value = entry.get("name"), entry.get("value", "")
        if name in (SOCKET_VARIABLE, OPTIONAL_VARIABLE):
            parent.remove(entry)
            changed = True
        elif name == "LD_PRELOAD" and LIBRARY_NAME in value:
            # Paths divided by blanks or colons (ld.so(8)); others' libraries stay.
            rest = [part for part in re.split("[ :]+", value) if LIBRARY_NAME not in part and part]
            if rest:
                entry.set("value", ":".join(rest))
            else:
                parent.remove(entry)
            changed = True
    for parent in domain.findall(COMMAND_LINE):
        if changed and len(parent) == 0:
            domain.remove(parent)
    return changed


def add_offer(domain: ElementTree.Element, library: Path, socket: Path) -> None:
    """Has QEMU load the library and connect there, if somebody listens."""
    for _, entry in _variables(domain):
        if entry.get("name") == "LD_PRELOAD":
            entry.set("value", f"{library}:{entry.get('value', '')}")
            break
    else:
        _add(domain, "LD_PRELOAD", str(library))
    _add(domain, SOCKET_VARIABLE, str(socket))
    _add(domain, OPTIONAL_VARIABLE, "1")


def _variables(
    domain: ElementTree.Element,
) -> Iterator[tuple[ElementTree.Element, ElementTree.Element]]:
    for parent in domain.findall(COMMAND_LINE):
        for entry in parent.findall(VARIABLE):
            yield parent, entry


def _add(domain: ElementTree.Element, name: str, value: str) -> None:
    ElementTree.register_namespace("qemu", QEMU_NAMESPACE)
    parent = domain.find(COMMAND_LINE)
    if parent is None:
        parent = ElementTree.SubElement(domain, COMMAND_LINE)
    ElementTree.SubElement(parent, VARIABLE, name=name, value=value)


def add_settings(domain: ElementTree.Element, settings: Settings) -> None:
    """Our element in the metadata of a domain that has none."""
    ElementTree.register_namespace(PREFIX, NAMESPACE)
    element = ElementTree.fromstring(settings.as_xml())
    element.tag = f"{{{NAMESPACE}}}{element.tag}"
    parent = domain.find("metadata")
    if parent is None:
        parent = ElementTree.Element("metadata")
        domain.insert(0, parent)
    parent.append(element)
