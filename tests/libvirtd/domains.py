"""Domains of tests: the memory checker as a libvirt guest, its console a file that is read as it
grows, on both hosts of a migration the same."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from libvirtd.daemons import Host
from vm.guests import TICK_MS, GuestConsole, wait_until

from qemu_postcopy.images.guest_image import GuestImage

MIB = 1 << 20


@dataclass(frozen=True)
class Domain:
    """A domain that was defined or started on a host; `console` is where its guest speaks."""

    host: Host
    name: str
    console: GuestConsole
    xml: str

    @property
    def ram_mib(self) -> int:
        return int(self.host.virsh("dominfo", self.name).split("Max memory:")[1].split()[0]) // 1024

    def wait_ready(self) -> None:
        """Until the guest has filled its memory and verified for some ticks."""
        wait_until(lambda: self.console.ready, f"{self.name} has filled its memory", 240)
        self.console.wait_more_ticks(3)

    def state(self, host: Host | None = None) -> str:
        """`running`, `paused`, `shut off`, as virsh says."""
        return (host or self.host).virsh("domstate", self.name).strip()


def domain_xml(
    name: str,
    image: GuestImage,
    console: Path,
    *,
    fill_mib: int = 32,
    vcpus: int = 1,
    machine: str = "pc-i440fx-7.2",
    memory_backing: str = "",
    extra_devices: str = "",
    command_line: str | None = None,
    tick_ms: int = TICK_MS,
    firmware: str = "",
    cells: str = "",
    emulator: str = "/usr/bin/qemu-system-x86_64",
) -> str:
    """A minimal TCG domain.  `machine` is one that both tested QEMUs have, by default.

    Args:
        memory_backing: content of <memoryBacking>, such as ``<source type='memfd'/>``.
        command_line: the kernel's, instead of that of the memory checker with `fill_mib`.
        firmware: <loader> and <nvram>.
        cells: <numa>.
    """
    line = command_line or image.kernel_command_line(
        "check", fill_mib=fill_mib, zero_percent=10, tick_ms=tick_ms
    )
    backing = f"<memoryBacking>{memory_backing}</memoryBacking>" if memory_backing else ""
    return f"""<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{image.ram_mib(fill_mib)}</memory>{backing}
  <vcpu>{vcpus}</vcpu>
  <cpu mode='custom' match='exact'><model fallback='forbid'>qemu64</model>{cells}</cpu>
  <os>
    <type arch='x86_64' machine='{machine}'>hvm</type>{firmware}
    <kernel>{image.kernel}</kernel><initrd>{image.initramfs}</initrd>
    <cmdline>{escape(line)}</cmdline>
  </os>
  {"<features><acpi/></features>" if firmware else ""}
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>{emulator}</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'><source path='{console}' append='on'/></serial>{extra_devices}
  </devices>
</domain>
"""


def start_domain(
    host: Host, image: GuestImage, directory: Path, name: str = "guest", **choices: object
) -> Domain:
    """A running transient domain; its console lies in `directory`, which all hosts see."""
    console = directory / f"{name}.console"
    text = domain_xml(name, image, console, **choices)  # type: ignore[arg-type]
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(text)
        file.flush()
        host.virsh("create", file.name)
    return Domain(host, name, GuestConsole(console), text)
