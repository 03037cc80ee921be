"""A URI whose guests run elsewhere is refused with what to run where; one by ssh can be tried."""

from __future__ import annotations

import pytest

from qemu_postcopy.errors import LibvirtError
from qemu_postcopy.libvirt.connection import require_local, ssh_trial

THERE = "qemu-postcopy restore --connect qemu:///system /v/a.save"


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("qemu+ssh://root@far:2222/system", f"run: ssh -p 2222 root@far {THERE}"),
        ("qemu+ssh://far/system?keyfile=x", f"run: ssh far {THERE}"),
        ("qemu+libssh2://far/session", f"run: ssh far {THERE.replace('system', 'session')}"),
        ("qemu+tls://far/system", f"run there: {THERE}"),
        ("qemu://far/system", f"run there: {THERE}"),
        ("qemu+tcp:///system", f"run there: {THERE}"),
        ("test:///default", "give --connect qemu:///system or qemu:///session"),
    ],
)
def test_another_host_is_refused_with_the_command_to_run_there(uri: str, hint: str) -> None:
    with pytest.raises(LibvirtError) as refused:
        require_local(uri, "restore /v/a.save")
    assert refused.value.hint == hint


@pytest.mark.parametrize(
    "uri",
    ["qemu:///system", "qemu:///session", "qemu+unix:///system?socket=/run/x", "my-alias", ""],
)
def test_this_host_is_not(uri: str) -> None:
    require_local(uri)


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        ("qemu+ssh://root@far:2222/system", "ssh -o BatchMode=yes -p 2222 root@far true"),
        (
            "qemu+libssh2://far/system?keyfile=/k/id&no_verify=1",
            "ssh -o BatchMode=yes -i /k/id far true",
        ),
        ("qemu+tls://far/system", ""),
        ("qemu:///system", ""),
    ],
)
def test_what_must_work_before_a_uri_by_ssh_does_is_told(uri: str, command: str) -> None:
    assert ssh_trial(uri) == command
