"""Command lines: from a description, and from a running QEMU's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from qemu_postcopy.errors import ImageError, MismatchError, UsageError
from qemu_postcopy.vm.spec import MemoryBackend, VmSpec, memory_files, restore_arguments

MIB = 1 << 20
RUN_DIR = Path("/run/guest")
#: What every restore adds.
WAITS = ("-name", "debug-threads=on", "-incoming", "defer", "-S")


def restored(*arguments: str, machine_type: str = "pc-i440fx-7.2") -> list[str]:
    return restore_arguments(["qemu", *arguments], machine_type)[1:]


def test_single_backend_becomes_the_machines_memory() -> None:
    spec = VmSpec(memory=(MemoryBackend("memfd", "m0", 64 * MIB),), smp=2, cpu="qemu64")
    argv = spec.argv(RUN_DIR)
    assert argv[argv.index("-machine") + 1] == "pc,memory-backend=m0"
    assert argv[argv.index("-m") + 1] == "65536k"
    assert argv[argv.index("-object") + 1] == "memory-backend-memfd,id=m0,size=67108864,share=on"
    assert argv[argv.index("-serial") + 1] == "file:/run/guest/console.log"
    assert argv[argv.index("-cpu") + 1] == "qemu64"


def test_several_backends_become_numa_nodes() -> None:
    memory = (MemoryBackend("memfd", "a", MIB), MemoryBackend("anonymous", "b", MIB, share=False))
    argv = VmSpec(memory=memory).argv(RUN_DIR)
    nodes = [value for option, value in itertools.pairwise(argv) if option == "-numa"]
    assert nodes == ["node,nodeid=0,memdev=a", "node,nodeid=1,memdev=b"]
    assert argv[argv.index("-machine") + 1] == "pc"


def test_comma_in_a_path_is_doubled() -> None:
    memory = MemoryBackend("file", "m0", MIB, path="/dev/shm/a,b")
    assert "mem-path=/dev/shm/a,,b," in memory.option()


def test_description_survives_json() -> None:
    spec = VmSpec(
        memory=(
            MemoryBackend("hugetlb", "m0", 64 * MIB, prealloc=True),
            MemoryBackend("file", "m1", MIB, path="/dev/shm/x"),
        ),
        kernel="/boot/k",
        extra_arguments=("-no-reboot",),
    )
    assert VmSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "damage",
    [
        {"memory": None},
        {"memory": [{"kind": "memfd"}]},
        {"memory": [{"kind": "ram", "id": "m0", "size_bytes": 1}]},
        {"unknown": 1},
    ],
)
def test_damaged_description_is_an_image_error(damage: dict[str, object]) -> None:
    described = VmSpec(memory=(MemoryBackend("memfd", "m0", MIB),)).to_json() | damage
    with pytest.raises(ImageError, match="damaged"):
        VmSpec.from_json(described)


def test_impossible_memory_is_refused() -> None:
    with pytest.raises(UsageError, match="size"):
        MemoryBackend("memfd", "m0", 0)
    with pytest.raises(UsageError, match="path"):
        MemoryBackend("file", "m0", MIB)
    with pytest.raises(UsageError, match="at least one"):
        VmSpec().argv(RUN_DIR)


def test_what_a_restore_must_not_repeat_is_dropped() -> None:
    kept = ["-machine", "pc-i440fx-7.2", "-m", "64", "-serial", "file:/tmp/c", "disk.img"]
    dropped = [
        *("-qmp", "unix:/tmp/q,server=on,wait=off"),
        *("-qmp-pretty", "stdio"),
        *("-monitor", "none"),
        *("-chardev", "socket,id=mon0,path=/tmp/m,server=on"),
        *("-mon", "chardev=mon0,mode=control"),
        *("-chardev", "stdio,id=mon1"),
        *("--mon", "mon1"),
        *("-incoming", "tcp:0:4444"),
        *("-pidfile", "/tmp/p"),
        *("-loadvm", "s1"),
        *("-S", "-daemonize", "--daemonize", "-s"),
        *("-gdb", "tcp::1234"),
    ]
    assert restored(*dropped, *kept) == [*kept, *WAITS]
    assert restored(*kept, *dropped) == [*kept, *WAITS]


def test_our_own_monitors_are_dropped_again() -> None:
    from qemu_postcopy.vm.launch import control_arguments

    kept = ["-machine", "pc-i440fx-7.2"]
    added = control_arguments(7, RUN_DIR / "qmp,.sock")
    assert restored(*kept, *added) == [*kept, *WAITS]


def test_character_device_that_something_else_uses_is_kept() -> None:
    arguments = ["-M", "pc", "-chardev", "stdio,id=c0,mux=on", "-serial", "chardev:c0"]
    assert "stdio,id=c0,mux=on" in restored(*arguments, "-mon", "chardev=c0")
    device = ["-M", "pc", "-chardev", "stdio,id=c0", "-device", "isa-serial,chardev=c0"]
    assert "stdio,id=c0" in restored(*device, "-mon", "chardev=c0")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["-machine", "pc,accel=kvm"], ["-machine", "pc-i440fx-7.2,accel=kvm"]),
        (["-M", "pc"], ["-M", "pc-i440fx-7.2"]),
        (["--machine", "type=pc,usb=off"], ["--machine", "type=pc-i440fx-7.2,usb=off"]),
        (["-machine", "usb=off,type=pc"], ["-machine", "usb=off,type=pc-i440fx-7.2"]),
        (["-nodefaults"], ["-machine", "pc-i440fx-7.2", "-nodefaults"]),
        (
            ["-machine", "memory-backend=a,,b"],
            ["-machine", "pc-i440fx-7.2", "-machine", "memory-backend=a,,b"],
        ),
    ],
)
def test_machine_is_named_by_its_version(before: list[str], after: list[str]) -> None:
    assert restored(*before) == [*after, *WAITS]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-netdev", "tap,id=n0,fd=27,vhost=on,vhostfd=28"],
        ["-add-fd", "set=0,fd=3"],
        ["-chardev", "socket,id=s0,fd=9,server=on"],
    ],
)
def test_inherited_descriptors_are_refused(arguments: list[str]) -> None:
    with pytest.raises(MismatchError, match="inherited descriptors"):
        restored(*arguments)


def test_threads_are_named_once_and_as_the_operator_chose() -> None:
    named = ["-machine", "pc-i440fx-7.2", "-name", "guest=a,debug-threads=off"]
    assert restored(*named) == [*named, *WAITS[2:]]
    again = restored(*named[:2], *WAITS)
    assert again == [*named[:2], *WAITS]


def test_value_that_looks_like_an_option_is_left_alone() -> None:
    arguments = ["-machine", "pc-i440fx-7.2", "-append", "-S", "-name", "-incoming"]
    assert restored(*arguments) == [*arguments, *WAITS]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["-mem-prealloc", "-mem-path", "/dev/shm"], ["-mem-path", "/dev/shm"]),
        (
            ["-object", "memory-backend-file,id=m0,size=1G,mem-path=/dev/shm/a,,b,prealloc=on"],
            ["-object", "memory-backend-file,id=m0,size=1G,mem-path=/dev/shm/a,,b"],
        ),
        (
            ["-object", '{"qom-type":"memory-backend-memfd","id":"m0","prealloc":true,"size":1}'],
            ["-object", '{"qom-type": "memory-backend-memfd", "id": "m0", "size": 1}'],
        ),
        (["-object", "iothread,id=prealloc"], ["-object", "iothread,id=prealloc"]),
        (["-object", "{damaged"], ["-object", "{damaged"]),
    ],
)
def test_memory_is_not_filled_in_advance(before: list[str], after: list[str]) -> None:
    machine = ["-M", "pc-i440fx-7.2"]
    assert restored(*machine, *before) == [*machine, *after, *WAITS]


def test_files_that_become_guest_memory_are_known() -> None:
    argv = ["qemu", "-mem-path", "/a", "-object", "memory-backend-file,id=x,mem-path=/b,,c"]
    argv += ["-object", '{"qom-type":"memory-backend-file","mem-path":"/d"}', "-object", "rng,id=r"]
    assert memory_files(argv) == ["/a", "/b,c", "/d"]


def test_empty_command_line_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        restore_arguments([], "pc")
