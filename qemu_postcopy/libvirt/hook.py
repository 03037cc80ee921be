"""What libvirt's hook does for a domain that asks for it; ``python -m qemu_postcopy.libvirt.hook``.

libvirt waits for the hook at each step of every domain, and must not be called back.  The shell
script that it starts (``data/hook.sh``) lets nearly everything through by itself and limits our
time; here a restore gets an offer and a sidecar that listens to it, a migration's XML is cleaned,
and what was left by a domain that has ended is removed.  Whatever fails here leaves the restore as
plain virsh would do it.  The one exception are lazy save files, which nobody else can restore.

Exit status: 0, with the changed XML on stdout if it was changed; REFUSED to have libvirt give up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from qemu_postcopy.errors import HostError, MismatchError, PostcopyError, StateError
from qemu_postcopy.libvirt import hook_xml
from qemu_postcopy.libvirt.metadata import Settings, settings_in
from qemu_postcopy.libvirt.system_log import tell_system_log
from qemu_postcopy.sidecar.rundir import RunDirectory, base_directory

REFUSED = 3
#: Where install-hooks puts it: QEMU's user must be able to read it, and confinement to name it.
LIBRARY = Path("/var/lib/libvirt/qemu-postcopy/qemu-postcopy-preload.so")
#: How long a sidecar may take to end after its guest.
END_SECONDS = 3.0
POLL_SECONDS = 0.02


@dataclass(frozen=True)
class SaveFile:
    """What libvirt restores from: ``key`` is its device and inode."""

    path: Path
    key: tuple[int, int]
    format: str
    was_running: bool


def main(arguments: list[str]) -> int:
    """Arguments: libvirtd's PID, then what libvirt gives its hook: domain, operation, ..."""
    daemon, name, operation, _, *_ = arguments
    text = sys.stdin.read()
    _settle_environment()
    if operation == "release":
        clean_up(name)
        return 0
    try:
        domain = hook_xml.parse(text)
    except ElementTree.ParseError as error:
        tell_system_log(name, f"its XML is not understood: {error}")
        return 0
    if operation in ("started", "reconnect"):
        begin_watch(domain)
        return 0
    changed = hook_xml.strip_offer(domain)
    status = 0
    if operation == "restore":
        status, offered = begin_restore(int(daemon), domain)
        changed = changed or offered
    if changed and status == 0:
        sys.stdout.write(hook_xml.serialize(domain))
    return status


def begin_restore(daemon: int, domain: ElementTree.Element) -> tuple[int, bool]:
    """Offers to serve the domain's QEMU, if that is wished and can be; changes its XML then.

    Returns:
        our exit status, and whether the XML was changed.
    """
    name, uuid = domain.findtext("name") or "", domain.findtext("uuid") or ""
    lazy_file = False
    try:
        settings = settings_in(domain) or Settings(restore="eager")
        found = find_save_file(daemon, uuid)
        if found is None:
            return 0, False
        from qemu_postcopy.libvirt.lazy_save import image_behind

        # Whether it is one must be known before anything can go wrong with its image.
        lazy_file = is_lazy(found.path)
        if not lazy_file and settings.restore == "eager":
            return 0, False
        if lazy_file:
            image_behind(found.path)
        elif found.format == "sparse":
            raise MismatchError("a save file in the sparse format is restored by QEMU itself")
        else:
            require_room(found.path)
        _offer(name, uuid, domain, settings, found)
        return 0, True
    except (PostcopyError, OSError) as error:
        words = error.message if isinstance(error, PostcopyError) else str(error)
        if lazy_file:
            sys.stderr.write(f"qemu-postcopy: {words}\n")
            tell_system_log(name, f"not restored: {words}")
            return REFUSED, False
        tell_system_log(name, f"restored eagerly: {words}")
        return 0, False


def _offer(
    name: str, uuid: str, domain: ElementTree.Element, settings: Settings, found: SaveFile
) -> None:
    from qemu_postcopy.libvirt import domain_xml
    from qemu_postcopy.libvirt.commands import run_name_of
    from qemu_postcopy.libvirt.hooked import HookedRestore, restore_hooked
    from qemu_postcopy.libvirt.offer import Offer
    from qemu_postcopy.paging.registration import kernel_features
    from qemu_postcopy.session import SessionOptions
    from qemu_postcopy.sidecar import process, supervisor

    if reasons := domain_xml.refusals(domain):
        raise MismatchError("its memory cannot be paged: " + "; ".join(reasons))
    if not LIBRARY.exists():
        raise MismatchError(f"{LIBRARY} is missing: run qemu-postcopy libvirt install-hooks")
    # QEMU has no right that we have not; one that accepts and gets no userfaultfd would end.
    kernel_features()
    options = SessionOptions(
        background=settings.fill, background_rate=settings.rate, drop_rights=True
    )
    order = HookedRestore(_uri(), name, uuid, found.path, options)
    run = RunDirectory.create(run_name_of(name))
    try:
        offer = Offer(run.path, uuid, found.key, packed=found.format != "raw")
    except BaseException:
        run.discard_unused()
        raise
    hook_xml.add_offer(domain, LIBRARY, offer.path)
    sidecar = process.spawn(lambda told: restore_hooked(order, offer, run, told), run)
    sidecar.reports.close()
    if settings.supervise:
        supervisor.start(run)


def require_room(file: Path) -> None:
    """HostError where the image that a save file is converted to has no room beside it."""
    needed, place = file.stat().st_blocks * 512, os.statvfs(file.parent)
    free = place.f_bavail * place.f_frsize
    if free < needed:
        raise HostError(
            f"{file.parent} has {free >> 20} MiB left, and its image would take about "
            f"{needed >> 20} MiB",
            hint="free some room there",
        )


def begin_watch(domain: ElementTree.Element) -> None:
    """Starts who has the domain's migrations go on to post-copy, if that is wished."""
    name, uuid = domain.findtext("name") or "", domain.findtext("uuid") or ""
    try:
        settings = settings_in(domain)
        if settings is None or not settings.postcopy_passes:
            return
        command = [sys.executable, "-P", "-m", "qemu_postcopy", "libvirt", "watch"]
        command += ["--connect", _uri(), "--passes", str(settings.postcopy_passes), uuid]
        # It waits for libvirt, which waits for us: only when we have ended it gets on.
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (PostcopyError, OSError) as error:
        tell_system_log(name, f"its migrations are not watched: {error}")


def _uri() -> str:
    return "qemu:///system" if os.geteuid() == 0 else "qemu:///session"


def find_save_file(daemon: int, uuid: str) -> SaveFile | None:
    """The save file of that domain among those that libvirt's daemon has open, if it has one."""
    from qemu_postcopy.image.libvirt_save import MAGIC, read_save_header

    folder = Path(f"/proc/{daemon}/fd")
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(PostcopyError, OSError):
            path = entry.readlink()
            if not path.is_file() or not os.path.samestat(path.stat(), entry.stat()):
                continue
            with path.open("rb") as file:
                if file.read(len(MAGIC)) != MAGIC:
                    continue
                header = read_save_header(file.fileno())
                status = os.fstat(file.fileno())
            from qemu_postcopy.libvirt import domain_xml

            if domain_xml.parse(header.domain_xml).findtext("uuid") == uuid:
                key = (status.st_dev, status.st_ino)
                return SaveFile(path, key, header.format, header.was_running)
    return None


def is_lazy(file: Path) -> bool:
    """Whether it stands for an image, which may be there or not."""
    from qemu_postcopy.image.libvirt_save import read_save_header
    from qemu_postcopy.libvirt.lazy_save import POINTER

    with file.open("rb") as opened:
        offset = read_save_header(opened.fileno()).stream_offset_bytes
        return os.pread(opened.fileno(), len(POINTER), offset) == POINTER


def clean_up(name: str) -> None:
    """The domain has ended, or was not started: so has its sidecar, or it does so now."""
    from qemu_postcopy.libvirt.commands import run_name_of

    run = RunDirectory(base_directory() / run_name_of(name))
    if not (run.path / "offer").is_symlink():
        return  # no restore of ours
    from qemu_postcopy.libvirt.offer import withdraw

    withdraw(run.path)
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with suppress(StateError, FileNotFoundError):
            run.lock()
            record = run.read_record(missing_ok=True)
            if record is None or not run.guest_alive(record):
                run.remove()
            run.release()
            return
        if not run.path.exists():
            return
        time.sleep(POLL_SECONDS)
    tell_system_log(name, f"its sidecar has not ended; see {run.sidecar_log}")


def _settle_environment() -> None:
    """libvirt gives its hooks little of one; see base_directory()."""
    runtime = Path(f"/run/user/{os.geteuid()}")
    if os.geteuid() != 0 and runtime.is_dir():
        os.environ.setdefault("XDG_RUNTIME_DIR", str(runtime))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
