"""The local index: what each path of the root contained when it was last read, restored or saved here.

Makes an unchanged push or pull a matter of stat(2), and tells what changed here from what changed elsewhere. It
is a cache: without it everything is read again, and what differs from the store counts as changed here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import msgspec

from packhorse import atomic
from packhorse.root import boot_id
from packhorse.snapshot.scan import Signature

RACE = 2_000_000_000
"""Nanoseconds: a file that changed within this time of the look may change again without a trace."""
VERSION = 3

Content: TypeAlias = tuple[bytes, int]
"""What a path holds, and its permission bits. The digest of a small file, `contents.content_of` for a large
one, the target of a symbolic link (which has the bits 0), nothing for a directory."""


class _Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    signature: Signature
    seen: int
    digests: bytes
    mode: int
    coming: tuple[tuple[bytes, int], ...] = ()


class _Stored(msgspec.Struct, array_like=True):
    version: int
    boot: str
    durable: bool
    files: dict[bytes, _Record]


class Index:
    """path (relative to the root) → signature and content."""

    def __init__(self, path: Path) -> None:
        """Read the index at `path`; a missing or unreadable one is empty."""
        self._path = path
        self._changed: dict[bytes, _Record | None] = {}
        self._files, self.durable = self._read()

    def _read(self) -> tuple[dict[bytes, _Record], bool]:
        """The stored records. Those of another boot that were never flushed vouch for no bytes, since a crash of
        the machine may have lost them, but still tell what was restored or saved."""
        with contextlib.suppress(OSError, msgspec.DecodeError, UnicodeDecodeError):
            stored = msgspec.msgpack.decode(self._path.read_bytes(), type=_Stored)
            if stored.version == VERSION:
                if stored.durable or stored.boot == boot_id():
                    return stored.files, stored.durable
                unproven = {
                    path: msgspec.structs.replace(each, seen=0) for path, each in stored.files.items()
                }
                return unproven, False
        return {}, False

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
        self._put(path, _Record(signature, seen, *content))

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
        with self._locked():
            self._files = {}  # not twice in memory
            self._files, self.durable = self._read()
            for path, record in self._changed.items():
                if record is None:
                    self._files.pop(path, None)
                else:
                    self._files[path] = record
            stored = _Stored(VERSION, boot_id(), self.durable, self._files)
            atomic.write_file(self._path, msgspec.msgpack.encode(stored))
        self._changed.clear()

    def _put(self, path: bytes, record: _Record) -> None:
        self._files[path] = self._changed[path] = record

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = os.open(
            self._path.with_name(self._path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def now() -> int:
    """The time that signatures are compared with."""
    return time.time_ns()
