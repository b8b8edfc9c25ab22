"""A line to a server that carries only so many bytes a second towards it, or at some point no more of them."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

_CHUNK = 1 << 14


class Uplink:
    """`with Uplink(endpoint) as uplink`: `uplink.endpoint` answers as the server does.

    All connections together carry `rate` bytes a second towards the server. After `swallow_after` bytes what is sent is
    taken and goes nowhere, and no answer comes; `swallowing` is set then.
    """

    def __init__(self, endpoint: str, *, rate: float = 0, swallow_after: int | None = None) -> None:
        self.sent = 0
        """Bytes that came from the clients."""
        self.swallowing = threading.Event()
        self._server = urlsplit(endpoint).hostname, urlsplit(endpoint).port
        self._rate, self._swallow_after = rate, swallow_after
        self._lock = threading.Lock()
        self._free = time.monotonic()
        """When the line is free again."""
        self._sockets: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._server)
                with self._lock:
                    self._sockets += (client, server)
                for source, target, passed in (
                    (client, server, self._up),
                    (server, client, lambda chunk: not self.swallowing.is_set()),
                ):
                    threading.Thread(target=self._carry, args=(source, target, passed), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, passed: Callable[[bytes], bool]) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(_CHUNK):
                if passed(chunk):
                    target.sendall(chunk)
            target.shutdown(socket.SHUT_WR)

    def _up(self, chunk: bytes) -> bool:
        """Take the time that these bytes need; tells whether they arrive."""
        with self._lock:
            self.sent += len(chunk)
            if self._swallow_after is not None and self.sent > self._swallow_after:
                self.swallowing.set()
            now = time.monotonic()
            self._free = max(self._free, now) + (len(chunk) / self._rate if self._rate else 0)
            pause = self._free - now
        time.sleep(pause)
        return not self.swallowing.is_set()

    def __enter__(self) -> Uplink:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            for each in (self._listening, *self._sockets):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
