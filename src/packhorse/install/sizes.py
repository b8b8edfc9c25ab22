"""How large wheels are, packed and unpacked, before one is downloaded: read from the directories at their ends.

Promises never to fail: what cannot be told is left unknown. Knows ZIP files and ranges, nothing of disks.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads, RefusedError

_TAIL = 1 << 16
_THREADS = 8
_TIMEOUT = 30.0
_BLOCK = 4096
_HEADER, _EXTRA = 30, 1024
"""Bytes before a file's name in an archive, and what is asked for besides of fields behind the name."""
_BYTECODE = 1.4
"""Bytes of bytecode for a byte of source, at most: 1.3 in a large environment."""


class Unpacked(NamedTuple):
    """A file that a wheel will leave on the disk, and its bytes there with those of its bytecode."""

    path: str
    bytes: int


class Sized(NamedTuple):
    """A wheel with its size, where that could be told; `files` is empty where its directory could not be read."""

    chosen: Chosen
    files: Sequence[Unpacked] = ()


def sized(chosen: Iterable[Chosen], downloads: Downloads, check: Callable[[], None]) -> list[Sized]:
    """Each wheel of `chosen` with what can be told of it. `check` is called while waiting, and may raise."""
    pending = list(chosen)
    found = [Sized(each) for each in pending]
    numbers = iter(range(len(pending)))
    taking = threading.Lock()

    def work() -> None:
        while True:
            with taking:
                number = next(numbers, None)
            if number is None:
                return
            # Whatever goes wrong here will be told when the wheel itself is fetched.
            with contextlib.suppress(Exception):
                found[number] = _sized(pending[number], downloads)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_THREADS, len(pending)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            check()
    return found


def _sized(chosen: Chosen, downloads: Downloads) -> Sized:
    if chosen.local is not None:
        size = os.path.getsize(chosen.local)
        with zipfile.ZipFile(chosen.local) as archive:
            return Sized(msgspec.structs.replace(chosen, size=size), _files(archive))
    total, directory = _remote(chosen.url, downloads)
    known = msgspec.structs.replace(chosen, size=total or chosen.size)
    return Sized(known, _files(directory) if directory is not None else ())


def _remote(url: str, downloads: Downloads) -> tuple[int, zipfile.ZipFile | None]:
    """The size of an archive and its directory; None where the server has no ranges."""
    total, tail = _part(url, downloads, f"-{_TAIL}")
    if not tail:
        return total, None
    with contextlib.suppress(zipfile.BadZipFile):
        return total, zipfile.ZipFile(_End(total, tail))
    # The directory is longer than that: its own end tells where it begins.
    start = _directory(tail)
    if not 0 < start < total:
        return total, None
    _, tail = _part(url, downloads, f"{start}-{total - 1}")
    return total, zipfile.ZipFile(_End(total, tail))


def members(chosen: Chosen, downloads: Downloads, names: Iterable[str]) -> dict[str, bytes]:
    """The content of those files that a wheel has, read by parts without the rest of it.

    Raises whatever keeps it from being read: urllib3's HTTPError, RefusedError, OSError, BadZipFile.
    """
    if chosen.local is not None:
        with zipfile.ZipFile(chosen.local) as archive:
            return {name: archive.read(name) for name in names if name in archive.namelist()}
    total, directory = _remote(chosen.url, downloads)
    if directory is None:
        raise RefusedError("the server has no parts of files")
    wanted = set(names)
    return {
        each.filename: _member(each, chosen.url, downloads, total)
        for each in directory.infolist()
        if each.filename in wanted
    }


def _member(file: zipfile.ZipInfo, url: str, downloads: Downloads, total: int) -> bytes:
    """A file of an archive, by one request (APPNOTE.TXT, section 4.3.7)."""
    end = min(file.header_offset + _HEADER + len(file.filename) * 4 + _EXTRA + file.compress_size, total)
    _, part = _part(url, downloads, f"{file.header_offset}-{end - 1}")
    name, extra = (int.from_bytes(part[place : place + 2], "little") for place in (26, 28))
    begin = _HEADER + name + extra
    packed = part[begin : begin + file.compress_size]
    content = zlib.decompress(packed, -zlib.MAX_WBITS) if file.compress_type else packed
    if zlib.crc32(content) != file.CRC:
        raise zipfile.BadZipFile(f"{file.filename} is damaged")
    return content


def _part(url: str, downloads: Downloads, wanted: str) -> tuple[int, bytes]:
    """The size of a file and a part of it; no part where the server has no ranges."""
    response, _ = downloads.open(url, _TIMEOUT, {"Range": f"bytes={wanted}"})
    try:
        if response.status == 200:
            return int(response.headers.get("Content-Length", 0)), b""
        if response.status != 206:
            raise RefusedError(str(response.status))
        total = int(response.headers["Content-Range"].rpartition("/")[2])
        return total, response.read(decode_content=False)
    finally:
        response.close()


def _directory(tail: bytes) -> int:
    """Where the central directory begins (APPNOTE.TXT, section 4.3.16); 0 where that is not told here."""
    end = tail.rfind(b"PK\x05\x06")
    return int.from_bytes(tail[end + 16 : end + 20], "little") if end >= 0 else 0


def _files(archive: zipfile.ZipFile) -> list[Unpacked]:
    return [Unpacked(each.filename, _on_disk(each)) for each in archive.infolist() if not each.is_dir()]


def _on_disk(file: zipfile.ZipInfo) -> int:
    bytecode = int(file.file_size * _BYTECODE) + _BLOCK if file.filename.endswith(".py") else 0
    return -(-file.file_size // _BLOCK) * _BLOCK + bytecode


class _End(io.RawIOBase):
    """A file of which only the end is here."""

    def __init__(self, size: int, tail: bytes) -> None:
        self._size, self._tail, self._position = size, tail, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def read(self, count: int = -1) -> bytes:
        start = self._position - (self._size - len(self._tail))
        if start < 0:
            raise zipfile.BadZipFile("this part is not here")
        part = self._tail[start:] if count < 0 else self._tail[start : start + count]
        self._position += len(part)
        return part
