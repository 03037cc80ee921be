"""Promise: guests restored together from one image all go on; what they cost is counted."""

from __future__ import annotations

import json
import subprocess

import pytest
from vm.guests import cli_command

pytestmark = [pytest.mark.needs("uffd", "ptrace", "guest", "qemu"), pytest.mark.timeout(1800)]


@pytest.mark.soak
def test_sixty_four_guests_of_one_image_go_on_together() -> None:
    done = subprocess.run(
        cli_command("bench", "guests", "--count", "64", "--json"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = {entry["name"]: entry for entry in json.loads(done.stdout)["results"]}
    assert results["restore, from the command"]["runs"] == 64
    assert results["on demand: sidecar, PSS"]["runs"] == 64
    print(done.stdout)
