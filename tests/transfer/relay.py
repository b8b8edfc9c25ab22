"""A relay in front of an S3 server that writes down what was asked for, and can spoil what is sent."""

from __future__ import annotations

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_CHUNK = 1 << 16


class Relay:
    """`with Relay(endpoint) as relay`: `relay.endpoint` answers as the server does.

    Signatures hold, since the Host header is the server's own. `flip_after` turns one bit, once, of what the
    server sends, after that many bytes.
    """

    def __init__(self, endpoint: str, *, flip_after: int = 0) -> None:
        self.requested: list[str] = []
        """The paths of all GET requests."""
        self.received = 0
        """The bytes that the server sent."""
        self.flipped = False
        self._flip_after = flip_after
        self._lock = threading.Lock()
        host = urlsplit(endpoint).netloc
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with relay._lock:
                    relay.requested.append(urlsplit(self.path).path)
                connection = http.client.HTTPConnection(host, timeout=60)
                connection.putrequest("GET", self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders()
                answer = connection.getresponse()
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    while chunk := answer.read(_CHUNK):
                        self.wfile.write(relay._passed(chunk))
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                connection.close()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def _passed(self, chunk: bytes) -> bytes:
        with self._lock:
            self.received += len(chunk)
            if self._flip_after and not self.flipped and self.received > self._flip_after:
                self.flipped = True
                return bytes((chunk[0] ^ 1,)) + chunk[1:]
        return chunk

    def __enter__(self) -> Relay:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
