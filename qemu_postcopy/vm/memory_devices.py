"""Memory that was plugged in or out while the guest ran: how a restore is to be told of it.

Step "describe" of a snapshot.  The command line of a QEMU says what it was started with; a DIMM
that came later (`object-add`, `device_add`) is not on it, one that has gone still is.  One
without an address gets the first place that is free, which need not be the one it has now.  QEMU
is asked what there is, and its command line is amended so that a QEMU started by it has the same
RAM blocks at the same guest addresses.  What cannot be described so is refused by name.  Asks by
QMP; runs in the caller's event loop.

The amount that a virtio-mem device has plugged, and a balloon's size, are device state (QEMU:
hw/virtio/virtio-mem.c, virtio-balloon.c): nothing is to be told of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qemu_postcopy.errors import MismatchError
from qemu_postcopy.vm.monitor import CommandError, Monitor
from qemu_postcopy.vm.spec import (
    Argument,
    bytes_of,
    option_value,
    properties_of,
    split_arguments,
    with_properties,
)

#: Properties of memory back-ends that say what kind of memory it is (backends/hostmem*.c), with
#: the value that needs no word, as in QEMU 7.2 to 10.0; one that a back-end lacks is passed over.
BACKEND_PROPERTIES: dict[str, object] = {
    "mem-path": "",
    "align": 0,
    "offset": 0,
    "pmem": False,
    "discard-data": False,
    "readonly": False,
    "hugetlb": False,
    "hugetlbsize": 0,
    "seal": True,
    "merge": True,
    "dump": True,
    "reserve": True,
    "policy": "default",
    "x-use-canonical-path-for-ramblock-id": None,
}


#: Drivers of memory devices, with their type in query-memory-devices and the properties that say
#: where in the guest they are, all settable (hw/mem/pc-dimm.c, hw/virtio/virtio-mem.c, -pmem.c).
PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "pc-dimm": ("dimm", ("addr", "slot", "node")),
    "nvdimm": ("nvdimm", ("addr", "slot", "node")),
    "virtio-mem-pci": ("virtio-mem", ("memaddr",)),
    "virtio-pmem-pci": ("virtio-pmem", ("memaddr",)),
}

#: Memory devices of this size are saved by every QEMU.
SAVED_BYTES = 256 << 20


async def current_arguments(qmp: Monitor, argv: list[str]) -> list[str]:
    """The command line that the guest would have been started by, had it had its memory then.

    Raises:
        MismatchError: a memory device of a kind that cannot be described was plugged in, or one of
            the command line was taken away whose absence would move other devices.
    """
    devices = {_last(entry["data"].get("memdev", "")): entry for entry in await _devices(qmp)}
    sizes = {entry["id"]: entry["size"] for entry in await qmp.memory_backends()}
    words = [argv[0]]
    devices_described, backends_described = set(), set()
    for argument in split_arguments(argv[1:]):
        properties = properties_of(argument.value)
        if argument.name == "device" and (memdev := backend_of(argument)):
            driver = _kind(properties, "driver")
            kind, _ = PLACES.get(driver, ("", ()))
            entry = devices.get(memdev)
            if entry is not None and entry["type"] == kind:
                assert argument.value is not None
                devices_described.add(memdev)
                words += [argument.text, with_properties(argument.value, _place(entry, driver))]
                continue
            if kind or memdev not in sizes:
                _require_movable(argument, properties)
                continue
            devices_described.add(memdev)  # no memory device (ivshmem-plain), or none with a place
        elif argument.name == "object" and _is_backend(properties):
            backend = str(properties.get("id"))
            if backend not in sizes:
                continue
            backends_described.add(backend)
            if _came_again(properties, sizes[backend], devices.get(backend)):
                words += [argument.text, await _backend(qmp, backend)]
                continue
        words += argument.words()
    for memdev, entry in devices.items():
        if memdev and memdev not in devices_described:
            device = _plugged(entry, memdev)
            if memdev not in backends_described:
                words += ["-object", await _backend(qmp, memdev)]
            words += ["-device", device]
    return words


async def require_migratable(qmp: Monitor) -> None:
    """Refuses what would end QEMU, and the guest with it, in any migration.

    Seen with QEMU 10.0.2 under TCG and memory devices of 384 MiB and more, DIMMs as well as
    virtio-mem that has something plugged: `tlb_reset_dirty_range_all: Assertion ... failed`
    (system/physmem.c) in a plain `migrate`; not with 256 MiB, nor with QEMU 7.2.

    Raises:
        MismatchError: this guest has one of these.
    """
    if qmp.version < (8,) or (await qmp.execute("query-kvm"))["enabled"]:
        return
    for entry in await _devices(qmp):
        data = entry["data"]
        if data.get("max-size", data["size"]) > SAVED_BYTES and data["size"]:
            raise MismatchError(
                f"memory device {data.get('id')} has more than {SAVED_BYTES >> 20} MiB, and this "
                "QEMU's own migration crashes on that under TCG",
                hint="use KVM, or memory devices of that size at most",
            )


def backend_of(argument: Argument) -> str:
    """The memory back-end that a `-device` stands for, or ''."""
    memdev = properties_of(argument.value).get("memdev", "")
    return _last(memdev) if isinstance(memdev, str) else ""


def _kind(properties: Mapping[str, object], name: str) -> str:
    """What kind of device or object an argument makes; ``name``: the property's, in JSON."""
    return str(properties.get("", properties.get(name, "")))


def _is_backend(properties: Mapping[str, object]) -> bool:
    return _kind(properties, "qom-type").startswith("memory-backend-")


def _came_again(
    properties: Mapping[str, object], size_bytes: int, entry: Mapping[str, Any] | None
) -> bool:
    """Whether a back-end of the command line may have been made anew, under its id."""
    said = bytes_of(properties.get("size"))
    if said is not None and said != size_bytes:
        return True
    # Its DIMM was plugged in while the guest ran.
    return entry is not None and bool(entry["data"].get("hotplugged"))


def _place(entry: Mapping[str, Any], driver: str) -> dict[str, object]:
    """Where in the guest a memory device is, and its name: two may have swapped theirs."""
    data = entry["data"]
    _, names = PLACES[driver]
    return {name: data[name] for name in ("id", *names) if data.get(name) is not None}


def _last(path: str) -> str:
    return path.rpartition("/")[2]


async def _devices(qmp: Monitor) -> list[Mapping[str, Any]]:
    try:
        devices: list[Mapping[str, Any]] = await qmp.execute("query-memory-devices")
    except CommandError:
        return []  # a machine without memory devices
    return devices


def _require_movable(argument: Argument, properties: Mapping[str, Any]) -> None:
    driver = _kind(properties, "driver")
    # Devices on a bus get their places in the order of the command line.
    if driver not in ("pc-dimm", "nvdimm") and "addr" not in properties:
        raise MismatchError(
            f"memory device {properties.get('id', driver)} was unplugged from this guest, and "
            "without it the devices after it would get other places",
            hint="give devices an address (addr=) when the guest is started, or plug it in again",
        )


def _plugged(entry: Mapping[str, Any], memdev: str) -> str:
    """The value of `-device` that brings back a DIMM that was plugged in."""
    if entry["type"] != "dimm":
        name = entry["data"].get("id") or memdev
        raise MismatchError(
            f"memory device {name} ({entry['type']}) was plugged in while the guest ran: a restore "
            "cannot be told how",
            hint="unplug it before the snapshot, or start the guest with it on its command line",
        )
    device = f"pc-dimm,memdev={option_value(memdev)}"
    return with_properties(device, _place(entry, "pc-dimm"))


async def _backend(qmp: Monitor, memdev: str) -> str:
    """The value of `-object` for a back-end that there is."""
    path = f"/objects/{memdev}"
    known = {entry["name"] for entry in await qmp.execute("qom-list", {"path": path})}
    kind: str = await qmp.execute("qom-get", {"path": path, "property": "type"})

    async def value(name: str) -> Any:
        return await qmp.execute("qom-get", {"path": path, "property": name})

    parts = [kind, f"id={option_value(memdev)}", f"size={await value('size')}"]
    parts.append(f"share={_word(await value('share'))}")
    for name, usual in BACKEND_PROPERTIES.items():
        if name not in known or (name == "hugetlbsize" and not await value("hugetlb")):
            continue
        found = await value(name)
        if found is None or found == usual or (usual is None and not found):
            continue
        parts.append(f"{name}={_word(found)}")
    parts += [f"host-nodes={node}" for node in await value("host-nodes")]
    return ",".join(parts)


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return option_value(str(value))
