"""The local index: what each file of the root contained when it was last read or written here.

Makes an unchanged push or pull a matter of stat(2). It is a cache: without it everything is read again.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec

from packhorse import atomic
from packhorse.root import boot_id
from packhorse.snapshot.scan import Signature

RACE = 2_000_000_000
"""Nanoseconds: a file that changed within this time of the look may change again without a trace."""


class _Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    signature: Signature
    seen: int
    digests: bytes


class _Stored(msgspec.Struct, array_like=True):
    version: int
    boot: str
    durable: bool
    files: dict[bytes, _Record]


class Index:
    """path (relative to the root) → signature and digests.

    The digests of a small file are the one of its content, those of a large file those of its frames.
    """

    def __init__(self, path: Path) -> None:
        """Read the index at `path`; a missing or unreadable one is empty, and so is one whose bytes a crash
        of the machine may have lost: written in another boot and never flushed."""
        self._path = path
        self._files: dict[bytes, _Record] = {}
        self.durable = False
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            stored = msgspec.msgpack.decode(path.read_bytes(), type=_Stored)
            if stored.version == 1 and (stored.durable or stored.boot == boot_id()):
                self._files = stored.files
                self.durable = stored.durable

    def digests(self, path: bytes, signature: Signature) -> bytes | None:
        """The digests of `path` if it still has `signature` and had it long enough to be trusted."""
        record = self._files.get(path)
        if record is None or record.signature != signature:
            return None
        return record.digests if signature.ctime + RACE < record.seen else None

    def known(self, path: bytes) -> bytes | None:
        """The digests that `path` had when it was last restored or saved, whatever it holds now."""
        record = self._files.get(path)
        return None if record is None else record.digests

    def add(self, path: bytes, signature: Signature, digests: bytes, *, seen: int | None = None) -> None:
        """Remember a file; `seen` is when the signature was taken (nanoseconds since the epoch)."""
        self._files[path] = _Record(signature, time.time_ns() if seen is None else seen, digests)

    def keep_only(self, prefix: bytes, paths: set[bytes]) -> None:
        """Forget what begins with `prefix` and is not among `paths`."""
        self._files = {p: r for p, r in self._files.items() if not p.startswith(prefix) or p in paths}

    def save(self) -> None:
        """Write the index."""
        stored = _Stored(1, boot_id(), self.durable, self._files)
        atomic.write_file(self._path, msgspec.msgpack.encode(stored))
