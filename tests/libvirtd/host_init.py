"""PID 1 of a host that tests make of namespaces: private directories, then reaping.

Run by ``unshare`` in new PID, mount, UTS, network and cgroup namespaces with one argument, a JSON
object (see daemons.py).  Says ``ready`` when every mount is in place.  When its standard input
ends, because the host was closed or the test run was killed, it exits, and the kernel ends every
process of the host with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: What a host has for itself: directory below the host's own -> where it is mounted.
OWN = {
    "run": "/run",
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def prepare(
    directory: str,
    name: str,
    overlays: Sequence[str],
    files: Sequence[str],
    cgroups: Sequence[Sequence[str]],
) -> None:
    """Mounts what this host sees differently; `files` lie in `directory` and go over /etc."""
    socket.sethostname(name)
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "proc", "proc", "/proc")
    for own, mounted in cgroups:
        run("mount", "--bind", own, mounted)
    if overlays:
        lower = ":".join([*overlays, "/usr"])
        run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower}", "/usr")
        # All that lies in a directory of modules is loaded: no mixture of two versions there.
        for modules in (path for top in overlays for path in Path(top).glob("lib/*-linux-gnu/*")):
            if modules.name in ("libvirt", "qemu"):
                below = modules.relative_to(modules.parents[2])
                run("mount", "--bind", str(modules), str(Path("/usr") / below))
    for own, target in OWN.items():
        Path(target).mkdir(parents=True, exist_ok=True)
        run("mount", "--bind", f"{directory}/{own}", target)
    hide_kvm(f"{directory}/dev")
    for file in files:
        run("mount", "--bind", f"{directory}/{file}", f"/etc/{file}")
    run("ip", "link", "set", "lo", "up")


def hide_kvm(staging: str) -> None:
    """A /dev without kvm, since domains here are TCG.

    A /dev/kvm that root may open and libvirt's QEMU may not has libvirtd ask the emulator anew at
    each start of a domain, for 4 to 8 s (virQEMUCapsIsValid, src/qemu/qemu_capabilities.c); one
    that is mounted over libvirt would carry into each QEMU's own /dev, and fail to.
    """
    Path(staging).mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755,nosuid", "tmpfs", staging)
    for entry in os.scandir("/dev"):
        target = f"{staging}/{entry.name}"
        if entry.name == "kvm":
            continue
        if entry.is_dir(follow_symlinks=False):
            Path(target).mkdir()
            run("mount", "--rbind", entry.path, target)
        else:
            run("cp", "-a", entry.path, target)
    run("mount", "--move", staging, "/dev")


def main() -> None:
    prepare(**json.loads(sys.argv[1]))
    # Orphans come to PID 1; ignoring SIGCHLD has the kernel collect them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while os.read(0, 4096):
        pass


if __name__ == "__main__":
    main()
