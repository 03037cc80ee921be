"""A real sshd on a test's host, and what lets another host's users and daemons in by a key.

Nothing of the machine's own ssh is used or changed: keys, configuration and known hosts lie below
the hosts' directories, and the client's configuration is seen on its host only.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from libvirtd.daemons import Host, daemon_environment
from vm.guests import wait_until

PORT = 2222


class SecureShell:
    """`client` reaches root of `server` by its name; started by :meth:`between`, ended with it."""

    def __init__(self, client: Host, server: Host) -> None:
        self.client = client
        self.server = server
        self.directory = server.directory / "ssh"

    @classmethod
    def between(cls, client: Host, server: Host) -> SecureShell:
        """Joined hosts (network.py); one connection direction."""
        made = cls(client, server)
        made.directory.mkdir(mode=0o700)
        for name in ("host", "client"):
            made._make_key(made.directory / name)
        made._start_server()
        made._configure_client()
        return made

    @property
    def uri(self) -> str:
        return f"qemu+ssh://root@{self.server.name}/system"

    @property
    def key(self) -> Path:
        """The client's, as its configuration names it."""
        return self.client.directory / "ssh-key"

    def with_a_key_of_ones_own(self) -> list[str]:
        """Before a command on the client: it has a key, also while :attr:`key` is away."""
        configuration = self.client.directory / "ssh_config-own"
        text = (self.client.directory / "ssh_config").read_text()
        configuration.write_text(text.replace(str(self.key), str(self.directory / "client")))
        script = f'mount --bind {configuration} /etc/ssh/ssh_config; exec "$@"'
        return ["unshare", "-m", "sh", "-ec", script, "sh"]

    def _make_key(self, path: Path) -> None:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def _start_server(self) -> None:
        known = self.directory / "authorized_keys"
        known.write_text((self.directory / "client.pub").read_text())
        configuration = self.directory / "sshd_config"
        configuration.write_text(
            f"Port {PORT}\nHostKey {self.directory}/host\nAuthorizedKeysFile {known}\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\n"
            f"StrictModes no\nUseDNS no\nPidFile {self.directory}/pid\n"
        )
        self.server.run("mkdir", "-p", "-m", "755", "/run/sshd")
        log = self.server.directory / "log/sshd"
        command = ("/usr/sbin/sshd", "-f", configuration, "-E", log)
        self.server.run(*command, env=daemon_environment())  # it goes into the background
        wait_until((self.directory / "pid").exists, f"sshd listens, see {log}")

    def _configure_client(self) -> None:
        key, known = self.key, self.client.directory / "known_hosts"
        key.write_bytes((self.directory / "client").read_bytes())
        key.chmod(0o600)
        public = " ".join((self.directory / "host.pub").read_text().split()[:2])
        known.write_text(f"[{self.server.name}]:{PORT} {public}\n")
        configuration = self.client.directory / "ssh_config"
        configuration.write_text(
            f"Host {self.server.name}\n  Port {PORT}\n  IdentityFile {key}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {known}\n  StrictHostKeyChecking yes\n"
        )
        self.client.run("mount", "--bind", configuration, "/etc/ssh/ssh_config")
