"""The local index: what each path of the root contained when it was last read, restored or saved here.

Makes an unchanged push or pull a matter of stat(2), and tells what changed here from what changed elsewhere. It
is a cache: without it everything is read again, and what differs from the store counts as changed here. After a crash
of the machine it vouches for no byte that the crash may have taken.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TypeAlias

import msgspec

from packhorse import atomic
from packhorse.root import boot_id, flushed_file
from packhorse.snapshot.scan import Signature

RACE = 2_000_000_000
"""Nanoseconds: a file that changed within this time of the look may change again without a trace."""
VERSION = 4
UNPROVEN = -1
"""When a record was seen whose bytes a crash of the machine may have taken."""
ON_DISK = 0

Content: TypeAlias = tuple[bytes, int]
"""What a path holds, and its permission bits. The digest of a small file, `contents.content_of` for a large
one, the target of a symbolic link (which has the bits 0), nothing for a directory."""


class _Record(msgspec.Struct, array_like=True, gc=False):
    signature: Signature
    seen: int
    digests: bytes
    mode: int
    saved: int = -1
    """The number of the save that it came with; ON_DISK where its bytes are known to have been there."""
    coming: tuple[tuple[bytes, int], ...] = ()


class _Head(msgspec.Struct, array_like=True):
    version: int
    boot: str
    name: str
    """Of this index and those that it was saved as later on."""
    saves: int


class _Stored(_Head, array_like=True):
    files: dict[bytes, _Record]


class _Flushed(msgspec.Struct):
    """What the disk has: all that was saved up to the save `saves` of the index `name`."""

    name: str = ""
    saves: int = 0


class Index:
    """path (relative to the root) → signature and content."""

    def __init__(self, path: Path, *, trusted: bool = True) -> None:
        """Read the index at `path`; a missing or unreadable one is empty. One that is not `trusted` vouches for no bytes."""
        self._path, self._trusted = path, trusted
        self._changed: dict[bytes, _Record | None] = {}
        self._files = self._read().files

    def _read(self) -> _Stored:
        """What is stored. Records of another boot that were not flushed vouch for no bytes, since a crash of the
        machine may have lost them, but still tell what was restored or saved."""
        with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
            stored = msgspec.msgpack.decode(self._path.read_bytes(), type=_Stored)
            if stored.version == VERSION:
                if stored.boot != boot_id():
                    flushed = _flushed(self._path)
                    on_disk = flushed.saves if flushed.name == stored.name else ON_DISK
                    for record in stored.files.values():
                        if record.saved > on_disk:
                            record.seen = UNPROVEN
                if not self._trusted:
                    for record in stored.files.values():
                        record.seen = 0
                return stored
        return _Stored(VERSION, "", os.urandom(8).hex(), 0, {})

    def digests(self, path: bytes, signature: Signature) -> bytes | None:
        """The digests of `path` if it still has `signature` and had it long enough to be trusted."""
        record = self._files.get(path)
        if record is None or record.signature != signature:
            return None
        return record.digests if signature.ctime + RACE < record.seen else None

    def synced(self, path: bytes, content: Content) -> bool:
        """Whether `path` had this content when it was last restored or saved (or was just being restored)."""
        record = self._files.get(path)
        return record is not None and content in ((record.digests, record.mode), *record.coming)

    def add(self, path: bytes, signature: Signature, content: Content, *, seen: int) -> None:
        """Remember what was restored, saved, or found equal to what is stored; `seen` is when the signature was
        taken (nanoseconds since the epoch)."""
        before = self._files.get(path)
        # Nobody wrote to it since the machine started, so what was read again came from the disk.
        read_again = before is not None and before.seen == UNPROVEN and before.signature == signature
        self._put(path, _Record(signature, seen, *content, ON_DISK if read_again else -1))

    def restored(self, path: bytes, signature: Signature, content: Content) -> None:
        """Remember a file that was written and named here, with times that were set: whoever changes it changes
        those. So it can be trusted at once."""
        self.add(path, signature, content, seen=signature.ctime + RACE + 1)

    def coming(self, path: bytes, content: Content) -> None:
        """Remember that `path` is about to be restored: old and new content count as restored until that is done."""
        record = self._files.get(path) or _Record(Signature(0, 0, 0, 0, 0), 0, b"", -1)
        self._put(path, msgspec.structs.replace(record, coming=(*record.coming, content)))

    def keep_only(self, prefix: bytes, paths: set[bytes]) -> None:
        """Forget what begins with `prefix` and is not among `paths`."""
        for path in [path for path in self._files if path.startswith(prefix) and path not in paths]:
            del self._files[path]
            self._changed[path] = None

    def save(self) -> None:
        """Write what was added and forgotten into the stored index; another process may have written meanwhile."""
        if not self._changed:
            return
        with atomic.locked(self._path.with_name(self._path.name + ".lock")):
            self._files = {}  # not twice in memory
            stored = self._read()
            self._files = stored.files
            stored.boot, stored.saves = boot_id(), stored.saves + 1
            for path, record in self._changed.items():
                if record is None:
                    self._files.pop(path, None)
                else:
                    if record.saved != ON_DISK:
                        record.saved = stored.saves
                    self._files[path] = record
            atomic.write_file(self._path, msgspec.msgpack.encode(stored))
        self._changed.clear()

    def _put(self, path: bytes, record: _Record) -> None:
        self._files[path] = self._changed[path] = record


def flush(path: Path) -> None:
    """Have the disk take the files that the index at `path` tells of, and remember that it did: the index vouches for
    them after another boot, too. Does nothing where that is so already.

    Waits until the whole file system is written, which nothing can interrupt. Whoever saves meanwhile need not wait;
    what is saved then is not what is remembered. What is remembered gets the time of the index. Raises OSError.
    """
    try:
        with open(path, "rb") as file:
            head = msgspec.msgpack.decode(file.read(), type=_Head)
            saved_at = os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, msgspec.DecodeError):
        return
    # What another boot saved may be lost already.
    if head.version != VERSION or head.boot != boot_id():
        return
    flushed = _Flushed(head.name, head.saves)
    if _flushed(path) != flushed:
        atomic.flush(path.parent)
        atomic.write_file(flushed_file(path), msgspec.json.encode(flushed), durable=True)
    os.utime(flushed_file(path), ns=(saved_at, saved_at))


def _flushed(path: Path) -> _Flushed:
    try:
        return msgspec.json.decode(flushed_file(path).read_bytes(), type=_Flushed)
    except (FileNotFoundError, msgspec.DecodeError):
        return _Flushed()


def now() -> int:
    """The time that signatures are compared with."""
    return time.time_ns()
