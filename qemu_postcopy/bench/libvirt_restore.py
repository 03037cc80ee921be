"""``bench restore --connect``: a domain that virsh saved is resumed by virsh and lazily, in turns.

A domain is started by libvirt, fills its memory, and is saved once by ``virsh save``; then the ways
take turns.  Measured is the time from the start of the command to the first whole line that the
guest puts out, with the save file in the page cache as far as it has room.  A guest that was
stopped in the middle of a line ends that one from the device's buffer, with no instruction run, so
it does not count.  Where libvirt's hook is installed, plain virsh restores by it too.  Needs virsh
beside the daemon; the domain is TCG, has no disk, and is gone afterwards.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

from qemu_postcopy.bench.report import Ratio, Report, Result, describe_host
from qemu_postcopy.errors import HostError
from qemu_postcopy.images.builder import build
from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.libvirt import hook_xml
from qemu_postcopy.libvirt.hook_install import is_installed
from qemu_postcopy.libvirt.metadata import Settings
from qemu_postcopy.sidecar.rundir import RunDirectory, base_directory, remove_ended

FILL_SECONDS = 900.0
OUTPUT_SECONDS = 300.0
#: A file tells nobody when it grows: the resolution of what is measured.
LOOK_SECONDS = 0.001
#: How often the guest speaks.
TICK_MS = 2
#: Freeing the memory of a guest that was just ended goes on for a while.
SETTLE_SECONDS = 0.5

VIRSH = "virsh restore"
IN_PLACE = "lazy, from the save file in place"
FILE = "lazy, from the save file converted"
IMAGE = "lazy, from an image"
HOOK_FILE = "virsh restore by the hook, from the save file"
HOOK_IMAGE = "virsh restore by the hook, from an image"


@dataclass(frozen=True)
class LibvirtRestoreBench:
    """What to measure: sizes in MiB of filled memory, ``runs`` rounds of each way.

    ``directory`` gets save files and images (three times the largest size); libvirt's QEMU must be
    able to enter it.
    """

    uri: str
    sizes_mib: tuple[int, ...]
    runs: int
    directory: Path
    say: Callable[[str], None] = field(default=lambda text: None)

    def run(self) -> Report:
        """All sizes; times in milliseconds, ratios round by round.

        Raises:
            HostError: a command failed, or the guest said nothing.
        """
        if shutil.which("virsh") is None:
            raise HostError("virsh is not installed", hint="Debian: libvirt-clients")
        guest = build()
        report = Report("restore by libvirt", describe_host())
        report.notes.append("from the start of the command to the guest's first whole line")
        report.notes.append(f"{self.uri}: {self._version()}")
        if not is_installed():
            report.notes.append("not measured, since it is not installed: libvirt's hook")
        for size in self.sizes_mib:
            with self._place() as place:
                times = self._measure(_Domain(self.uri, guest, size, place))
            for way, values in times.items():
                values_ms = [1000 * value for value in values]
                report.results.append(Result(f"{way}, {size} MiB", "ms", values_ms))
            for way in times:
                if way != VIRSH:
                    name = f"{way} to {VIRSH}, {size} MiB"
                    report.ratios.append(Ratio.by_round(name, way, VIRSH, times[way], times[VIRSH]))
        return report

    def _version(self) -> str:
        said = _run(["virsh", "-c", self.uri, "version"])
        using = [line.partition(": ")[2] for line in said.splitlines() if "libvirt" in line[:14]]
        running = [line.partition(": ")[2] for line in said.splitlines() if "Running" in line]
        return ", ".join([*using[:1], *running])

    @contextmanager
    def _place(self) -> Iterator[Path]:
        place = Path(tempfile.mkdtemp(prefix="qpc-bench-", dir=self.directory))
        place.chmod(0o711)
        try:
            yield place
        finally:
            shutil.rmtree(place)

    def _measure(self, domain: _Domain) -> dict[str, list[float]]:
        self.say(f"{domain.size_mib} MiB: booting, filling, saving")
        times: dict[str, list[float]] = {}
        try:
            domain.prepare()
            ways = {
                VIRSH: domain.restore_by_virsh,
                IN_PLACE: domain.restore_in_place,
                FILE: domain.restore_file,
                IMAGE: domain.restore_image,
            }
            if is_installed():
                ways |= {HOOK_FILE: domain.hook_file, HOOK_IMAGE: domain.hook_image}
            order = list(ways.items())
            for number in range(self.runs + 1):
                self.say(
                    f"{domain.size_mib} MiB: "
                    + (f"round {number} of {self.runs}" if number else "warming up")
                )
                turn = number % len(order)
                for way, words in order[turn:] + order[:turn]:
                    seconds = domain.time(words(), served=way != VIRSH)
                    if number:
                        times.setdefault(way, []).append(seconds)
        finally:
            domain.end()
        return {way: times[way] for way in ways}


class _Domain:
    """One size's domain: its save file and image, and each way to resume it once."""

    def __init__(self, uri: str, guest: GuestImage, size_mib: int, place: Path) -> None:
        self.size_mib = size_mib
        self.name = f"qpc-bench-{uuid.uuid4().hex[:8]}"
        self._virsh = ["virsh", "-q", "-c", uri]
        self._tool = [sys.executable, "-P", "-m", "qemu_postcopy"]
        self._uri = uri
        self._guest = guest
        self._place = place
        self._console = place / "console"
        self._saved = place / "saved"
        self._image = place / "saved.qpc"
        self._lazy = place / "lazy"
        self._asking = place / "asking.xml"

    def prepare(self) -> None:
        """Starts it, waits until its memory is filled, saves and converts it."""
        xml = self._place / "domain.xml"
        xml.write_text(self._xml())
        _run([*self._virsh, "create", str(xml)])
        _wait(lambda: b"QPC tick" in self._said(), FILL_SECONDS)
        _run([*self._virsh, "save", self.name, str(self._saved)])
        _run([*self._tool, "image", "import", str(self._saved), str(self._image)])
        _run([*self._tool, "libvirt", "save-file", str(self._image), str(self._lazy)])
        asks = hook_xml.parse(_run([*self._virsh, "save-image-dumpxml", str(self._saved)]))
        hook_xml.add_settings(asks, Settings())
        self._asking.write_text(hook_xml.serialize(asks))

    def _xml(self) -> str:
        files = []
        for path in (self._guest.kernel, self._guest.initramfs):
            # Where they are only their user may read them.
            files.append(Path(shutil.copy(path, self._place)))
            files[-1].chmod(0o644)
        line = self._guest.kernel_command_line(
            "check", fill_mib=self.size_mib, zero_percent=0, tick_ms=TICK_MS
        )
        return f"""<domain type='qemu'>
  <name>{self.name}</name>
  <memory unit='MiB'>{self._guest.ram_mib(self.size_mib)}</memory>
  <vcpu>1</vcpu>
  <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model></cpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{files[0]}</kernel><initrd>{files[1]}</initrd>
    <cmdline>{escape(line)}</cmdline>
  </os>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{self._console}' append='on'/></serial>
  </devices>
</domain>
"""

    def _said(self, offset: int = 0) -> bytes:
        try:
            with self._console.open("rb") as file:
                file.seek(offset)
                return file.read()
        except OSError:
            return b""

    def restore_by_virsh(self) -> list[str]:
        """virsh's own, eager."""
        return [*self._virsh, "restore", str(self._saved)]

    def restore_in_place(self) -> list[str]:
        """Of what virsh save wrote, where it lies."""
        return self._lazily(self._saved, "--in-place")

    def restore_file(self) -> list[str]:
        """The same, converted first."""
        return self._lazily(self._saved, "--no-in-place")

    def restore_image(self) -> list[str]:
        """Of what snapshot --connect, image import or --keep-image make."""
        return self._lazily(self._image)

    def hook_file(self) -> list[str]:
        """virsh's own, of what virsh save wrote, with a domain that asks for a lazy restore."""
        return [*self.restore_by_virsh(), "--xml", str(self._asking)]

    def hook_image(self) -> list[str]:
        """virsh's own, of what `libvirt save-file` makes of an image."""
        return [*self._virsh, "restore", str(self._lazy)]

    def _lazily(self, source: Path, *options: str) -> list[str]:
        name = ["--name", self.name]
        return [*self._tool, "restore", "--connect", self._uri, *name, *options, str(source)]

    def time(self, words: list[str], *, served: bool) -> float:
        """Runs the command, and returns the seconds to the first output; ends the domain.

        Raises: HostError where nobody of ours has restored it, and that was to be.
        """
        time.sleep(SETTLE_SECONDS)
        before = self._console.stat().st_size
        began = time.monotonic()
        with tempfile.TemporaryFile() as said:
            command = subprocess.Popen(words, stdout=said, stderr=said)

            def spoke() -> bool:
                if command.poll():
                    said.seek(0)
                    raise _failed(words, command.returncode, said.read())
                grown = self._console.stat().st_size > before
                return grown and self._said(before).count(b"\n") >= 2

            _wait(spoke, OUTPUT_SECONDS)
            seconds = time.monotonic() - began
            command.wait()
        if served and not self._run_directory().exists():
            raise HostError(
                f"{' '.join(words)} has restored eagerly", hint="see libvirt's hook in the syslog"
            )
        _run([*self._virsh, "destroy", self.name])
        _wait(self._is_unserved, OUTPUT_SECONDS)
        return seconds

    def _is_unserved(self) -> bool:
        """Whether the sidecar has ended: the next run must not share the machine with it."""
        try:
            return not RunDirectory(self._run_directory()).is_served()
        except FileNotFoundError:
            return True

    def _run_directory(self) -> Path:
        return base_directory() / self.name

    def end(self) -> None:
        """Nothing of it stays behind."""
        with suppress(HostError):
            _run([*self._virsh, "destroy", self.name])
        remove_ended()


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise HostError(
                f"the guest said nothing for {seconds:g} s", hint="see QEMU's log of the domain"
            )
        time.sleep(LOOK_SECONDS)


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, check=False)
    if done.returncode:
        raise _failed(words, done.returncode, done.stdout + done.stderr)
    return done.stdout.decode(errors="replace")


def _failed(words: list[str], status: int, said: bytes) -> HostError:
    return HostError(
        f"{' '.join(words)}: exit status {status}: {said.decode(errors='replace').strip()}",
        hint="try the same by hand",
    )
