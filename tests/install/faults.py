"""A relay of bytes between clients and an index that breaks connections in the ways that networks do."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

_CHUNK = 1 << 14


@dataclass(frozen=True)
class Fault:
    """What happens to a connection once the server sent so many bytes on it.

    `reset` ends it at once (RST), `close` in good order, so that a body is too short; `stall` sends nothing more but
    keeps it open; `flip` turns one bit and goes on.
    """

    kind: Literal["reset", "close", "stall", "flip"]
    after: int


Plan = Callable[[int], Fault | None]
"""What happens to the connection with this number, from 0 on."""


def seeded(seed: int, connections: int, most: int) -> Plan:
    """Break that many connections after up to `most` bytes, in random ways; whole ones come after."""
    chance = random.Random(seed)
    faults = [Fault(chance.choice(("reset", "close")), chance.randrange(most)) for _ in range(connections)]
    return lambda number: faults[number] if number < len(faults) else None


@dataclass
class Relay:
    """A running relay to `server`, "host:port"; `host` is its own."""

    server: str
    plan: Plan
    host: str = ""
    broken: int = 0
    """Connections that were broken."""
    _listener: socket.socket | None = None
    _number: int = 0
    _open: set[socket.socket] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """For pip's --index-url."""
        return f"http://{self.host}/simple/"

    def start(self) -> None:
        """Take connections, at the same address each time."""
        port = int(self.host.rpartition(":")[2] or 0)
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.host = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def die(self) -> None:
        """Break all connections and refuse others, until `start`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for each in self._open:
                _reset(each)

    def end(self) -> None:
        """Stop for good."""
        self._ended.set()
        self.die()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with self._lock:
                number, self._number = self._number, self._number + 1
                self._open.add(client)
            threading.Thread(target=self._serve, args=(client, self.plan(number)), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault | None) -> None:
        name, _, port = self.server.rpartition(":")
        with contextlib.suppress(OSError), socket.create_connection((name, int(port))) as server:
            threading.Thread(target=_copy, args=(client, server), daemon=True).start()
            self._answer(server, client, fault)
        with self._lock:
            self._open.discard(client)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()

    def _answer(self, server: socket.socket, client: socket.socket, fault: Fault | None) -> None:
        sent = 0
        while chunk := server.recv(_CHUNK):
            if fault is not None and sent + len(chunk) > fault.after:
                place = fault.after - sent
                self.broken += 1
                if fault.kind == "flip":
                    chunk = chunk[:place] + bytes((chunk[place] ^ 1,)) + chunk[place + 1 :]
                    fault = None
                else:
                    client.sendall(chunk[:place])
                    if fault.kind == "stall":
                        self._ended.wait()
                    if fault.kind == "reset":
                        _reset(client)
                    return
            client.sendall(chunk)
            sent += len(chunk)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK):
            target.sendall(chunk)


def _reset(connection: socket.socket) -> None:
    """End it by RST, as socket(7) says of SO_LINGER with no time."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
        connection.close()


@contextlib.contextmanager
def relay(server: str, plan: Plan = lambda number: None) -> Iterator[Relay]:
    """A relay to `server` on a free port of this machine."""
    running = Relay(server, plan)
    running.start()
    try:
        yield running
    finally:
        running.end()
