"""Launching QEMU: owned, watched, and every failure told in full."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from qemu_postcopy.errors import HostError, LaunchError, QmpError, UsageError
from qemu_postcopy.image.manifest import Manifest
from qemu_postcopy.vm.fit import QUESTIONS, check_fit
from qemu_postcopy.vm.launch import QemuProcess, launch
from qemu_postcopy.vm.monitor import CommandError
from qemu_postcopy.vm.qmp import Qmp
from qemu_postcopy.vm.refusals import refusals
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec, restore_arguments

MEMORY = (MemoryBackend("memfd", "m0", 64 << 20),)


def spec(qemu_binary: Path, *extra: str) -> VmSpec:
    return VmSpec(binary=str(qemu_binary), memory=MEMORY, extra_arguments=extra)


@pytest.fixture
def qemu(qemu_binary: Path, run_dir: Path):  # type: ignore[no-untyped-def]
    process = launch(spec(qemu_binary, "-S").argv(run_dir), run_dir)
    yield process
    process.kill()
    process.close()


def test_monitor_answers_and_qemu_ends_with_its_exit_code(qemu: QemuProcess) -> None:
    async def talk() -> None:
        async with await qemu.connect() as qmp:
            assert qmp.version >= (7, 0, 0)
            assert await qmp.status() == "prelaunch"
            assert await qmp.target() == "x86_64"
            assert (await qmp.machine_type()).startswith("pc-i440fx-")
            assert [backend["id"] for backend in await qmp.memory_backends()] == ["m0"]
            assert "m0" in await qmp.human("info ramblock")
            assert await refusals(qmp) == []
            await qmp.execute("quit")
            assert await qemu.wait_exit() == 0

    asyncio.run(talk())
    assert qemu.poll() == 0


def test_operators_reach_the_monitor_by_its_path_and_learn_the_pid(qemu: QemuProcess) -> None:
    async def talk() -> None:
        async with await qemu.connect(), await Qmp.connect(qemu.qmp_path) as second:
            assert second.peer_pid() == qemu.pid
            assert await second.status() == "prelaunch"

    asyncio.run(talk())
    assert stat.S_IMODE(qemu.qmp_path.stat().st_mode) == 0o600
    assert stat.S_IMODE(qemu.run_dir.stat().st_mode) == 0o700


def test_second_client_of_a_busy_monitor_is_told_so(qemu: QemuProcess) -> None:
    async def talk() -> None:
        async with await qemu.connect(), await Qmp.connect(qemu.qmp_path):
            with pytest.raises(QmpError, match="no greeting"):
                await Qmp.connect(qemu.qmp_path, timeout=0.2)

    asyncio.run(talk())


def test_refused_command_is_quoted(qemu: QemuProcess) -> None:
    async def talk() -> None:
        async with await qemu.connect() as qmp:
            with pytest.raises(CommandError, match="no-such-command") as caught:
                await qmp.execute("no-such-command")
            assert caught.value.error_class == "CommandNotFound"

    asyncio.run(talk())


def test_events_reach_a_listener_made_before_the_command(qemu: QemuProcess) -> None:
    async def talk() -> None:
        async with await qemu.connect() as qmp:
            with qmp.listen("RESUME", "STOP") as listener:
                await qmp.execute("cont")
                await qmp.execute("stop")
                stopped = await listener.wait(lambda event: event["event"] == "STOP", timeout=20)
            assert stopped["event"] == "STOP"
            with pytest.raises(QmpError, match="did not report"):
                await qmp.wait_event(["SHUTDOWN"], timeout=0.05)

    asyncio.run(talk())


def test_death_of_qemu_ends_every_wait(qemu: QemuProcess) -> None:
    async def talk() -> None:
        async with await qemu.connect() as qmp:
            with qmp.listen() as listener:
                waiting = asyncio.create_task(listener.wait(lambda event: False))
                ended = asyncio.create_task(qemu.wait_exit())
                await qmp.execute("query-status")
                os.kill(qemu.pid, signal.SIGKILL)
                with pytest.raises(QmpError, match="has ended"):
                    await asyncio.wait_for(waiting, 20)
                assert await asyncio.wait_for(ended, 20) == -signal.SIGKILL
            with pytest.raises(QmpError, match="has ended"):
                await qmp.execute("query-status")

    asyncio.run(talk())


def test_descriptor_is_usable_in_qemu(qemu: QemuProcess, run_dir: Path) -> None:
    """A migration into a passed descriptor writes a stream that begins with QEMU's magic."""

    async def talk() -> None:
        target = run_dir / "stream"
        async with await qemu.connect() as qmp:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT)
            await qmp.send_descriptor("out", descriptor)
            os.close(descriptor)
            async with qmp.migration_capabilities(events=True):
                with qmp.listen("MIGRATION") as listener:
                    await qmp.execute("migrate", {"uri": "fd:out"})
                    await listener.wait(
                        lambda event: event["data"]["status"] == "completed", timeout=60
                    )
        assert target.read_bytes()[:4] == b"QEVM"

    asyncio.run(talk())


def test_capabilities_and_parameters_are_put_back(qemu: QemuProcess) -> None:
    async def state(qmp: Qmp) -> tuple[object, object]:
        return (
            await qmp.execute("query-migrate-capabilities"),
            await qmp.execute("query-migrate-parameters"),
        )

    async def talk() -> None:
        async with await qemu.connect() as qmp:
            before = await state(qmp)
            async with (
                qmp.migration_capabilities(x_ignore_shared=True, events=True),
                qmp.migration_parameters(max_bandwidth=12345678),
            ):
                assert await state(qmp) != before
            assert await state(qmp) == before

    asyncio.run(talk())


def test_fit_of_a_launched_qemu_is_checked_without_a_further_question(
    qemu_binary: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would cost a round trip on the way to the guest's first instruction."""
    asked: list[str] = []
    process = launch(spec(qemu_binary, "-incoming", "defer").argv(run_dir), run_dir)
    image = SimpleNamespace(
        qemu_version=None,
        architecture="x86_64",
        machine="",
        blocks=[SimpleNamespace(name="m0", size_bytes=MEMORY[0].size_bytes)],
    )

    async def talk() -> None:
        process.ask_ahead(QUESTIONS)
        async with await process.connect() as qmp:
            async with await Qmp.connect(process.qmp_path) as operator:
                image.machine = await operator.machine_type()
            execute = qmp._client.execute

            async def counted(command: str, arguments: dict[str, object] | None = None) -> object:
                asked.append(command)
                return await execute(command, arguments)

            monkeypatch.setattr(qmp._client, "execute", counted)
            await check_fit(qmp, process.identity, cast(Manifest, image), allow_newer=False)

    try:
        asyncio.run(talk())
    finally:
        process.kill()
        process.close()
    assert asked == []


def test_failed_start_reports_exit_code_command_and_output(
    qemu_binary: Path, run_dir: Path
) -> None:
    process = launch(spec(qemu_binary, "-device", "no-such-device").argv(run_dir), run_dir)
    try:
        with pytest.raises(LaunchError) as caught:
            asyncio.run(process.connect())
        assert caught.value.returncode == 1
        assert "no-such-device" in caught.value.output
        assert "exit code 1" in str(caught.value)
        assert f"{qemu_binary} -machine" in str(caught.value)
    finally:
        process.kill()
        process.close()


def test_qemu_that_ends_before_it_is_looked_at_reports_the_same(
    qemu_binary: Path, run_dir: Path
) -> None:
    with pytest.raises(LaunchError) as caught:
        process = launch([str(qemu_binary), "-no-such-option"], run_dir)
        # Usually the launch comes back first: then the report comes with the connection.
        asyncio.run(process.connect())
    assert caught.value.returncode == 1
    assert "no-such-option" in caught.value.output


def test_missing_program_is_a_launch_error(run_dir: Path) -> None:
    with pytest.raises(LaunchError, match="cannot execute /no/such/qemu"):
        launch(["/no/such/qemu"], run_dir)


def test_daemonize_is_refused(run_dir: Path) -> None:
    with pytest.raises(UsageError, match="daemonize"):
        launch(["qemu-system-x86_64", "-daemonize"], run_dir)


@pytest.mark.needs("root")
def test_run_directory_of_somebody_else_is_refused(run_dir: Path) -> None:
    theirs = run_dir / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with pytest.raises(HostError, match="not a directory of this user"):
        launch(["qemu-system-x86_64"], theirs)


def test_qemu_outlives_its_launcher(qemu_binary: Path, run_dir: Path) -> None:
    """The launcher is killed without a warning; QEMU still answers on its path."""
    program = textwrap.dedent(
        """
        import asyncio, os, signal, sys
        from pathlib import Path
        from qemu_postcopy.vm.launch import launch
        process = launch(sys.argv[2:], Path(sys.argv[1]))
        asyncio.run(process.connect())
        print(process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    argv = spec(qemu_binary, "-S").argv(run_dir)
    launcher = subprocess.run(
        [sys.executable, "-c", program, str(run_dir), *argv], capture_output=True, text=True
    )
    assert launcher.returncode == -signal.SIGKILL, launcher.stderr
    pid = int(launcher.stdout)

    async def talk() -> None:
        async with await Qmp.connect(run_dir / "qmp.sock") as qmp:
            assert qmp.peer_pid() == pid
            await qmp.execute("quit")

    try:
        asyncio.run(talk())
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise


def test_restore_arguments_of_a_running_qemu_start_one_that_waits(
    qemu: QemuProcess, run_dir: Path
) -> None:
    async def talk() -> None:
        async with await qemu.connect() as qmp:
            machine_type = await qmp.machine_type()
        argv = restore_arguments(qemu.identity.cmdline(), machine_type)
        assert not any("qpc-control" in argument or "qmp.sock" in argument for argument in argv)
        second = launch(argv, run_dir / "second")
        try:
            async with await second.connect() as qmp:
                assert await qmp.status() == "inmigrate"
                assert await qmp.machine_type() == machine_type
        finally:
            second.kill()
            second.close()

    asyncio.run(talk())


def test_devices_that_pin_or_share_memory_are_refused_and_no_others() -> None:
    """No VFIO device can be had on every host, so the answers of a QEMU with such are played."""

    class Played:
        async def execute(self, command: str, arguments: dict[str, str] | None = None) -> object:
            arguments = arguments or {}
            if command == "qom-list":
                if arguments["path"] == "/machine/peripheral":
                    return [
                        {"name": "type", "type": "string"},
                        {"name": "net0", "type": "child<virtio-net-pci>"},
                        {"name": "gpu0", "type": "child<vfio-pci>"},
                        {"name": "fs0", "type": "child<vhost-user-fs-pci>"},
                        {"name": "vsock0", "type": "child<vhost-vsock-pci>"},
                        {"name": "rdma0", "type": "child<pvrdma>"},
                        {"name": "vga0", "type": "child<virtio-vga>"},
                        {"name": "blob0", "type": "child<virtio-gpu-pci>"},
                    ]
                if arguments["path"] == "/objects":
                    return [
                        {"name": "m0", "type": "child<memory-backend-memfd>"},
                        {"name": "crypto0", "type": "child<cryptodev-vhost-user>"},
                    ]
                return []
            if command == "query-named-block-nodes":
                return [
                    {"node-name": "d0", "drv": "raw"},
                    {"node-name": "d1", "drv": "nvme"},
                    {"node-name": "d2", "drv": "virtio-blk-vhost-user"},
                ]
            if command == "qom-get":
                if arguments["property"] == "blob":
                    return arguments["path"] == "/machine/peripheral/blob0"
                if arguments["property"] == "confidential-guest-support":
                    return "/objects/sev0"
                return "sev-guest"
            raise AssertionError(command)

        async def human(self, command_line: str) -> str:
            return "vdpa0: index=0,type=vhost-vdpa,\r\nnet1: index=0,type=vhost-user,"

    reasons = asyncio.run(refusals(Played()))  # type: ignore[arg-type]
    wanted = [
        ("gpu0 (vfio-pci)", "pins"),
        ("fs0 (vhost-user-fs-pci)", "maps"),
        ("rdma0 (pvrdma)", "second time"),
        ("blob0 (virtio-gpu-pci)", "udmabuf"),
        ("crypto0 (cryptodev-vhost-user)", "maps"),
        ("d1 (driver nvme)", "pins"),
        ("d2 (driver virtio-blk-vhost-user)", "maps"),
        ("vhost-vdpa network", "pins"),
        ("vhost-user network", "maps"),
        ("sev-guest", "encrypted"),
    ]
    assert len(reasons) == len(wanted)
    for reason, words in zip(reasons, wanted, strict=True):
        assert all(word in reason for word in words), reason


def test_object_whose_back_end_maps_guest_memory_is_refused_by_a_real_qemu(
    qemu_binary: Path, run_dir: Path
) -> None:
    spec = VmSpec(
        str(qemu_binary),
        memory=(MemoryBackend("memfd", "m0", 64 << 20),),
        extra_arguments=(
            "-S",
            *("-chardev", f"socket,id=c0,path={run_dir / 'crypto'},server=on,wait=off"),
            *("-object", "cryptodev-vhost-user,id=crypto0,chardev=c0"),
        ),
    )
    process = launch(spec.argv(run_dir), run_dir)

    async def ask() -> list[str]:
        async with await process.connect() as qmp:
            return await refusals(qmp)

    try:
        (reason,) = asyncio.run(ask())
        assert "crypto0 (cryptodev-vhost-user)" in reason
    finally:
        process.kill()
        process.close()
