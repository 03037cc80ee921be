"""A network between two hosts, to be cut, slowed and mended as a test goes.

A pair of virtual interfaces, one in each host's network namespace: what goes wrong with it goes
wrong as on a wire.  A cut is not seen by TCP, which waits; a reset connection is seen at once.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from libvirtd.daemons import Host

INTERFACE = "link0"


@dataclass(frozen=True)
class Link:
    """Two hosts that know each other by name."""

    left: Host
    right: Host

    @classmethod
    def between(cls, left: Host, right: Host) -> Link:
        """Joins two hosts that are not joined to any other."""
        command = ["ip", "link", "add", INTERFACE, "netns", str(left.pid), "type", "veth",
                   "peer", "name", INTERFACE, "netns", str(right.pid)]  # fmt: skip
        subprocess.run(command, check=True)
        addresses = {left: "10.77.0.1", right: "10.77.0.2"}
        for host, address in addresses.items():
            host.run("ip", "addr", "add", f"{address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", INTERFACE, "up")
            # The file that is mounted over /etc/hosts: to be written in place, not replaced.
            with (host.directory / "hosts").open("a") as names:
                names.writelines(f"{where} {name.name}\n" for name, where in addresses.items())
        return cls(left, right)

    def cut(self) -> None:
        """From now on nothing arrives, and nobody is told."""
        for host in (self.left, self.right):
            host.run("iptables", "-I", "INPUT", "-i", INTERFACE, "-j", "DROP")

    def mend(self) -> None:
        """What was cut is whole; TCP sends again what was lost when its time has come."""
        for host in (self.left, self.right):
            # Fails where no such rule is (any more).
            subprocess.run(
                host.command("iptables", "-D", "INPUT", "-i", INTERFACE, "-j", "DROP"),
                capture_output=True,
                check=False,
            )

    def reset(self) -> None:
        """Ends every TCP connection between them, as a firewall does that has lost its state."""
        self.left.run("ss", "-K", "dst", "10.77.0.2")

    def limit(self, bytes_per_second: int) -> None:
        """The wire carries no more than this, in each direction."""
        rate = f"{bytes_per_second * 8 // 1000}kbit"
        for host in (self.left, self.right):
            host.run("tc", "qdisc", "replace", "dev", INTERFACE, "root", "tbf", "rate", rate,
                     "burst", "256kb", "latency", "50ms")  # fmt: skip

    def unlimit(self) -> None:
        """Takes what :meth:`limit` set away."""
        for host in (self.left, self.right):
            host.run("tc", "qdisc", "del", "dev", INTERFACE, "root")
