"""A package index over HTTP whose wheels are made on the fly, and that can fail in the ways networks do."""

from __future__ import annotations

import base64
import contextlib
import csv
import hashlib
import http.server
import io
import socket
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote


def wheel(
    directory: Path,
    name: str,
    version: str,
    files: Mapping[str, str | bytes] | None = None,
    *,
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
) -> Path:
    """Make a wheel in `directory`; `files` is by the path in the wheel, one module NAME.py if left out."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    content = dict(
        files if files is not None else {f"{name.replace('-', '_')}.py": f"VERSION = {version!r}\n"}
    )
    content[f"{info}/METADATA"] = "\n".join(
        ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        + [f"Requires-Dist: {requirement}" for requirement in requires]
        + [""]
    )
    content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n"
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    path = directory / f"{stem}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in content.items():
            raw = text.encode() if isinstance(text, str) else text
            digest = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()
            rows.writerow([member, f"sha256={digest}", len(raw)])
            archive.writestr(member, raw)
        rows.writerow([f"{info}/RECORD", "", ""])
        archive.writestr(f"{info}/RECORD", record.getvalue())
    return path


@dataclass(frozen=True)
class Status:
    """Answer with an error."""

    code: int


@dataclass(frozen=True)
class Cut:
    """Close the connection after so many bytes."""

    after: int


@dataclass(frozen=True)
class Stall:
    """Send nothing for so many seconds after so many bytes, then go on; or until the index is closed."""

    after: int
    seconds: float | None = None


Fault = Status | Cut | Stall


@dataclass
class Index:
    """A running index: put wheels into `directory`, and faults by file name, used up one a request."""

    directory: Path
    host: str
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    """Hashes to announce instead of the true ones."""
    credentials: str = ""
    """user:password that every request must bring, if set."""
    requests: list[str] = field(default_factory=list)
    """The last part of the path of every request."""
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """For pip's --index-url."""
        return f"http://{self.host}/simple/"

    def add(
        self,
        name: str,
        version: str,
        files: Mapping[str, str | bytes] | None = None,
        *,
        requires: Sequence[str] = (),
        tag: str = "py3-none-any",
    ) -> Path:
        """Offer a wheel."""
        return wheel(self.directory, name, version, files, requires=requires, tag=tag)

    def fail(self, file: str, *faults: Fault) -> None:
        """Fail the next requests for a file or for the page of a package (`name/`)."""
        self.faults[file] = list(faults)


@contextlib.contextmanager
def serve(directory: Path) -> Iterator[Index]:
    """An index on a free port of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    index = Index(directory, f"127.0.0.1:{server.server_port}")
    server.index = index  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield index
    finally:
        index.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        index: Index = self.server.index  # type: ignore[attr-defined]
        *_, last = [part for part in unquote(self.path).split("/") if part]
        file = last + ("/" if self.path.endswith("/") else "")
        index.requests.append(file)
        expected = "Basic " + base64.b64encode(index.credentials.encode()).decode()
        if index.credentials and self.headers["Authorization"] != expected:
            self._answer(401, b"")
            return
        fault = index.faults[file].pop(0) if index.faults.get(file) else None
        if isinstance(fault, Status):
            self._answer(fault.code, b"")
        elif file.endswith("/"):
            links = [
                self._link(path) for path in sorted(index.directory.glob(f"{last.replace('-', '_')}-*.whl"))
            ]
            self._answer(200 if links else 404, "\n".join(links).encode(), kind="text/html")
        elif (path := index.directory / file).is_file():
            self._file(path.read_bytes(), fault, index.closing)
        else:
            self._answer(404, b"")

    def _link(self, path: Path) -> str:
        index: Index = self.server.index  # type: ignore[attr-defined]
        digest = index.hashes.get(path.name) or hashlib.sha256(path.read_bytes()).hexdigest()
        return f'<a href="/files/{path.name}#sha256={digest}">{path.name}</a>'

    def _answer(self, code: int, body: bytes, kind: str = "application/octet-stream") -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, content: bytes, fault: Cut | Stall | None, closing: threading.Event) -> None:
        start = 0
        if given := self.headers["Range"]:
            start = int(given.removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Cache-Control", "max-age=31536000, immutable")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            if fault is not None:
                self.wfile.write(content[start : start + fault.after])
                start += fault.after
            if isinstance(fault, Cut):
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if isinstance(fault, Stall):
                closing.wait(fault.seconds)
            self.wfile.write(content[start:])

    def log_message(self, *arguments: object) -> None:
        pass
