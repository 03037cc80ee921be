"""Where it is told what became of a restore that libvirt began: nobody waits for an answer of ours.

Any thread; a host without a syslog loses the words.
"""

from __future__ import annotations

import syslog


def tell_system_log(domain: str, words: str) -> None:
    """A warning about that domain; journalctl -t qemu-postcopy shows it."""
    syslog.openlog("qemu-postcopy", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_WARNING, f"domain {domain}: {words}")
