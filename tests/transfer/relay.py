"""A relay in front of an S3 server that writes down what was asked for, and can spoil what is sent."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

_CHUNK, _PART = 1 << 16, 1 << 18
_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
_DENIED = b"<Error><Code>AccessDenied</Code></Error>"


class Relay:
    """`with Relay(endpoint) as relay`: `relay.endpoint` answers as the server does.

    Signatures hold, since the Host header is the server's own. `flip_after` turns one bit, once, of what the
    server sends, after that many bytes. Of the answers with a part of a pack the first `stall` stop in the middle for as
    long as the relay lives, and every `break_every`th and the first `break_first` break off there; all begin `delay`
    seconds late. After `gone_after` bytes there is no server any more. The first `busy` requests for each range of a pack
    are answered with 503 SlowDown. Requests with the words `refuse` in their address are refused (403), those with `hold` wait
    until `release`.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        flip_after: int = 0,
        stall: int = 0,
        break_every: int = 0,
        break_first: int = 0,
        delay: float = 0.0,
        gone_after: int = 0,
        busy: int = 0,
        refuse: str = "",
        hold: str = "",
    ) -> None:
        self.asked: list[str] = []
        """The methods and paths of all requests."""
        self.ranges: dict[tuple[str, str], list[float]] = {}
        """When (time.monotonic) each range of a pack was asked for, by path and range."""
        self.received = 0
        """The bytes that the server sent."""
        self.flipped = False
        self.stalled = self.broken = 0
        """How many answers stopped, and broke off."""
        self.at_once = self.most_at_once = 0
        """Requests for parts of packs that are on their way, and the most that were at a time."""
        self._flip_after = flip_after
        self._lock = threading.Lock()
        self._stall, self._break_every, self._break_first = stall, break_every, break_first
        self._gone_after, self._delay, self._busy = gone_after, delay, busy
        self._parts = 0
        self.hold = hold
        """May be set later, too."""
        self.refused = self.holding = 0
        """How many requests were refused, and how many waited."""
        self.news = threading.Condition()
        """Tells that `holding` grew."""
        self._refuse = refuse
        self._released = threading.Event()
        self._ended = threading.Event()
        host = urlsplit(endpoint).netloc
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _relay(self) -> None:
                if relay._ended.is_set():
                    self.close_connection = True
                    return
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if relay._written_down(self.command, self.path, self.headers.get("Range", "")):
                    self._refuse(503, _SLOW_DOWN)
                    return
                if relay._refuses(unquote(self.path)):
                    self._refuse(403, _DENIED)
                    return
                connection = http.client.HTTPConnection(host, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(content or None)
                answer = connection.getresponse()
                is_part = self.command == "GET" and "/packs/" in self.path and (answer.length or 0) > _PART
                with relay._counted(is_part) as spoilt:
                    if is_part:
                        relay._ended.wait(relay._delay)
                    self._pass_on(answer, spoilt)
                connection.close()

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _relay  # noqa: N815

            def _refuse(self, status: int, why: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(why)))
                self.end_headers()
                self.wfile.write(why)

            def _pass_on(self, answer: http.client.HTTPResponse, spoilt: bool) -> None:
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    while chunk := answer.read(_CHUNK):
                        self.wfile.write(relay._passed(chunk))
                        if spoilt:
                            relay._spoil()
                        if spoilt or relay._ended.is_set():
                            self.close_connection = True
                            return
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def requested(self) -> list[str]:
        """The paths of all GET requests."""
        return [path for method, _, path in (each.partition(" ") for each in self.asked) if method == "GET"]

    def release(self) -> None:
        """Nobody waits any more."""
        self._released.set()

    def _refuses(self, address: str) -> bool:
        """Whether a request is refused, after it has waited."""
        if self.hold and self.hold in address and not self._released.is_set():
            with self.news:
                self.holding += 1
                self.news.notify_all()
            self._released.wait()
        refused = bool(self._refuse) and self._refuse in address
        with self._lock:
            self.refused += refused
        return refused

    def _written_down(self, method: str, path: str, wanted: str) -> bool:
        """Whether the request is to be refused."""
        path = urlsplit(path).path
        with self._lock:
            self.asked.append(f"{method} {path}")
            if method != "GET" or "/packs/" not in path:
                return False
            times = self.ranges.setdefault((path, wanted), [])
            times.append(time.monotonic())
            return len(times) <= self._busy

    @contextlib.contextmanager
    def _counted(self, is_part: bool) -> Iterator[bool]:
        """While an answer is on its way; tells whether it is to be spoilt."""
        with self._lock:
            self._parts += is_part
            self.at_once += is_part
            self.most_at_once = max(self.most_at_once, self.at_once)
            spoilt = is_part and (
                self._parts <= max(self._stall, self._break_first)
                or (self._break_every > 0 and self._parts % self._break_every == 0)
            )
        try:
            yield spoilt
        finally:
            with self._lock:
                self.at_once -= is_part

    def _spoil(self) -> None:
        """Stop where that is asked for; what comes next is the end of the connection."""
        with self._lock:
            stall = self.stalled < self._stall
            self.stalled += stall
            self.broken += not stall
        if stall:
            self._ended.wait()

    def _passed(self, chunk: bytes) -> bytes:
        with self._lock:
            self.received += len(chunk)
            if self._gone_after and self.received > self._gone_after and not self._ended.is_set():
                self._ended.set()
                threading.Thread(target=self._close).start()
            if self._flip_after and not self.flipped and self.received > self._flip_after:
                self.flipped = True
                return bytes((chunk[0] ^ 1,)) + chunk[1:]
        return chunk

    def __enter__(self) -> Relay:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self.release()
        self._close()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
