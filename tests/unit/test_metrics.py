"""Promise: the exporter says what is wrong with its call, and with its host."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qemu_postcopy.errors import UsageError
from qemu_postcopy.metrics import parse_address


def test_addresses() -> None:
    assert parse_address("127.0.0.1:9469") == ("127.0.0.1", 9469)
    assert parse_address("[::1]:0") == ("::1", 0)


@pytest.mark.parametrize("text", ["", "9469", ":9469", "::1:9469", "host:", "host:x", "host:65536"])
def test_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_without_its_package_it_says_which() -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None; "
        "from qemu_postcopy.cli import main; sys.argv = ['qemu-postcopy', 'metrics']; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 3
    assert "qemu-postcopy[metrics]" in done.stderr
