"""Which command lines of a restore need no question: anything new or unusual does."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.test_manifest import MANIFEST

from qemu_postcopy.image.manifest import Block, Manifest
from qemu_postcopy.vm.foresight import foreseeable

PLAIN = (
    *("qemu-system-x86_64", "-machine", "pc-i440fx-7.2,memory-backend=m0", "-accel", "kvm"),
    *("-cpu", "host,kvm-asyncpf-int=on", "-nodefaults", "-display", "none", "-m", "4096k"),
    *("-kernel", "/boot/vmlinuz", "-append", "console=ttyS0", "-serial", "file:/run/console.log"),
    *("-drive", "file=/srv/a.qcow2,if=virtio", "-netdev", "user,id=n", "-no-reboot"),
    *("-device", "virtio-net-pci,netdev=n", "-name", "debug-threads=on", "-incoming", "defer"),
)
MEMORY = ("-object", "memory-backend-memfd,id=m0,size=4194304,share=on")


def manifest(name: str = "m0", page_size: int = 4096, count: int = 1) -> Manifest:
    block = replace(MANIFEST.blocks[0], name=name, page_size_bytes=page_size)
    blocks: tuple[Block, ...] = (block,) * count
    return replace(MANIFEST, blocks=blocks)


def test_one_memfd_among_plain_options() -> None:
    assert foreseeable([*PLAIN, *MEMORY], manifest())


@pytest.mark.parametrize(
    "extra",
    [
        ("-device", "vfio-pci,host=00:02.0"),
        ("-device", "virtio-gpu-pci,blob=on"),
        ("-device", "virtio-vga-gl"),
        ("-device", "vhost-user-fs-pci,chardev=c,tag=t"),
        ("-netdev", "vhost-vdpa,id=v,vhostdev=/dev/vhost-vdpa-0"),
        ("-drive", "file=nvme://0000:44:00.0/1"),
        ("-machine", "pc,confidential-guest-support=sev0"),
        ("-readconfig", "more.cfg"),
        ("-set", "device.a.blob=on"),
        ("-global", "virtio-gpu-pci.blob=on"),
        ("-overcommit", "mem-lock=on"),
        ("-mem-path", "/dev/shm"),
        ("-an-option-of-tomorrow", "x"),
        ("-object", "memory-backend-memfd,id=m1,size=4194304,share=on"),
        ("-object", "cryptodev-vhost-user,id=c,chardev=c"),
        ("disk.img",),
    ],
    ids=" ".join,
)
def test_whatever_else_is_there_is_asked_about(extra: tuple[str, ...]) -> None:
    assert not foreseeable([*PLAIN, *MEMORY, *extra], manifest())


@pytest.mark.parametrize(
    "memory",
    [
        "memory-backend-memfd,id=m0,size=4194304,share=off",
        "memory-backend-memfd,id=m0,size=4194304,share=on,prealloc=on",
        "memory-backend-memfd,id=m0,size=4194304,share=on,hugetlb=on",
        "memory-backend-memfd,id=m9,size=4194304,share=on",
        "memory-backend-ram,id=m0,size=4194304",
        "memory-backend-file,id=m0,size=4194304,share=on,mem-path=/dev/shm/a",
        '{"qom-type": "memory-backend-memfd", "id": "m0", "size": 4194304}',
    ],
)
def test_other_memory_is_asked_about(memory: str) -> None:
    assert not foreseeable([*PLAIN, "-object", memory], manifest())


def test_other_blocks_are_asked_about() -> None:
    assert not foreseeable([*PLAIN, *MEMORY], manifest(page_size=2 << 20))
    assert not foreseeable([*PLAIN, *MEMORY], manifest(count=2))
    assert not foreseeable([*PLAIN, *MEMORY], manifest(name="pc.ram"))


def test_a_program_whose_name_tells_no_or_another_architecture_is_asked() -> None:
    for program in ("/usr/libexec/qemu-kvm", "qemu-system-aarch64"):
        assert not foreseeable([program, *PLAIN[1:], *MEMORY], manifest())
