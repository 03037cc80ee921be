"""`image export`, `import`, `inspect`, `verify` of a real guest: what went out comes in again."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
from vm.guests import Lab, SharedSnapshots, cli, refused

from qemu_postcopy.images.guest_image import GuestImage

pytestmark = [pytest.mark.needs("qemu", "guest"), pytest.mark.timeout(300)]


@pytest.mark.parametrize("form", ["plain", "mapped-ram"])
def test_what_is_exported_is_imported_as_the_same_memory(
    form: str,
    lab: Lab,
    snapshots: SharedSnapshots,
    guest_image: GuestImage,
    qemu: Path,
    run_dir: Path,
) -> None:
    image = snapshots.checker(lab, guest_image, qemu).image
    file, back = run_dir / "guest.file", run_dir / "back.qpc"
    said = json.loads(cli("image", "export", "--format", form, "--json", image, file).stdout)
    assert said == {"file": str(file), "format": form, "size_bytes": file.stat().st_size}
    seen = json.loads(cli("image", "inspect", "--json", file).stdout)
    assert seen["stream"]["format"] == form and "manifest" not in seen

    made = json.loads(cli("image", "import", "--lazy", "m0", "--json", file, back).stdout)
    checked = json.loads(cli("image", "verify", "--json", back).stdout)
    assert checked["ok"] and checked["data_bytes"] == made["lazy_blocks"]["m0"] > 64 << 20
    (before,) = json.loads(cli("image", "inspect", "--json", image).stdout)["manifest"]["blocks"]
    (after,) = json.loads(cli("image", "inspect", "--json", back).stdout)["manifest"]["blocks"]
    assert after["size_bytes"] == before["size_bytes"]
    assert filecmp.cmp(image / before["file"], back / after["file"], shallow=False)


def test_what_is_no_image_and_a_block_that_is_not_there_are_refused(
    lab: Lab, snapshots: SharedSnapshots, guest_image: GuestImage, qemu: Path, run_dir: Path
) -> None:
    image = snapshots.checker(lab, guest_image, qemu).image
    file = run_dir / "guest.stream"
    cli("image", "export", image, file)
    made = run_dir / "made.qpc"
    refused("image", "import", "--lazy", "nobodys", file, made, status=2, words=["nobodys"])
    file.write_bytes(file.read_bytes()[: 1 << 20])
    refused("image", "import", file, made, status=4, words=["ends"])
    assert not made.exists()
