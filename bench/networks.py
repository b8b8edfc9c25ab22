"""Lines slower and longer than loopback, between the server and a worker in a network namespace of its own.

A line is a pair of TUN devices. tc(8) limits the rate of each; between them two processes carry the packets, each in
one direction, and hold them back for half a round trip. Both ends are this kernel's TCP, so handshakes, slow start and
windows are what they are on such a line. Needs root, iproute2 and util-linux. Changes nothing outside the namespaces.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

SERVER, WORKER = "10.77.0.1", "10.77.0.2"
BREAKS_AFTER = 2 << 20
"""Bytes after which a connection that stalls or breaks does so."""

# sched.h, linux/if_tun.h, linux/virtio_net.h
_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_VNET_HEADER = 10
_PR_SET_PDEATHSIG = 1
_SYN, _RST, _ACK = 0x02, 0x04, 0x10


@dataclass(frozen=True)
class Network:
    """A line: bits a second in each direction, and the seconds of a round trip."""

    title: str
    rate: int
    round_trip: float
    faulty: bool = False
    """One connection in ten stalls or breaks."""


NETWORKS = {
    "1g": Network("1 Gbit/s, 5 ms", 1_000_000_000, 0.005),
    "200m": Network("200 Mbit/s, 40 ms", 200_000_000, 0.040),
    "faulty": Network(
        "1 Gbit/s, 5 ms, one connection in ten stalls or breaks", 1_000_000_000, 0.005, faulty=True
    ),
}


@dataclass(frozen=True)
class Line:
    """A line that is up. The worker's end lives in the namespace of process `pid`."""

    pid: int

    def worker(self, words: Sequence[str]) -> list[str]:
        """A command as one that runs at the worker's end; it takes the place of nsenter(1), not a child's."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", "--", *words]

    def endpoint(self, endpoint: str) -> str:
        """The address of a server, as the worker sees it."""
        return f"http://{SERVER}:{urlsplit(endpoint).port}"


def enter() -> None:
    """Go on in a network namespace that has nothing but loopback; the server's end of each line comes into it."""
    _unshare_network()
    _ip("link", "set", "lo", "up")


def lacking() -> list[str]:
    """What is not there of what lines need."""
    lacks = [name for name in ("ip", "tc", "nsenter") if shutil.which(name) is None]
    if os.geteuid() != 0:
        lacks.append("root")
    if not os.path.exists("/dev/net/tun"):
        lacks.append("/dev/net/tun")
    return lacks


@contextlib.contextmanager
def line(network: Network, number: int = 0) -> Iterator[Line]:
    """A new line. With an even `number` the first connection of a faulty one breaks, else it stalls."""
    tun = _tun("server", SERVER, network.rate)
    script = [sys.executable, __file__, str(tun), str(network.rate), str(network.round_trip / 2)]
    carrier = subprocess.Popen(
        [*script, str(number) if network.faulty else ""], pass_fds=[tun], stdout=subprocess.PIPE
    )
    os.close(tun)
    try:
        assert carrier.stdout is not None
        if carrier.stdout.readline() != b"up\n":
            raise SystemExit("A line between two network namespaces could not be made.")
        yield Line(carrier.pid)
    finally:
        carrier.terminate()
        carrier.wait()


def _tun(name: str, address: str, rate: int) -> int:
    """A TUN device with an address and a rate, and the descriptor that holds it."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    # The kernel then hands over packets of up to 64 KB that stand for many, as it does to a network card.
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    _ip("address", "add", f"{address}/24", "dev", name)
    _ip("link", "set", name, "up")
    # A queue of 50 ms; a burst large enough that such packets are not cut.
    words = f"qdisc add dev {name} root tbf rate {rate}bit burst 256kb latency 50ms".split()
    subprocess.run(["tc", *words], check=True)
    return descriptor


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _unshare_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"no network namespace: {os.strerror(code)}")


def _carry(source: int, target: int, delay: float, passed: Callable[[bytes], bytes | None]) -> None:
    """Hand packets on, each `delay` seconds after it came."""
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    while True:
        pause = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        if select.select([source], [], [], pause)[0]:  # poll(2) would count whole milliseconds
            with contextlib.suppress(BlockingIOError):
                for _ in range(64):
                    packet = passed(os.read(source, 1 << 17))
                    if packet is not None:
                        waiting.append((time.monotonic() + delay, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            with contextlib.suppress(BlockingIOError, OSError):  # a full queue loses packets
                os.write(target, waiting.popleft()[1])


class Faults:
    """Lets the first connection of every ten stall or break, in turns, once it has carried some bytes."""

    def __init__(self, number: int) -> None:
        self._breaks = number % 2 == 0
        self._connections = 0
        self._left: dict[bytes, tuple[int, bool]] = {}
        """By the worker's port: bytes until it happens, and whether it breaks."""

    def __call__(self, packet: bytes) -> bytes | None:
        """What becomes of a packet from the server: the same, a reset, or nothing."""
        header = (
            _VNET_HEADER + (packet[_VNET_HEADER] & 15) * 4
        )  # RFC 9293: ports, sequence, acknowledged, flags
        if packet[_VNET_HEADER] >> 4 != 4 or packet[_VNET_HEADER + 9] != 6:
            return packet
        port, flags = packet[header + 2 : header + 4], packet[header + 13]
        if flags & _SYN:
            if self._connections % 10 == 0:
                self._left[port] = BREAKS_AFTER, self._breaks
                self._breaks = not self._breaks
            else:
                self._left.pop(port, None)
            self._connections += 1
            return packet
        if port not in self._left:
            return packet
        left, breaks = self._left[port]
        self._left[port] = left - len(packet), breaks
        if left > 0:
            return packet
        return _reset(packet[_VNET_HEADER:header], packet[header : header + 20]) if breaks else None


def _reset(ip: bytes, tcp: bytes) -> bytes:
    """A packet that resets the connection of these headers (RFC 791, RFC 9293)."""
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + ip[12:20]
    ip = ip[:10] + _checksum(ip) + ip[12:]
    tcp = tcp[:12] + bytes((0x50, _RST | _ACK)) + bytes(6)
    tcp = tcp[:16] + _checksum(ip[12:20] + struct.pack("!HH", 6, 20) + tcp) + tcp[18:]
    return bytes(_VNET_HEADER) + ip + tcp


def _checksum(content: bytes) -> bytes:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(content) // 2}H", content))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def _main(server: int, rate: int, delay: float, number: str) -> None:
    """Be the worker's end of a line and carry its packets until somebody ends this."""
    _unshare_network()
    _ip("link", "set", "lo", "up")
    worker = _tun("worker", WORKER, rate)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    _die_with_parent(signal.SIGTERM)
    child = os.fork()
    if child == 0:
        _die_with_parent(signal.SIGKILL)
        _carry(worker, server, delay, lambda packet: packet)
    try:
        print("up", flush=True)
        _carry(server, worker, delay, Faults(int(number)) if number else lambda packet: packet)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # then nobody holds the devices, and they are gone


def _die_with_parent(number: int) -> None:
    """Get this signal when the parent ends (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4])
