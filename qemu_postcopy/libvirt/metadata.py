"""What a domain's XML says to us: our element in its ``<metadata>``, read, checked and written.

Read by the hook at each restore and migration, written by ``qemu-postcopy libvirt set``.  The
schema is ``data/domain-metadata.rng``; the parser here is as strict (a test holds them together),
because what is misspelt must not be taken for a default.  Any thread.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from qemu_postcopy.errors import UsageError

#: Names the format, and stays what it is as long as that does.
NAMESPACE = "http://qemu-postcopy/xmlns/domain/1.0"
PREFIX = "postcopy"
ROOT = "paging"
SCHEMA = Path(__file__).with_name("data") / "domain-metadata.rng"
RATE_MAX = (1 << 60) - 1
PASSES_MAX = 1000


@dataclass(frozen=True)
class Settings:
    """What a domain asks for.

    Attributes:
        restore: whether ``virsh restore``, and ``virsh start`` of a managed save, page memory in:
            `lazy` or `eager`.
        fill: whether memory that nobody asks for is filled too.
        rate: of that, at most so many bytes a second; 0: no limit.
        supervise: whether another sidecar takes over if one dies.
        postcopy_passes: a live migration that may do so switches to post-copy after so many passes
            over memory; 0: as whoever migrates wishes.
    """

    restore: str = "lazy"
    fill: bool = True
    rate: int = 0
    supervise: bool = False
    postcopy_passes: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for what the schema does not allow."""
        if self.restore not in ("lazy", "eager"):
            raise _malformed(f"restore={self.restore!r}", "lazy or eager")
        if not 0 <= self.rate <= RATE_MAX:
            raise _malformed(f"rate={self.rate}", "bytes per second; 0 is no limit")
        if not 0 <= self.postcopy_passes <= PASSES_MAX:
            raise _malformed(f"passes={self.postcopy_passes}", f"0 to {PASSES_MAX}")

    def as_xml(self) -> str:
        """The element, as virDomainSetMetadata takes it: libvirt adds the namespace."""
        root = ElementTree.Element(ROOT)
        ElementTree.SubElement(root, "sidecar", restore=self.restore)
        fill = {"fill": _word(self.fill), "rate": str(self.rate)}
        ElementTree.SubElement(root, "background", fill)
        ElementTree.SubElement(root, "supervision", restart=_word(self.supervise))
        ElementTree.SubElement(root, "postcopy", passes=str(self.postcopy_passes))
        return ElementTree.tostring(root, encoding="unicode")

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def _word(value: bool) -> str:
    return "yes" if value else "no"


def _malformed(what: str, wanted: str) -> UsageError:
    return UsageError(
        f"the domain's qemu-postcopy metadata is not as it must be: {what}",
        hint=f"{wanted}; see: qemu-postcopy libvirt set --help, and the schema {SCHEMA}",
    )


def parse_settings(text: str) -> Settings:
    """Our element alone, as virDomainGetMetadata gives it (with or without its namespace).

    Raises:
        UsageError: it is not as the schema has it.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise _malformed("it declares entities", "plain elements")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise _malformed(f"no XML ({error})", "one element") from error
    return settings_of(root, bare=True)


def settings_in(domain: ElementTree.Element) -> Settings | None:
    """Those of a ``<domain>``; None where it has no element of ours.

    Raises:
        UsageError: it has one, or several, that are not as the schema has it.
    """
    found = domain.findall(f"metadata/{{{NAMESPACE}}}{ROOT}")
    if len(found) > 1:
        raise _malformed("there are several elements", "one")
    return settings_of(found[0]) if found else None


def settings_of(root: ElementTree.Element, *, bare: bool = False) -> Settings:
    """What the element says; ``bare``: it may be in no namespace."""
    if root.tag != f"{{{NAMESPACE}}}{ROOT}" and not (bare and root.tag == ROOT):
        raise _malformed(f"<{root.tag}>", f"<{ROOT}> in the namespace {NAMESPACE}")
    values: dict[str, Any] = {}
    _require_no_text(root)
    _attributes(root, ())
    seen = set()
    for child in root:
        if not isinstance(child.tag, str):
            continue  # a comment or processing instruction
        name = child.tag.removeprefix(f"{{{NAMESPACE}}}")
        if name in seen:
            raise _malformed(f"two elements <{name}>", "one")
        seen.add(name)
        if len(child) or (child.text or "").strip():
            raise _malformed(f"something inside <{name}>", "an empty element")
        if name == "sidecar":
            values.update(_attributes(child, ("restore",)))
        elif name == "background":
            given = _attributes(child, ("fill", "rate"))
            values |= {"fill": _flag(given["fill"])} if "fill" in given else {}
            values |= {"rate": _number(given["rate"])} if "rate" in given else {}
        elif name == "supervision":
            given = _attributes(child, ("restart",))
            values |= {"supervise": _flag(given["restart"])} if given else {}
        elif name == "postcopy":
            given = _attributes(child, ("passes",))
            values |= {"postcopy_passes": _number(given["passes"])} if given else {}
        else:
            raise _malformed(f"<{child.tag}>", "sidecar, background, supervision or postcopy")
    return Settings(**values)


def _require_no_text(root: ElementTree.Element) -> None:
    texts = [root.text, *(child.tail for child in root)]
    if any((text or "").strip() for text in texts):
        raise _malformed("text between the elements", "elements only")


def _attributes(element: ElementTree.Element, known: tuple[str, ...]) -> dict[str, str]:
    for name in element.keys():  # noqa: SIM118 (an Element's iteration is its children)
        if name not in known:
            raise _malformed(
                f"{name}= in <{element.tag}>", f"of its attributes: {', '.join(known) or 'none'}"
            )
    return dict(element.attrib)


def _flag(text: str) -> bool:
    if text.strip() not in ("yes", "no"):
        raise _malformed(repr(text), "yes or no")
    return text.strip() == "yes"


def _number(text: str) -> int:
    digits = text.strip()
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19:
        raise _malformed(repr(text), "a number without a sign")
    return int(digits)
