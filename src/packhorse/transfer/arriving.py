"""Shared files that exist before their bytes do: a record of them, kept while a command runs beside the restore.

Promises that what never arrived is known as such, whoever was killed: a backup leaves it out, and the next pull removes it
and brings it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from packhorse import atomic
from packhorse.root import Root

_NUMBER = 4
"""Bytes of the number of a file that arrived."""


class _Files(msgspec.Struct, array_like=True):
    """(path relative to the root, device, inode)"""

    files: list[tuple[bytes, int, int]]


class Arriving:
    """The record of one restore."""

    def __init__(self, root: Root, files: Iterable[tuple[bytes, int]]) -> None:
        """Begin it, for files by their paths and open descriptors, before any of them is published."""
        named = list(files)
        self._numbers = {path: number for number, (path, _) in enumerate(named)}
        identities = [
            (path, (status := os.fstat(descriptor)).st_dev, status.st_ino) for path, descriptor in named
        ]
        head = msgspec.msgpack.encode(_Files(identities))
        atomic.write_file(_path(root), len(head).to_bytes(_NUMBER, "little") + head)
        self._descriptor = os.open(_path(root), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def arrived(self, path: bytes) -> None:
        """A file has its bytes."""
        os.write(self._descriptor, self._numbers[path].to_bytes(_NUMBER, "little"))

    def close(self) -> None:
        """The record stays."""
        os.close(self._descriptor)


def still(root: Root) -> set[bytes]:
    """The paths, relative to the root, of the files that are there without their bytes."""
    try:
        content = _path(root).read_bytes()
        length = int.from_bytes(content[:_NUMBER], "little")
        head, body = content[_NUMBER : _NUMBER + length], content[_NUMBER + length :]
        files = msgspec.msgpack.decode(head, type=_Files).files
    except (FileNotFoundError, msgspec.DecodeError):
        return set()
    numbers = {int.from_bytes(body[at : at + _NUMBER], "little") for at in range(0, len(body), _NUMBER)}
    base = os.fsencode(root.path)
    return {
        path
        for number, (path, device, inode) in enumerate(files)
        if number not in numbers and _is(os.path.join(base, path), device, inode)
    }


def remove(root: Root) -> None:
    """Remove those files, and the record."""
    base = os.fsencode(root.path)
    for path in still(root):
        os.unlink(os.path.join(base, path))
    _path(root).unlink(missing_ok=True)


def _path(root: Root) -> Path:
    return root.private / "arriving"


def _is(path: bytes, device: int, inode: int) -> bool:
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (status.st_dev, status.st_ino) == (device, inode)
