"""``qemu-postcopy libvirt install-hooks``: one script in libvirt's directory of hooks, one library.

libvirt runs ``hooks/qemu`` and then, since 6.5, every script in ``hooks/qemu.d`` in the order of
their names, each with the XML that those before it have left: ours is one of them, and others stay
as they are.  Installing twice changes nothing; an update of the package is installed again.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from qemu_postcopy.errors import HostError, UsageError
from qemu_postcopy.libvirt.hook import LIBRARY
from qemu_postcopy.libvirt.metadata import NAMESPACE
from qemu_postcopy.vm.preload import library

HOOKS = Path("/etc/libvirt/hooks")
SCRIPT_NAME = "50-qemu-postcopy"
MARK = "qemu-postcopy libvirt install-hooks"
TEMPLATE = Path(__file__).with_name("data") / "hook.sh"


@dataclass(frozen=True)
class Installed:
    """What was done.  ``restart``: libvirt looks for hooks only when it starts, and it may have had
    none."""

    script: Path
    library: Path
    changed: bool
    restart: bool


def script_text() -> str:
    """The hook, for this installation."""
    values = {"@NAMESPACE@": NAMESPACE, "@LIBRARY@": str(LIBRARY), "@PYTHON@": sys.executable}
    text = TEMPLATE.read_text()
    for mark, value in values.items():
        if "'" in value or "\n" in value:
            raise HostError(
                f"a script cannot name {value!r}", hint="install qemu-postcopy at another place"
            )
        text = text.replace(mark, value)
    return text


def install(hooks: Path = HOOKS) -> Installed:
    """Writes script and library where they are not there as they should be.

    Raises:
        HostError: this needs root, or cannot be written.
        UsageError: somebody else's script has our name.
    """
    script = hooks / "qemu.d" / SCRIPT_NAME
    first = not (hooks / "qemu").exists() and not any(script.parent.glob("*"))
    text = script_text().encode()
    source = library()
    try:
        _require_ours(script)
        changed = _write(LIBRARY, source.read_bytes(), 0o644)
        # QEMU's user reads it, whatever the umask is that this was called with.
        LIBRARY.parent.chmod(0o755)
        changed = _write(script, text, 0o755) or changed
    except OSError as error:
        raise _refused(error) from error
    return Installed(script, LIBRARY, changed, first)


def remove(hooks: Path = HOOKS) -> Installed:
    """Takes both away, if they are there.  What is being served is served on.

    Raises: as :func:`install`.
    """
    script = hooks / "qemu.d" / SCRIPT_NAME
    try:
        _require_ours(script)
        changed = script.exists() or LIBRARY.exists()
        script.unlink(missing_ok=True)
        # A QEMU that has it loaded keeps it.
        shutil.rmtree(LIBRARY.parent, ignore_errors=True)
    except OSError as error:
        raise _refused(error) from error
    return Installed(script, LIBRARY, changed, restart=False)


def is_installed(hooks: Path = HOOKS) -> bool:
    """Whether script and library are there; libvirt may not have seen them yet."""
    return (hooks / "qemu.d" / SCRIPT_NAME).exists() and LIBRARY.exists()


def _require_ours(script: Path) -> None:
    if script.exists() and MARK not in script.read_text(errors="replace"):
        raise UsageError(f"{script} is not ours", hint="rename it, and try again")


def _refused(error: OSError) -> HostError:
    hint = "run it as root" if os.geteuid() else "look at its permissions"
    return HostError(f"{error.filename} cannot be changed: {error.strerror}", hint=hint)


def _write(path: Path, content: bytes, mode: int) -> bool:
    """In one step; libvirt may be running the old one.  Returns whether it was otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
        return False
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    temporary.chmod(mode)
    temporary.rename(path)
    return True
