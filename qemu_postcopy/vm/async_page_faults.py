"""Asynchronous page faults of KVM: whether a guest uses them, and whether QEMU lets it.

A guest that takes part lets another of its tasks run while one waits for a page
(Documentation/virt/kvm/x86/msr.rst).  It can where its CPU has ``kvm-asyncpf-int``, which QEMU
leaves off by default and which is part of what a guest sees of its machine:

- what we launch anew gets it (:func:`launch_offering`), under KVM, if its CPU is named;
- a guest that is restored keeps the CPU that it was saved with.  QEMU does not notice where that
  lacks it: the guest, which has asked for 'page ready' interrupts, is told that pages are missing
  and never that they are there. So that is refused here, before anything is loaded.

Trusts the image's device state as far as to take its word for what the guest has asked for.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qemu_postcopy.errors import LaunchError, MismatchError
from qemu_postcopy.vm.opening import Question

if TYPE_CHECKING:
    from qemu_postcopy.image.image import Image
    from qemu_postcopy.vm.launch import QemuProcess
    from qemu_postcopy.vm.monitor import Monitor
    from qemu_postcopy.vm.qmp import Qmp

PROPERTY = "kvm-asyncpf-int"
#: QEMU_VM_SUBSECTION, the length of the name, the name: what is in a stream only if the guest has
#: set the vector of its interrupt (vmstate_msr_async_pf_int, target/i386/machine.c).
_SUBSECTION = b"\x05\x14cpu/async_pf_int_msr"
_X86 = ("qemu-system-x86_64", "qemu-system-i386", "qemu-kvm", "kvm")

#: What :func:`require_offered` most likely asks, to be asked ahead.
QUESTIONS: tuple[Question, ...] = (
    ("query-cpus-fast", None),
    ("qom-get", {"path": "/machine/unattached/device[0]", "property": PROPERTY}),
)

#: `on`: the guest takes part; `offered`: it could, and had not asked when it was saved; `off`: its
#: CPU does not offer them.
Use = Literal["on", "offered", "off", "unknown"]


def asked_for(image: Image) -> bool:
    """Whether the guest took part when it was saved; raises ImageError, OSError."""
    with image.open_state() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return data.find(_SUBSECTION) >= 0


async def offered(qmp: Monitor) -> bool | None:
    """Whether the first CPU has them, as its guest sees it; None where QEMU does not tell.

    False under TCG, which has none whatever -cpu says, and on other architectures.

    Raises:
        QmpError: the monitor is gone.
    """
    from qemu_postcopy.vm.monitor import CommandError

    cpus = await qmp.execute("query-cpus-fast")
    if not cpus:
        return None
    try:
        value = await qmp.execute("qom-get", {"path": cpus[0]["qom-path"], "property": PROPERTY})
    except CommandError:
        return False
    return value if isinstance(value, bool) else None


async def require_offered(qmp: Monitor) -> None:
    """For a guest that takes part: QEMU must let it.

    Under TCG nothing is told to the guest, so nothing is missed.

    Raises:
        MismatchError: the guest would wait for ever for pages that are there.
    """
    if await offered(qmp) is False and (await qmp.execute("query-kvm")).get("enabled"):
        raise MismatchError(
            "the guest uses asynchronous page faults, and this QEMU's CPU does not offer them "
            f"({PROPERTY} is off): it would wait for ever for pages that are there",
            hint=f"start QEMU with the -cpu of the snapshot, {PROPERTY}=on included",
        )


def use_of(asked: bool | None, has: bool | None) -> Use:
    """The word for an operator."""
    if has is None:
        return "unknown"
    if not has:
        return "off"
    return "on" if asked else "offered"


def with_offer(argv: Sequence[str]) -> list[str]:
    """The command line of a new guest, with asynchronous page faults where it can have them.

    Unchanged unless it is a QEMU for x86 that runs under KVM, with a CPU named by -cpu that says
    nothing of them itself.
    """
    words = list(argv)
    accelerators = [
        *_values(words, "accel"),
        *(
            part.removeprefix("accel=")
            for value in _values(words, "machine", "M")
            for part in value.split(",")
            if part.startswith("accel=")
        ),
    ]
    under_kvm = "-enable-kvm" in words or any(name.startswith("kvm") for name in accelerators)
    if not words or Path(words[0]).name not in _X86 or not under_kvm or "-cpu" not in words:
        return words
    at = len(words) - words[::-1].index("-cpu")  # of its value; the last -cpu counts
    cpu = words[at] if at < len(words) else ""
    properties = [part.lstrip("+-").partition("=")[0] for part in cpu.split(",")[1:]]
    if not cpu or PROPERTY in properties or "kvm" in properties:
        return words
    words[at] = f"{cpu},{PROPERTY}=on"
    return words


async def launch_offering(argv: Sequence[str], run_dir: Path) -> tuple[QemuProcess, Qmp]:
    """Starts a new guest's QEMU, with asynchronous page faults if it accepts that.

    Not for a guest that is restored: its CPU is what it was saved with.

    Returns:
        the process and its monitor.

    Raises:
        LaunchError: it does not start without them either.
    """
    with_them = with_offer(argv)
    if with_them != list(argv):
        # It fails on an older QEMU, or with `enforce` on a host that lacks them.
        with contextlib.suppress(LaunchError):
            return await _started(with_them, run_dir)
    return await _started(argv, run_dir)


async def _started(argv: Sequence[str], run_dir: Path) -> tuple[QemuProcess, Qmp]:
    from qemu_postcopy.vm.launch import launch

    qemu = launch(argv, run_dir)
    try:
        return qemu, await qemu.connect()
    except BaseException:
        qemu.kill()
        qemu.close()
        raise


def _values(words: Sequence[str], *names: str) -> Iterator[str]:
    """What follows each of these options."""
    for word, value in itertools.pairwise(words):
        if word.startswith("-") and word.lstrip("-") in names:
            yield value
