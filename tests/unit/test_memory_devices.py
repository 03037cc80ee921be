"""Memory devices of a command line: each where the guest has it, whatever came and went since."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn

import pytest

from qemu_postcopy.errors import MismatchError
from qemu_postcopy.vm.memory_devices import current_arguments
from qemu_postcopy.vm.monitor import Monitor
from qemu_postcopy.vm.spec import bytes_of, with_properties

MIB = 1 << 20
FIRST, SECOND = 4 << 30, 5 << 30
BACKENDS = (
    *("-object", "memory-backend-memfd,id=m0,size=128M"),
    *("-object", "memory-backend-memfd,id=m1,size=128M"),
)
DIMMS = ("-device", "pc-dimm,id=d0,memdev=m0", "-device", "pc-dimm,id=d1,memdev=m1")


def dimm(
    name: str, memdev: str, addr: int, slot: int, *, plugged: bool = False, kind: str = "dimm"
) -> dict[str, Any]:
    """An entry of query-memory-devices."""
    data = {"id": name, "memdev": f"/objects/{memdev}", "addr": addr, "slot": slot, "node": 0}
    return {"type": kind, "data": {**data, "size": 128 * MIB, "hotplugged": plugged}}


class Answers(Monitor):
    """A QEMU with these memory devices, and these sizes of back-ends."""

    version = (10, 0, 2)

    def __init__(self, devices: list[dict[str, Any]], sizes: Mapping[str, int]) -> None:
        self._devices = devices
        self._sizes = sizes

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Any:
        if command == "query-memory-devices":
            return self._devices
        if command == "query-memdev":
            return [{"id": name, "size": size} for name, size in self._sizes.items()]
        assert arguments is not None
        backend = {"type": "memory-backend-ram", "share": False, "host-nodes": []}
        backend["size"] = self._sizes[arguments["path"].removeprefix("/objects/")]
        if command == "qom-list":
            return [{"name": name} for name in backend]
        assert command == "qom-get"
        return backend[arguments["property"]]

    def listen(self, *names: str) -> NoReturn:
        raise NotImplementedError

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass


def now(
    *arguments: str, devices: list[dict[str, Any]], **sizes_mib: int
) -> list[tuple[str, dict[str, str]]]:
    """The amended command line: each option with what its value says."""
    sizes = {name: size * MIB for name, size in sizes_mib.items()}
    argv = asyncio.run(current_arguments(Answers(devices, sizes), ["qemu", *arguments]))
    assert argv[0] == "qemu"
    return [
        (option, dict(part.partition("=")[::2] for part in value.split(",")))
        for option, value in zip(argv[1::2], argv[2::2], strict=True)
    ]


def places(described: list[tuple[str, dict[str, str]]]) -> dict[str, tuple[str, int, int]]:
    """Memory, address and slot of each DIMM, by its id."""
    return {
        values["id"]: (values["memdev"], int(values["addr"]), int(values["slot"]))
        for option, values in described
        if option == "-device"
    }


def test_dimm_stays_where_it_is_when_the_one_before_it_has_gone() -> None:
    described = now(*BACKENDS, *DIMMS, devices=[dimm("d1", "m1", SECOND, 1)], m1=128)
    assert places(described) == {"d1": ("m1", SECOND, 1)}
    assert [values["id"] for option, values in described if option == "-object"] == ["m1"]


def test_dimms_that_were_plugged_in_again_in_another_order_stay_where_they_are() -> None:
    devices = [dimm("d1", "m1", FIRST, 0), dimm("d0", "m0", SECOND, 1)]
    described = now(*BACKENDS, *DIMMS, devices=devices, m0=128, m1=128)
    assert places(described) == {"d0": ("m0", SECOND, 1), "d1": ("m1", FIRST, 0)}


def test_dimms_that_swapped_their_memory_keep_their_names() -> None:
    devices = [dimm("d1", "m0", FIRST, 0), dimm("d0", "m1", SECOND, 1)]
    described = now(*BACKENDS, *DIMMS, devices=devices, m0=128, m1=128)
    assert places(described) == {"d1": ("m0", FIRST, 0), "d0": ("m1", SECOND, 1)}


def test_address_of_the_command_line_gives_way_to_the_one_there_is() -> None:
    words = f"pc-dimm,id=d1,memdev=m1,addr={FIRST:#x},slot=0"
    described = now(
        *BACKENDS, "-device", words, devices=[dimm("d1", "m1", SECOND, 1)], m0=128, m1=128
    )
    assert places(described) == {"d1": ("m1", SECOND, 1)}


def test_virtio_mem_is_told_where_it_is() -> None:
    data = {"id": "v", "memdev": "/objects/m0", "memaddr": SECOND, "size": 0, "node": 0}
    described = now(
        *BACKENDS, "-device", "virtio-mem-pci,id=v,memdev=m0",
        devices=[{"type": "virtio-mem", "data": data}], m0=128, m1=128,
    )  # fmt: skip
    assert described[-1][1]["memaddr"] == str(SECOND)


def test_back_end_that_was_made_anew_under_its_id_is_described_as_it_is() -> None:
    described = now(
        *BACKENDS, *DIMMS,
        devices=[dimm("d0", "m0", FIRST, 0, plugged=True), dimm("d1", "m1", SECOND, 1)],
        m0=256, m1=128,
    )  # fmt: skip
    objects = [values for option, values in described if option == "-object"]
    assert [(values["id"], values["size"]) for values in objects] == [
        ("m0", str(256 * MIB)),
        ("m1", "128M"),
    ]


def test_back_end_of_the_command_line_is_named_once_if_its_dimm_came_later() -> None:
    described = now(*BACKENDS, devices=[dimm("d9", "m1", FIRST, 0, plugged=True)], m0=128, m1=128)
    assert [values["id"] for option, values in described if option == "-object"] == ["m0", "m1"]
    assert places(described) == {"d9": ("m1", FIRST, 0)}


def test_other_device_on_the_memory_of_one_that_has_gone_is_described_as_what_it_is() -> None:
    devices = [dimm("d0", "m0", FIRST, 0, plugged=True)]
    described = now(*BACKENDS, "-device", "nvdimm,id=d0,memdev=m0", devices=devices, m0=128, m1=128)
    assert "pc-dimm" in described[-1][1]
    virtio_mem = {"type": "virtio-mem", "data": {"id": "v", "memdev": "/objects/m0", "size": 0}}
    with pytest.raises(MismatchError, match="plugged in while"):
        now(*BACKENDS, *DIMMS[:2], devices=[virtio_mem], m0=128, m1=128)


def test_memory_of_a_device_that_is_none_for_memory_is_left_as_it_is() -> None:
    shared = ("-device", "ivshmem-plain,memdev=m0")
    described = now(*BACKENDS, *shared, devices=[], m0=128, m1=128)
    assert described[-1] == ("-device", {"ivshmem-plain": "", "memdev": "m0"})


def test_device_on_a_bus_that_has_gone_is_refused() -> None:
    gone = "virtio-mem-pci,id=v,memdev=m2"
    with pytest.raises(MismatchError, match="v was unplugged"):
        now(*BACKENDS, "-device", gone, devices=[], m0=128, m1=128)


def test_properties_are_replaced_in_the_notation_that_is_there() -> None:
    assert with_properties("pc-dimm,id=a,,b,addr=1", {"addr": 2, "slot": 0}) == (
        "pc-dimm,id=a,,b,addr=2,slot=0"
    )
    described = with_properties('{"driver": "pc-dimm", "addr": 1}', {"addr": 2, "slot": 0})
    assert json.loads(described) == {"driver": "pc-dimm", "addr": 2, "slot": 0}


def test_sizes_are_read_as_qemu_reads_them() -> None:
    assert [bytes_of(size) for size in ("128M", "1g", "512", 512, "8B")] == [
        128 * MIB, 1 << 30, 512, 512, 8,
    ]  # fmt: skip
    assert bytes_of("1.5G") is None
    assert bytes_of(None) is None
