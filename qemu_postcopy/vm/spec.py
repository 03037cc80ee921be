"""How a QEMU is started: a small typed description, and what becomes of a running one's arguments.

First step of a launch.  Pure: no I/O, nothing is started here.  Trusts nothing of an argument list
read from /proc/PID/cmdline or from an image further than its syntax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qemu_postcopy.errors import ImageError, MismatchError, UsageError

MemoryKind = Literal["memfd", "file", "hugetlb", "anonymous"]
MEMORY_KINDS: tuple[MemoryKind, ...] = ("memfd", "file", "hugetlb", "anonymous")


def option_value(text: str) -> str:
    """A value inside an option list: QEMU reads a doubled comma as one comma."""
    return text.replace(",", ",,")


@dataclass(frozen=True)
class MemoryBackend:
    """One memory back-end of the guest.

    Args:
        kind: where its pages live: `memfd`, `file` (``path``, on tmpfs or hugetlbfs), `hugetlb` (a
            memfd of huge pages) or `anonymous`.
        id: QEMU's id of it, the RAM block's name too.
        size_bytes: > 0.
        share: whether other processes see what is written; `anonymous` memory is private unless
            this is set, the others are private if it is not.
        path: of the file, for `file`.
        page_size_bytes: of a huge page, for `hugetlb`.
        prealloc: have QEMU fill it at the start; emptied again before a lazy restore.
    """

    kind: MemoryKind
    id: str
    size_bytes: int
    share: bool = True
    path: str | None = None
    page_size_bytes: int = 2 << 20
    prealloc: bool = False

    def __post_init__(self) -> None:
        if self.kind not in MEMORY_KINDS:
            raise UsageError(
                f"memory {self.id!r} is of an unknown kind {self.kind!r}",
                hint=f"Use one of {', '.join(MEMORY_KINDS)}.",
            )
        if self.size_bytes <= 0:
            raise UsageError(f"memory {self.id!r} has a size of {self.size_bytes} bytes")
        if (self.kind == "file") != (self.path is not None):
            raise UsageError(
                f"memory {self.id!r}: a path belongs to the kind 'file', and to no other"
            )

    def option(self) -> str:
        """The value of `-object`."""
        kind = {
            "memfd": "memory-backend-memfd",
            "hugetlb": "memory-backend-memfd",
            "file": "memory-backend-file",
            "anonymous": "memory-backend-ram",
        }[self.kind]
        parts = [kind, f"id={option_value(self.id)}", f"size={self.size_bytes}"]
        if self.path is not None:
            parts.append(f"mem-path={option_value(self.path)}")
        if self.kind == "hugetlb":
            parts += ["hugetlb=on", f"hugetlbsize={self.page_size_bytes}"]
        parts.append(f"share={'on' if self.share else 'off'}")
        if self.prealloc:
            parts.append("prealloc=on")
        return ",".join(parts)


@dataclass(frozen=True)
class VmSpec:
    """A guest to be launched; sizes are those of its memory back-ends.

    `serial` names a file in the run directory that gets the guest's first serial line, so that its
    output survives it; None for no serial line. `extra_arguments` come last, as QEMU takes them.
    """

    binary: str = "qemu-system-x86_64"
    machine: str = "pc"
    accel: str = "tcg"
    cpu: str | None = None
    smp: int = 1
    memory: tuple[MemoryBackend, ...] = ()
    kernel: str | None = None
    initrd: str | None = None
    append: str | None = None
    serial: str | None = "console.log"
    extra_arguments: tuple[str, ...] = field(default=())

    def argv(self, run_dir: Path) -> list[str]:
        """The command line, binary first; the monitor is added by the launch."""
        if not self.memory:
            raise UsageError("a guest needs at least one memory back-end")
        total_bytes = sum(backend.size_bytes for backend in self.memory)
        machine = option_value(self.machine)
        if len(self.memory) == 1:
            machine += f",memory-backend={option_value(self.memory[0].id)}"
        argv = [self.binary, "-machine", machine, "-accel", self.accel, "-nodefaults"]
        argv += ["-display", "none", "-smp", str(self.smp), "-m", f"{total_bytes >> 10}k"]
        if self.cpu is not None:
            argv += ["-cpu", self.cpu]
        for backend in self.memory:
            argv += ["-object", backend.option()]
        if len(self.memory) > 1:
            for node, backend in enumerate(self.memory):
                argv += ["-numa", f"node,nodeid={node},memdev={option_value(backend.id)}"]
        for name, value in (
            ("-kernel", self.kernel),
            ("-initrd", self.initrd),
            ("-append", self.append),
        ):
            if value is not None:
                argv += [name, value]
        if self.serial is not None:
            argv += ["-serial", f"file:{run_dir / self.serial}"]
        return [*argv, *self.extra_arguments]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that :meth:`from_json` turns back into an equal description."""
        described = asdict(self)
        described["memory"] = [asdict(backend) for backend in self.memory]
        described["extra_arguments"] = list(self.extra_arguments)
        return described

    @classmethod
    def from_json(cls, described: dict[str, Any]) -> VmSpec:
        """Raises ImageError where the object is not one of :meth:`to_json`'s."""
        try:
            values = dict(described)
            values["memory"] = tuple(MemoryBackend(**entry) for entry in described["memory"])
            values["extra_arguments"] = tuple(described["extra_arguments"])
            return cls(**values)
        except (KeyError, TypeError, UsageError) as error:
            raise ImageError(
                f"the description of how to launch the guest is damaged: {error}",
                hint="Give the QEMU command line yourself.",
            ) from error


# ---- the arguments of a QEMU that runs already ----

#: Options that a restore brings itself or that must not happen twice; with a value each ...
DROPPED_WITH_VALUE = frozenset(
    ["incoming", "pidfile", "qmp", "qmp-pretty", "monitor", "mon", "loadvm", "gdb"]
)
#: ... and without.
DROPPED = frozenset(["S", "daemonize", "s", "mem-prealloc"])
#: All other options of QEMU 7.2 to 10.0 without a value (qemu-options.hx), kept as they are.
FLAGS = frozenset(
    [
        "h",
        "help",
        "version",
        "audio-help",
        "snapshot",
        "no-fd-bootchk",
        "no-acpi",
        "no-hpet",
        "no-reboot",
        "no-shutdown",
        "nodefaults",
        "nographic",
        "full-screen",
        "no-user-config",
        "enable-kvm",
        "win2k-hack",
        "preconfig",
        "only-migratable",
        "xen-attach",
        "xen-domid-restrict",
        "semihosting",
        "singlestep",
        "old-param",
        "usb",
        "portrait",
        "enable-fips",
        "enable-sync-profile",
        "async-teardown",
    ]
)
MACHINE_OPTIONS = frozenset(["machine", "M"])
SIZE = re.compile(r"(\d+)([BKMGTPE]?)")
SHIFTS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


@dataclass(frozen=True)
class Argument:
    """One option with its value, or a disk image given without an option (empty name)."""

    text: str
    name: str
    value: str | None

    def words(self) -> list[str]:
        return [self.text] if self.value is None else [self.text, self.value]


def restore_arguments(argv: list[str], machine_type: str) -> list[str]:
    """The command line that restores into a QEMU equal to the one that was started by ``argv``.

    Dropped: monitors with their character devices, gdb stubs, `-incoming`, `-loadvm`, `-S`,
    `-daemonize`, `-pidfile`, and what has QEMU fill its memory in advance, to be taken out again
    (`-mem-prealloc`, `prealloc=`). The machine type becomes the versioned one, since an alias such
    as `pc` means another machine in another QEMU. `-incoming defer -S` is added; the monitor is
    added by the launch. QEMU is to name its threads, so that it can be told whose faults they are.

    Raises: MismatchError where the arguments name inherited descriptors, which died with the
    process that had them; UsageError for a list without a program.
    """
    if not argv:
        raise UsageError("the command line is empty", hint="Give QEMU's command line yourself.")
    arguments = split_arguments(argv[1:])
    monitors = {
        _properties(argument.value).get("chardev") or _properties(argument.value).get("", "")
        for argument in arguments
        if argument.name == "mon" and argument.value is not None
    }
    kept: list[str] = []
    typed = False
    for argument in arguments:
        value = argument.value
        if argument.name in DROPPED or argument.name in DROPPED_WITH_VALUE:
            continue
        if (
            argument.name == "chardev"
            and value is not None
            and _properties(value).get("id") in monitors
            and not _used_elsewhere(_properties(value)["id"], argument, arguments)
        ):
            continue
        if value is not None:
            _refuse_descriptors(argument)
        if argument.name == "object" and value is not None:
            kept += [argument.text, _without_prealloc(value)]
        elif argument.name in MACHINE_OPTIONS and value is not None:
            versioned = _with_machine_type(value, machine_type)
            typed = typed or versioned is not None
            kept += [argument.text, versioned or value]
        else:
            kept += argument.words()
    if not typed:
        kept = ["-machine", machine_type, *kept]
    named = any(
        argument.name == "name" and "debug-threads" in _properties(argument.value)
        for argument in arguments
    )
    if not named:
        kept += ["-name", "debug-threads=on"]
    return [argv[0], *kept, "-incoming", "defer", "-S"]


def options_of(argv: Sequence[str]) -> list[tuple[str, str | None]]:
    """Name (without dashes) and value of each option; a word that is none has the name ''."""
    return [(argument.name, argument.value) for argument in split_arguments(argv[1:])]


def memory_files(argv: list[str]) -> list[str]:
    """The paths that a QEMU started by ``argv`` maps as guest memory; files or directories."""
    paths = []
    for argument in split_arguments(argv[1:]):
        if argument.name == "mem-path" and argument.value is not None:
            paths.append(argument.value)
        elif argument.name == "object":
            path = properties_of(argument.value).get("mem-path")
            if isinstance(path, str):
                paths.append(path)
    return paths


def properties_of(value: str | None) -> Mapping[str, object]:
    """Of an object in either of QEMU's notations, `kind,key=value` and JSON."""
    if value is None or not value.startswith("{"):
        return _properties(value)
    try:
        properties = json.loads(value)
    except ValueError:
        return {}
    return properties if isinstance(properties, dict) else {}


def with_properties(value: str, changes: Mapping[str, object]) -> str:
    """A device or object with these properties instead of its own, in the notation it has."""
    if value.startswith("{"):
        return json.dumps({**properties_of(value), **changes})
    parts = [part for part in _option_list(value) if part.partition("=")[0] not in changes]
    parts += [f"{name}={changed}" for name, changed in changes.items()]
    return ",".join(option_value(part) for part in parts)


def bytes_of(size: object) -> int | None:
    """A size as QEMU takes it in either notation, `128M` or a number; None for other spellings."""
    if isinstance(size, int):
        return size
    match = SIZE.fullmatch(str(size).upper())
    return int(match[1]) << SHIFTS[match[2]] if match else None


def _without_prealloc(value: str) -> str:
    properties = properties_of(value)
    kind = properties.get("qom-type", properties.get(""))
    if "prealloc" not in properties or not str(kind).startswith("memory-backend-"):
        return value
    if value.startswith("{"):
        return json.dumps({key: item for key, item in properties.items() if key != "prealloc"})
    parts = [part for part in _option_list(value) if not part.startswith("prealloc=")]
    return ",".join(option_value(part) for part in parts)


def split_arguments(words: Iterable[str]) -> list[Argument]:
    arguments = []
    remaining = iter(words)
    for word in remaining:
        if not word.startswith("-") or word == "-":
            arguments.append(Argument(word, "", None))
            continue
        name = word.removeprefix("-").removeprefix("-")
        value = None if name in FLAGS or name in DROPPED else next(remaining, None)
        arguments.append(Argument(word, name, value))
    return arguments


def _option_list(value: str) -> list[str]:
    """`a,b=c,,d` -> [`a`, `b=c,d`]."""
    parts = value.replace(",,", "\0").split(",")
    return [part.replace("\0", ",") for part in parts]


def _properties(value: str | None) -> dict[str, str]:
    """Key and value of each part; a first part without a key has the key ''."""
    properties = {}
    for index, part in enumerate(_option_list(value or "")):
        key, equals, rest = part.partition("=")
        if equals:
            properties[key] = rest
        elif index == 0:
            properties[""] = part
    return properties


def _used_elsewhere(chardev: str, definition: Argument, arguments: list[Argument]) -> bool:
    """Whether another option than a monitor speaks through this character device."""
    for argument in arguments:
        if argument is definition or argument.value is None or argument.name == "mon":
            continue
        if f"chardev:{chardev}" in _option_list(argument.value):
            return True
        if _properties(argument.value).get("chardev") == chardev:
            return True
    return False


def _refuse_descriptors(argument: Argument) -> None:
    properties = _properties(argument.value)
    inherited = [
        key for key in ("fd", "fds", "vhostfd", "vhostfds", "sock-fd") if key in properties
    ]
    if inherited or argument.name == "add-fd":
        raise MismatchError(
            f"the guest was started with inherited descriptors ({' '.join(argument.words())}), "
            "which nobody can open again",
            hint="Give the command line for the restore yourself, or restore through libvirt "
            "where libvirt started the guest.",
        )


def _with_machine_type(value: str, machine_type: str) -> str | None:
    """The option's value with the type replaced, or None if it names none."""
    parts = _option_list(value)
    for index, part in enumerate(parts):
        key, equals, _ = part.partition("=")
        if (equals and key == "type") or (not equals and index == 0):
            parts[index] = f"type={machine_type}" if equals else machine_type
            return ",".join(option_value(part) for part in parts)
    return None
