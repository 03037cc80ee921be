"""Programs and Python modules that this package works with: found on PATH, then run.

A program that cannot be run, or does not answer in time, counts as missing.  A compiler is tried by
compiling, since a cc without static C library does not help the demo.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from qemu_postcopy.doctor.report import Finding

AREA_QEMU = "QEMU"
AREA_LIBRARIES = "libraries"
AREA_TOOLS = "tools"

ANSWER_SECONDS = 10.0

#: machine of uname(2) -> QEMU's name of it; attaching is written for these two.
TARGETS = {"x86_64": "x86_64", "aarch64": "aarch64"}
#: Where RHEL and its relatives keep their only QEMU.
RHEL_QEMU = Path("/usr/libexec/qemu-kvm")

VERSION = re.compile(r"\d+\.\d+(?:\.\d+)?")


def answer(*command: str) -> str | None:
    """Standard output of a program; None where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=ANSWER_SECONDS,
            check=True,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def version_in(text: str) -> str:
    """The first thing in it that looks like a version."""
    match = VERSION.search(text)
    return match.group() if match else "unknown"


def qemu_binaries(machine: str) -> list[str]:
    """Paths of the QEMU binaries for this machine and the other one that can be served."""
    order = sorted(TARGETS.values(), key=lambda target: target != TARGETS.get(machine))
    found = [shutil.which(f"qemu-system-{target}") for target in order]
    if RHEL_QEMU.exists():
        found.insert(0, str(RHEL_QEMU))
    return [path for path in found if path]


def qemu_finding(path: str, machine: str) -> Finding:
    """What one binary says of itself."""
    name = Path(path).name
    banner = answer(path, "--version")
    accelerators = [
        word for word in (answer(path, "-accel", "help") or "").split() if word in ("kvm", "tcg")
    ]
    native = name in (f"qemu-system-{TARGETS.get(machine)}", RHEL_QEMU.name)
    return Finding(
        f"qemu.{name}",
        AREA_QEMU,
        path,
        "ok" if banner else "missing",
        f"version {version_in(banner)}, accelerators {' '.join(accelerators) or 'none'}"
        if banner
        else "does not run",
        "Guests of this architecture cannot be run.",
        "" if banner else f"Find out by hand: {path} --version",
        data={
            "path": path,
            "version": version_in(banner) if banner else None,
            "accelerators": accelerators,
            "native": native,
        },
    )


def qemu_findings(machine: str) -> list[Finding]:
    """The summary, which is essential, and one finding for each binary."""
    binaries = [qemu_finding(path, machine) for path in qemu_binaries(machine)]
    usable = [f for f in binaries if f.status == "ok" and f.data["native"]]
    summary = Finding(
        "qemu.native",
        AREA_QEMU,
        f"a QEMU for {machine} guests",
        "ok" if usable else "missing",
        ", ".join(str(f.data["version"]) for f in usable) if usable else "none on PATH",
        "No guest can be run on this host.",
        "" if usable else "qemu-postcopy doctor --install",
        essential=True,
        data={"paths": [f.data["path"] for f in usable]},
    )
    return [summary, *binaries]


def architecture_finding(machine: str) -> Finding:
    known = machine in TARGETS
    return Finding(
        "host.architecture",
        AREA_QEMU,
        "processor architecture",
        "ok" if known else "missing",
        machine,
        "Attaching to QEMU is written for x86_64 and aarch64.",
        "" if known else "Use a host of one of these.",
        essential=True,
    )


def libvirt_finding() -> Finding:
    """The daemon and the shell; the Python binding is told in the data."""
    has_binding = importlib.util.find_spec("libvirt") is not None
    daemon = next(
        (
            version_in(text)
            for program in ("libvirtd", "virtqemud")
            if (path := shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin"))
            and (text := answer(path, "--version"))
        ),
        None,
    )
    shell = answer("virsh", "--version")
    parts = [
        f"daemon {daemon}" if daemon else "no daemon",
        f"virsh {version_in(shell)}" if shell else "no virsh",
        "Python module" if has_binding else "no Python module",
    ]
    return Finding(
        "libraries.libvirt",
        AREA_LIBRARIES,
        "libvirt",
        "ok" if daemon and shell else "missing",
        ", ".join(parts),
        "Nothing of this version: it drives QEMU by QMP. libvirt's own commands need it.",
        "" if daemon and shell else "qemu-postcopy doctor --install",
        data={
            "daemon": daemon,
            "virsh": version_in(shell) if shell else None,
            "python_module": has_binding,
        },
    )


def libnbd_finding() -> Finding:
    there = importlib.util.find_spec("nbd") is not None
    return Finding(
        "libraries.libnbd",
        AREA_LIBRARIES,
        "libnbd, Python module",
        "ok" if there else "missing",
        "there" if there else "not found",
        "Nothing of this version: pages come from local files.",
        "" if there else "Install python3-libnbd.",
    )


def compiler_finding() -> Finding:
    """Compiles and runs a static program, as the builder of the test guest does."""
    with tempfile.TemporaryDirectory(prefix="qpc-doctor-") as folder:
        source = Path(folder, "probe.c")
        program = Path(folder, "probe")
        source.write_text('#include <stdio.h>\nint main(void) { return puts("works") < 0; }\n')
        built = answer("cc", "-static", "-o", str(program), str(source)) is not None
        works = built and answer(str(program)) == "works\n"
    return Finding(
        "tools.static_cc",
        AREA_TOOLS,
        "a C compiler that links statically",
        "ok" if works else "missing",
        "compiled and ran a program"
        if works
        else "there, but it does not link statically"
        if shutil.which("cc")
        else "no cc on PATH",
        "The test guest cannot be built: no demo, no benches, no tests with a guest.",
        "" if works else "qemu-postcopy doctor --install",
    )


def debian_tools_findings() -> list[Finding]:
    """apt and dpkg: the test guest is made of Debian packages."""
    programs = {name: shutil.which(name) for name in ("apt-get", "dpkg-deb")}
    missing = [name for name, path in programs.items() if not path]
    findings = [
        Finding(
            "tools.debian",
            AREA_TOOLS,
            "apt-get and dpkg-deb",
            "missing" if missing else "ok",
            "no " + " and no ".join(missing) if missing else "there",
            "The test guest, made of Debian packages, cannot be built: no demo and no benches.",
            "Run the demo on Debian or Ubuntu." if missing else "",
        )
    ]
    if not missing:
        there = any(Path("/var/lib/apt/lists").glob("*_Packages*"))
        findings.append(
            Finding(
                "tools.apt_lists",
                AREA_TOOLS,
                "apt's package lists",
                "ok" if there else "missing",
                "there" if there else "empty",
                "Nothing can be installed or downloaded by apt.",
                "" if there else "qemu-postcopy doctor --install",
            )
        )
    return findings


def probe() -> list[Finding]:
    """Runs each program once."""
    machine = platform.machine()
    return [
        architecture_finding(machine),
        *qemu_findings(machine),
        libvirt_finding(),
        libnbd_finding(),
        compiler_finding(),
        *debian_tools_findings(),
    ]
