"""Streams of a real QEMU: into an image, out of it again, and loaded by a stock QEMU."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_postcopy.errors import ImageError, OperationCancelledError, UsageError
from qemu_postcopy.image.convert import export, import_image, inspect_file
from qemu_postcopy.image.device_state import open_device_state
from qemu_postcopy.image.image import Image
from qemu_postcopy.image.stream import Demultiplexer
from qemu_postcopy.image.writer import ImageWriter
from qemu_postcopy.vm.launch import QemuProcess, launch
from qemu_postcopy.vm.qmp import Qmp
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec

RAM_BYTES = 64 << 20
TIMEOUT_SECONDS = 60.0


@contextmanager
def machine(
    binary: Path, run_dir: Path, name: str, *extra: str
) -> Iterator[tuple[QemuProcess, Path]]:
    """A paused machine without a guest, and the file that is its memory."""
    directory = run_dir / name
    directory.mkdir(mode=0o700)
    memory = directory / "memory"
    backend = MemoryBackend("file", "m0", RAM_BYTES, path=str(memory))
    spec = VmSpec(binary=str(binary), memory=(backend,), extra_arguments=("-S", *extra))
    process = launch(spec.argv(directory), directory)
    try:
        yield process, memory
    finally:
        process.kill()
        process.close()


def write_pattern(memory: Path) -> None:
    """Data in every way it can lie: single pages, runs, zero pages between, the last page."""
    content = random.Random(1)
    with memory.open("r+b") as file:
        for page in (256, 258, *range(300, 2000), *range(4096, 8192, 3), (RAM_BYTES >> 12) - 1):
            file.seek(page << 12)
            file.write(content.randbytes(4096))


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def migrate(qmp: Qmp, uri: str, **capabilities: bool) -> None:
    async with qmp.migration_capabilities(events=True, **capabilities):
        with qmp.listen("MIGRATION") as listener:
            await qmp.execute("migrate", {"uri": uri})
            event = await listener.wait(
                lambda event: event["data"]["status"] in ("completed", "failed"), TIMEOUT_SECONDS
            )
        assert event["data"]["status"] == "completed"


async def load(qmp: Qmp, uri: str, **capabilities: bool) -> None:
    async with qmp.migration_capabilities(events=True, **capabilities):
        with qmp.listen("MIGRATION") as listener:
            await qmp.execute("migrate-incoming", {"uri": uri})
            event = await listener.wait(
                lambda event: event["data"]["status"] in ("completed", "failed"), TIMEOUT_SECONDS
            )
        assert event["data"]["status"] == "completed"
        assert await qmp.status() in ("paused", "prelaunch")


async def snapshot(qmp: Qmp, target: Path, lazy: tuple[str, ...] = ("m0",)) -> Image:
    """As the snapshot command will do it: QEMU into a pipe, the pipe into an image."""
    read_fd, write_fd = os.pipe()
    try:
        with ImageWriter(target) as writer:
            part = Demultiplexer(read_fd, writer.directory, lazy)
            await qmp.send_descriptor("out", write_fd)
            os.close(write_fd)
            _, summary = await asyncio.gather(migrate(qmp, "fd:out"), asyncio.to_thread(part.run))
            return writer.finish(summary, architecture="x86_64", source="a test")
    finally:
        os.close(read_fd)


def make_snapshot(binary: Path, run_dir: Path) -> tuple[Image, Path]:
    with machine(binary, run_dir, "first") as (process, memory):

        async def run() -> Image:
            async with await process.connect() as qmp:
                write_pattern(memory)
                return await snapshot(qmp, run_dir / "image")

        image = asyncio.run(run())
    return image, memory


def test_snapshot_has_exactly_the_memory_of_the_guest(qemu_binary: Path, run_dir: Path) -> None:
    image, memory = make_snapshot(qemu_binary, run_dir)
    block = image.manifest.block("m0")
    assert block.size_bytes == RAM_BYTES
    assert (image.path / block.file).read_bytes() == memory.read_bytes()
    bitmap = image.data_bitmap("m0")
    content = memory.read_bytes()
    zero = bytes(4096)
    for page in range(RAM_BYTES >> 12):
        has_data = content[page << 12 : (page + 1) << 12] != zero
        assert bool(bitmap[page // 8] >> page % 8 & 1) == has_data, page
    assert block.data_bytes == int.from_bytes(bitmap, "little").bit_count() * 4096
    Image.open(image.path).verify()


def test_image_s_files_are_private_and_the_state_names_itself_lazy(
    qemu_binary: Path, run_dir: Path
) -> None:
    image, _ = make_snapshot(qemu_binary, run_dir)
    modes = {path: path.stat().st_mode & 0o777 for path in [image.path, *image.path.rglob("*")]}
    assert all(mode == (0o700 if path.is_dir() else 0o600) for path, mode in modes.items()), modes
    assert (image.path / "state.bin").read_bytes()[:4] == b"QEVL"
    summary, _ = inspect_file(image.path / "state.bin")
    assert summary.lazy_state
    assert {"timer", "cpu_common", "cpu"} <= {device.name for device in summary.devices}
    counts = {block.name: block.pages_data + block.pages_zero for block in summary.blocks}
    assert counts.pop("m0") == 0
    assert counts["pc.bios"] == 64


def test_exported_stream_is_restored_by_stock_qemu_with_equal_memory(
    qemu_binary: Path, run_dir: Path
) -> None:
    image, memory = make_snapshot(qemu_binary, run_dir)
    export(image, run_dir / "stream")
    with machine(qemu_binary, run_dir, "second", "-incoming", "defer") as (process, restored):

        async def run() -> None:
            async with await process.connect() as qmp:
                await load(qmp, f"exec:cat {run_dir / 'stream'}")

        asyncio.run(run())
        assert restored.read_bytes() == memory.read_bytes()


def test_device_state_alone_loads_and_leaves_lazy_memory_untouched(
    qemu_binary: Path, run_dir: Path
) -> None:
    image, _ = make_snapshot(qemu_binary, run_dir)
    with machine(qemu_binary, run_dir, "second", "-incoming", "defer") as (process, restored):

        async def run() -> None:
            async with await process.connect() as qmp:
                mark = b"not yet paged" * 300
                with restored.open("r+b") as file:
                    file.seek(32 << 20)
                    file.write(mark)
                fd = open_device_state(image)
                await qmp.send_descriptor("state", fd)
                os.close(fd)
                await load(qmp, "fd:state")
                with restored.open("rb") as file:
                    file.seek(32 << 20)
                    assert file.read(len(mark)) == mark

        asyncio.run(run())


def test_stock_qemu_refuses_the_stored_state(qemu_binary: Path, run_dir: Path) -> None:
    image, _ = make_snapshot(qemu_binary, run_dir)
    with machine(qemu_binary, run_dir, "second", "-incoming", "defer") as (process, _):

        async def run() -> None:
            async with await process.connect() as qmp:
                uri = f"exec:cat {image.path / 'state.bin'}"
                await qmp.execute("migrate-incoming", {"uri": uri})
                assert await process.wait_exit() != 0

        asyncio.run(run())
        assert "Not a migration stream" in process.output()


def test_plain_stream_imported_equals_the_snapshot(qemu_binary: Path, run_dir: Path) -> None:
    image, memory = make_snapshot(qemu_binary, run_dir)
    export(image, run_dir / "stream")
    imported = import_image(run_dir / "stream", run_dir / "imported")
    assert imported.manifest.blocks == image.manifest.blocks
    assert imported.manifest.architecture == "x86_64"
    assert (imported.path / "ram/m0").read_bytes() == memory.read_bytes()


@pytest.mark.needs("qemu10")
def test_mapped_ram_file_imported_and_exported_is_restored_with_equal_memory(run_dir: Path) -> None:
    binary = Path(os.environ["QPC_QEMU10"])
    with machine(binary, run_dir, "first") as (process, memory):

        async def save() -> None:
            async with await process.connect() as qmp:
                write_pattern(memory)
                await migrate(qmp, f"file:{run_dir / 'saved'}", mapped_ram=True)

        asyncio.run(save())
    image = import_image(run_dir / "saved", run_dir / "image")
    image.verify()
    assert (image.path / "ram/m0").read_bytes() == memory.read_bytes()
    assert inspect_file(run_dir / "saved")[0].format == "mapped-ram"
    export(image, run_dir / "exported", "mapped-ram")
    export(image, run_dir / "plain", "plain")
    for name, uri, mapped in (
        ("second", f"file:{run_dir / 'exported'}", True),
        ("third", f"exec:cat {run_dir / 'plain'}", False),
    ):
        with machine(binary, run_dir, name, "-incoming", "defer") as (process, restored):

            async def restore(process: QemuProcess, uri: str, mapped: bool) -> None:
                async with await process.connect() as qmp:
                    await load(qmp, uri, mapped_ram=mapped)

            asyncio.run(restore(process, uri, mapped))
            assert restored.read_bytes() == memory.read_bytes()


def test_cancelled_snapshot_leaves_nothing_and_a_machine_that_can_be_saved_again(
    qemu_binary: Path, run_dir: Path
) -> None:
    with machine(qemu_binary, run_dir, "first") as (process, memory):

        async def run() -> Image:
            async with await process.connect() as qmp:
                write_pattern(memory)
                read_fd, write_fd = os.pipe()
                await qmp.send_descriptor("out", write_fd)
                os.close(write_fd)
                with pytest.raises(OperationCancelledError), ImageWriter(run_dir / "image") as w:
                    part = Demultiplexer(read_fd, w.directory, ["m0"])
                    with qmp.listen("MIGRATION") as listener:
                        async with qmp.migration_capabilities(events=True):
                            # Nothing comes yet: the thread waits in its first read.
                            reading = asyncio.create_task(asyncio.to_thread(part.run))
                            await asyncio.sleep(0)
                            part.cancel()
                            await qmp.execute("migrate", {"uri": "fd:out"})
                            await qmp.execute("migrate_cancel")
                            os.close(read_fd)
                            await listener.wait(
                                lambda event: event["data"]["status"] in ("cancelled", "failed"),
                                TIMEOUT_SECONDS,
                            )
                    await reading
                assert names_in(run_dir) == ["first"]
                return await snapshot(qmp, run_dir / "image")

        image = asyncio.run(run())
        assert (image.path / "ram/m0").read_bytes() == memory.read_bytes()


def test_block_that_is_not_there_is_named_before_any_page_is_read(
    qemu_binary: Path, run_dir: Path
) -> None:
    image, _ = make_snapshot(qemu_binary, run_dir)
    export(image, run_dir / "stream")
    with pytest.raises(UsageError, match=r"no RAM block pc\.ram"):
        import_image(run_dir / "stream", run_dir / "other", lazy_block_names=["pc.ram"])
    assert not (run_dir / "other").exists()


def test_stream_cut_anywhere_is_refused(qemu_binary: Path, run_dir: Path) -> None:
    image, _ = make_snapshot(qemu_binary, run_dir)
    stream = run_dir / "stream"
    export(image, stream)
    summary, _ = inspect_file(stream)
    size = stream.stat().st_size
    cuts = {0, 3, 4, 7, 8, 9, 13, 20, size - 1, size - 2}
    for section in summary.sections:
        end = section.offset_bytes + section.size_bytes
        cuts |= {section.offset_bytes + 1, section.offset_bytes + 20, end - 5, end - 1, end}
    for device in summary.devices:
        end = device.offset_bytes + device.size_bytes
        cuts |= {device.offset_bytes + 3, end - 1, end, end + 1}
    for cut in sorted(cuts, reverse=True):
        os.truncate(stream, cut)
        with pytest.raises(ImageError):
            import_image(stream, run_dir / "other")
        assert not (run_dir / "other").exists()


def test_progress_grows_while_the_stream_is_read(qemu_binary: Path, run_dir: Path) -> None:
    image, _ = make_snapshot(qemu_binary, run_dir)
    export(image, run_dir / "stream")
    data = (run_dir / "stream").read_bytes()
    read_fd, write_fd = os.pipe()
    with ImageWriter(run_dir / "other") as writer:
        part = Demultiplexer(read_fd, writer.directory, ["m0"])
        thread = threading.Thread(target=part.run)
        thread.start()
        half = len(data) // 2
        with os.fdopen(write_fd, "wb", buffering=0) as out:
            view = memoryview(data)
            sent = 0
            while sent < half:
                sent += out.write(view[sent:half])
            # All but what the pipe holds has been taken.
            progress = part.progress()
            assert progress is not None
            assert progress.bytes_read >= half - (3 << 20)
            assert progress.pages_data + progress.pages_zero > 0
            while sent < len(data):
                sent += out.write(view[sent:])
        thread.join()
        assert part.progress() is None
    os.close(read_fd)
