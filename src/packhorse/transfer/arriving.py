"""Shared files that exist before their bytes do: a record of them, kept while a command runs beside the restore.

Promises that what never arrived is known as such under whatever name it has by then, whoever was killed: a backup leaves
it out, and the next pull or install removes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE
from packhorse.root import SHARED, Root, boot_id
from packhorse.snapshot.manifest import PERMISSIONS
from packhorse.snapshot.scan import Found, Signature, scan

_NUMBER = 4
"""Bytes of the number of a file that arrived."""


class _Files(msgspec.Struct, array_like=True):
    """(device, inode, size, mtime) of each"""

    boot: str
    files: list[tuple[int, int, int, int]]


Identities: TypeAlias = dict[tuple[int, int], tuple[int, int]]
"""(device, inode) → (size, mtime)"""


class Arriving:
    """The record of one restore."""

    def __init__(self, root: Root, files: Iterable[tuple[bytes, int]]) -> None:
        """Begin it, for files by their paths and open descriptors, before any of them is published."""
        named = list(files)
        self._numbers = {path: number for number, (path, _) in enumerate(named)}
        identities = [
            ((status := os.fstat(descriptor)).st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            for _, descriptor in named
        ]
        head = msgspec.msgpack.encode(_Files(boot_id(), identities))
        # No number behind it lies over the border of two blocks, so that a full disk takes each whole or not.
        padding = bytes(-len(head) % _NUMBER)
        atomic.write_file(_path(root), len(head).to_bytes(_NUMBER, "little") + head + padding)
        self._descriptor = os.open(_path(root), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def arrived(self, path: bytes) -> None:
        """A file has its bytes."""
        os.write(self._descriptor, self._numbers[path].to_bytes(_NUMBER, "little"))

    def close(self) -> None:
        """The record stays."""
        os.close(self._descriptor)


def still(root: Root) -> Identities:
    """The files that are there without their bytes. After another boot those count too that had arrived, since a crash
    of the machine may have taken what was never flushed."""
    try:
        content = _path(root).read_bytes()
        length = int.from_bytes(content[:_NUMBER], "little")
        head, body = content[_NUMBER : _NUMBER + length], content[_NUMBER + length + -length % _NUMBER :]
        record = msgspec.msgpack.decode(head, type=_Files)
    except (FileNotFoundError, *UNREADABLE):
        return {}
    numbers = {int.from_bytes(body[at : at + _NUMBER], "little") for at in range(0, len(body), _NUMBER)}
    if record.boot != boot_id():
        numbers = set()
    return {
        (device, inode): (size, mtime)
        for number, (device, inode, size, mtime) in enumerate(record.files)
        if number not in numbers
    }


def without(root: Root, found: Iterable[Found]) -> list[Found]:
    """What was `found` in the shared directories, but for those files."""
    found = list(found)
    missing = still(root)
    if missing:
        base = os.fsencode(root.path)
        found = [item for item in found if not _is_one(base, item.path, item.signature, missing)]
    return found


def remove(root: Root) -> None:
    """Remove those files, and the record."""
    missing = still(root)
    if missing:
        base = os.fsencode(root.path)
        for item in scan(base, [name.encode() for name in SHARED]):
            if _is_one(base, item.path, item.signature, missing):
                _unlink(os.path.join(base, item.path))
    _path(root).unlink(missing_ok=True)


def _unlink(path: bytes) -> None:
    try:
        os.unlink(path)
    except PermissionError:  # its directory is one that its owner must not write to
        parent = os.path.dirname(path)
        mode = os.stat(parent).st_mode & PERMISSIONS
        os.chmod(parent, 0o700)
        try:
            os.unlink(path)
        finally:
            os.chmod(parent, mode)


def _path(root: Root) -> Path:
    return root.private / "arriving"


def _is_one(base: bytes, path: bytes, signature: Signature, missing: Identities) -> bool:
    """Whether a file is one of `missing`. Its number may have gone to a new file, which has another time or no holes;
    somebody may have set the time of a file that never arrived, which has."""
    known = missing.get(signature.identity)
    if known is None or known[0] != signature.size:
        return False
    if known[1] == signature.mtime:
        return True
    try:
        return os.lstat(os.path.join(base, path)).st_blocks * 512 < signature.size
    except OSError:  # gone meanwhile
        return False
