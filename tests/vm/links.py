"""What a guest of guest/memtalk.c talks to: a tap with a UDP socket, and its serial port.

Runs in the test.  The tap is made beforehand and stays until the end, so that each QEMU of the test
can open it by its name.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from vm.disk_guest import PAGE_BYTES, pattern
from vm.guests import MIB, PATIENCE, TICK_MS, Guest, Lab, wait_until

from qemu_postcopy.images.guest_image import GuestImage
from qemu_postcopy.vm.spec import MemoryKind, VmSpec

UDP_PORT = 7777
PEER_GENERATION = 7
FILL_MIB = 4
#: Pages that go out by the network, come in by it, and go each way by the port.
SENT, ASKED, PORT_PAGES = 512, 256, 256
#: Holds a page, its header, and what UDP and IP put before them.
MTU = 9000
GO, SEND, ASK = 1, 2, 3
HEADER = struct.Struct("=II")

# linux/if_tun.h
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
# linux/sockios.h
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU = 0x8914, 0x8916, 0x891C, 0x8922

_number = itertools.count(os.getpid())


def _set_up(interface: str, address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        name = interface.encode()
        for request, text in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
            number = socket.inet_aton(text)
            fcntl.ioctl(
                control, request, struct.pack("=16sHH4s16x", name, socket.AF_INET, 0, number)
            )
        fcntl.ioctl(control, SIOCSIFMTU, struct.pack("=16si20x", name, MTU))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("=16sH22x", name, 0x41))  # up, running


class Peer:
    """The host's end of a guest's network, a context manager; answers from :meth:`go` on."""

    def __init__(self) -> None:
        number = next(_number)
        self.interface = f"qpct{number}"
        #: RFC 2544 keeps 198.18.0.0/15 for tests.
        self.net = f"198.{18 + (number >> 8 & 1)}.{number & 255}"
        #: the pages that the guest has sent
        self.received: dict[int, bytes] = {}
        self.asked: set[int] = set()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> Self:
        self._tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(self._tap, TUNSETIFF, struct.pack("=16sH22x", self.interface.encode(), flags))
        fcntl.ioctl(self._tap, TUNSETPERSIST, 1)
        os.close(self._tap)  # a tap has one user at a time
        _set_up(self.interface, f"{self.net}.1")
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((f"{self.net}.1", UDP_PORT))
        self._socket.settimeout(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._socket.close()

        def gone() -> bool:
            try:
                tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
                name = self.interface.encode()
                flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
                fcntl.ioctl(tap, TUNSETIFF, struct.pack("=16sH22x", name, flags))
                fcntl.ioctl(tap, TUNSETPERSIST, 0)
            except OSError:  # EBUSY: its QEMU has it still
                return False
            finally:
                os.close(tap)
            return True

        wait_until(gone, "the tap is free", 20)

    def arguments(self) -> tuple[str, ...]:
        """QEMU's.  Only a tap takes checksums off a guest, and only then pages go out uncopied."""
        return (
            *("-netdev", f"tap,id=n0,ifname={self.interface},script=no,downscript=no,vhost=off"),
            *("-device", f"virtio-net-pci,netdev=n0,host_mtu={MTU}"),
        )

    def go(self) -> None:
        """Tells the guest to begin, and answers it from now on."""
        self._thread.start()

    def _answer(self) -> None:
        guest = (f"{self.net}.2", UDP_PORT)
        while not self._ending.is_set():
            if not self.received:
                self._send(HEADER.pack(GO, 0), guest)
            try:
                datagram = self._socket.recv(1 << 16)
            except TimeoutError:
                continue
            what, page = HEADER.unpack_from(datagram)
            answer = HEADER.pack(what, page)
            if what == SEND:
                self.received.setdefault(page, datagram[HEADER.size :])
            elif what == ASK:
                self.asked.add(page)
                answer += pattern(page, PEER_GENERATION)
            self._send(answer, guest)

    def _send(self, datagram: bytes, guest: tuple[str, int]) -> None:
        with suppress(OSError):  # the guest, or its QEMU, is not there yet: it is told again
            self._socket.sendto(datagram, guest)


@contextmanager
def talking_by_port(path: Path) -> Iterator[bytes]:
    """Both ways over a guest's serial port; gives what the guest has sent.

    The guest may not have read all that was sent to it, so the port stays open until the end.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as port:
        port.settimeout(PATIENCE)
        port.connect(str(path))
        got = bytearray()
        while len(got) < PORT_PAGES * PAGE_BYTES:
            part = port.recv(1 << 16)
            assert part, f"the port was closed after {len(got)} bytes"
            got += part
        first = FILL_MIB * 256 - PORT_PAGES
        for page in range(first, first + PORT_PAGES):
            port.sendall(pattern(page, PEER_GENERATION + 1))
        yield bytes(got)


def boot(lab: Lab, guest_image: GuestImage, qemu: Path, kind: MemoryKind, peer: Peer) -> Guest:
    """Filled, and waiting for the word of its peer."""
    directory = lab.directory / "talker"
    spec = VmSpec(
        str(qemu),
        memory=(lab.memory(kind, guest_image.ram_mib(FILL_MIB) * MIB),),
        kernel=str(guest_image.kernel),
        initrd=str(guest_image.initramfs),
        append=guest_image.kernel_command_line(
            "talk",
            fill_mib=FILL_MIB,
            tick_ms=TICK_MS,
            modules=("virtio_pci", "virtio_net", "virtio_console"),
            extra=f"qpc.net={peer.net}",
        ),
        extra_arguments=(
            "-no-reboot",
            *peer.arguments(),
            *("-chardev", f"socket,id=c0,path={directory}/port.sock,server=on,wait=off"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=c0"),
        ),
    )
    guest = lab.launch(spec, directory.name)
    wait_until(lambda: guest.console.ready, "the guest has filled its memory", 240)
    guest.console.wait_more_ticks(3)
    return guest
