"""The answer of the doctor: one finding for each thing that was probed.

Plain frozen data without behaviour of its own beyond a verdict and JSON; any thread may hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warn", "missing"]

#: Version of the JSON schema: raised when a key goes or changes its meaning, not when one comes.
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was probed.

    Attributes:
        id: stable name, ``area.thing``, for scripts.
        area: heading under which people see it.
        title: what it is.
        status: ``ok``; ``warn`` where it is there but restricted; ``missing``.
        found: what the probe saw.
        cost: what does not work, or works worse, without it.
        advice: what to do about it; empty where the status is ``ok``.
        essential: without it a guest can neither be snapshotted nor restored on this host.
        data: the same as ``found`` for programs; sizes are in bytes.
    """

    id: str
    area: str
    title: str
    status: Status
    found: str
    cost: str
    advice: str = ""
    essential: bool = False
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object with one key for each attribute."""
        return {
            "id": self.id,
            "area": self.area,
            "title": self.title,
            "status": self.status,
            "found": self.found,
            "cost": self.cost,
            "advice": self.advice,
            "essential": self.essential,
            "data": dict(self.data),
        }


@dataclass(frozen=True, slots=True)
class HostReport:
    """Everything that was found on one host, at one time, with one set of rights."""

    host: Mapping[str, str]
    findings: tuple[Finding, ...]

    @property
    def can_restore(self) -> bool:
        """Whether guests can be snapshotted and restored here, by this user."""
        return not self.blockers

    @property
    def blockers(self) -> tuple[Finding, ...]:
        """The essential things that are missing."""
        return tuple(f for f in self.findings if f.essential and f.status == "missing")

    def finding(self, finding_id: str) -> Finding:
        """The finding of this id; KeyError if nothing of that name was probed."""
        for candidate in self.findings:
            if candidate.id == finding_id:
                return candidate
        raise KeyError(finding_id)

    def to_json(self) -> dict[str, Any]:
        """The document that ``qemu-postcopy doctor --json`` prints."""
        return {
            "schema": SCHEMA,
            "can_restore": self.can_restore,
            "host": dict(self.host),
            "findings": [finding.to_json() for finding in self.findings],
        }
