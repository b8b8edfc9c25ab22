"""A package index over HTTP whose wheels are made on the fly, and that can fail in the ways networks do; and a project."""

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
            entry = zipfile.ZipInfo(member)
            entry.external_attr = (0o100755 if ".data/scripts/" in member else 0o100644) << 16
            archive.writestr(entry, raw)
        rows.writerow([f"{info}/RECORD", "", ""])
        archive.writestr(f"{info}/RECORD", record.getvalue())
    return path


def source(directory: Path) -> Path:
    """Make a project in `directory`: foo 1.0, with the module `source`, which needs nothing to be built."""
    directory.mkdir()
    (directory / "backend.py").write_text(_BACKEND)
    (directory / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "foo"\nversion = "1.0"\n'
    )
    (directory / "source.py").write_text("where = __file__\n")
    return directory


_BACKEND = """
import os, zipfile

def _wheel(directory, files):
    info = "foo-1.0.dist-info/"
    with zipfile.ZipFile(os.path.join(directory, "foo-1.0-py3-none-any.whl"), "w") as archive:
        archive.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: foo\\nVersion: 1.0\\n")
        archive.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        for name, text in files.items():
            archive.writestr(name, text)
        names = [*files, info + "METADATA", info + "WHEEL", info + "RECORD"]
        archive.writestr(info + "RECORD", "".join(f"{name},,\\n" for name in names))
    return "foo-1.0-py3-none-any.whl"

def build_wheel(directory, config_settings=None, metadata_directory=None):
    return _wheel(directory, {"source.py": open("source.py").read()})

def build_editable(directory, config_settings=None, metadata_directory=None):
    return _wheel(directory, {"foo.pth": os.getcwd() + "\\n"})
"""


@dataclass(frozen=True)
class Status:
    """Answer with an error."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)


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
    """The last part of the path of every request but those for metadata (PEP 658) and for parts of files."""
    parts: list[str] = field(default_factory=list)
    """The files of which the end or a part from the middle was asked for: such requests never fail."""
    metadata: bool = True
    """Whether the metadata of wheels can be had without them."""
    ranges: bool = True
    """Whether parts of files can be had."""
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """For pip's --index-url."""
        return f"http://{self.host}/simple/"

    def environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """`environ`, but pip knows this index and nothing else."""
        kept = {name: value for name, value in environ.items() if not name.startswith("PIP_")}
        return {**kept, "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": self.url}

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

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        index: Index = self.server.index  # type: ignore[attr-defined]
        path = unquote(self.path.partition("?")[0])
        *_, last = [part for part in path.split("/") if part]
        file = last + ("/" if path.endswith("/") else "")
        expected = "Basic " + base64.b64encode(index.credentials.encode()).decode()
        if index.credentials and self.headers["Authorization"] != expected:
            self._answer(401, b"")
            return
        if file.endswith(".metadata") and index.metadata:
            self._answer(200, _metadata(index.directory / file.removesuffix(".metadata")))
            return
        part = self.headers["Range"] is not None and not self.headers["Range"].endswith("-")
        if self.command == "GET":
            (index.parts if part else index.requests).append(file)
        faulty = self.command == "GET" and not part and index.faults.get(file)
        fault = index.faults[file].pop(0) if faulty else None
        if isinstance(fault, Status):
            self._answer(fault.code, b"", headers=fault.headers)
        elif file.endswith("/"):
            links = [
                self._link(path) for path in sorted(index.directory.glob(f"{last.replace('-', '_')}-*.whl"))
            ]
            self._answer(200 if links else 404, "\n".join(links).encode(), kind="text/html")
        elif (index.directory / file).is_file():
            self._file((index.directory / file).read_bytes(), fault, index)
        else:
            self._answer(404, b"")

    def _link(self, path: Path) -> str:
        index: Index = self.server.index  # type: ignore[attr-defined]
        digest = index.hashes.get(path.name) or hashlib.sha256(path.read_bytes()).hexdigest()
        core = hashlib.sha256(_metadata(path)).hexdigest()
        metadata = f' data-core-metadata="sha256={core}"' if index.metadata else ""
        return f'<a href="/files/{path.name}#sha256={digest}"{metadata}>{path.name}</a>'

    def _answer(
        self,
        code: int,
        body: bytes,
        kind: str = "application/octet-stream",
        headers: Mapping[str, str] = {},
    ) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _file(self, content: bytes, fault: Fault | None, index: Index) -> None:
        start, end = 0, len(content)
        given = self.headers["Range"] if index.ranges else None
        if given:
            first, _, last = given.removeprefix("bytes=").partition("-")
            start = int(first) if first else max(len(content) - int(last), 0)
            end = int(last) + 1 if first and last else end
        self.send_response(206 if given else 200)
        if given:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        if index.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.send_header("Cache-Control", "max-age=31536000, immutable")
        self.end_headers()
        if self.command != "GET":
            return
        content = content[start:end]
        with contextlib.suppress(ConnectionError):
            if isinstance(fault, (Cut, Stall)):
                self.wfile.write(content[: fault.after])
                content = content[fault.after :]
            if isinstance(fault, Cut):
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            if isinstance(fault, Stall):
                index.closing.wait(fault.seconds)
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def _metadata(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return archive.read(name)
