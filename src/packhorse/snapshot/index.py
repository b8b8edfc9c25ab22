"""The local index: what each path of the root contained when it was last read, restored or saved here.

Makes an unchanged push or pull a matter of stat(2), and tells what changed here from what changed elsewhere. It
is a cache: without it everything is read again, and what differs from the store counts as changed here. After a crash
of the machine it vouches for no byte that the crash may have taken.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import IO, Annotated, NamedTuple, TypeAlias

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE
from packhorse.root import boot_id, flushed_file
from packhorse.snapshot.scan import Signature

RACE = 2_000_000_000
"""Nanoseconds: a file that changed within this time of the look may change again without a trace."""
VERSION = 5
UNPROVEN = -1
"""When a record was seen whose bytes a crash of the machine may have taken."""
ON_DISK = 0

Content: TypeAlias = tuple[bytes, int]
"""What a path holds, and its permission bits. The digest of a small file, `contents.content_of` for a large
one, the target of a symbolic link (which has the bits 0), nothing for a directory."""


class Seen(NamedTuple):
    """What a path holds, and when it was looked at."""

    path: bytes
    signature: Signature
    content: Content
    seen: int
    """When the signature was taken, in nanoseconds since the epoch."""


class _Record(NamedTuple):
    """What is known of one path. Kept packed: there is one in memory for each file."""

    signature: bytes
    seen: int
    saved: int
    """The number of the save that it came with; ON_DISK where its bytes are known to have been there."""
    mode: int
    digests: bytes

    @classmethod
    def of(cls, packed: bytes) -> _Record:
        """As it was packed."""
        return cls._make((*_PACKED.unpack_from(packed), packed[_PACKED.size :]))

    def packed(self) -> bytes:
        """For `of`."""
        return _PACKED.pack(self.signature, self.seen, self.saved, self.mode) + self.digests


_PACKED = struct.Struct(f"<{len(Signature(0, 0, 0, 0, 0))}sqqh")
_TIMES = struct.Struct("<16xq16xq")
"""Of a packed record: when the file changed, and when that was seen."""
_Packed: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=_PACKED.size)]
_TOGETHER = 4096
"""Records in one part of the file: encoding all at once would take their memory twice."""


class _Head(msgspec.Struct, array_like=True):
    version: int
    boot: str
    name: str
    """Of this index and those that it was saved as later on."""
    saves: int
    coming: dict[bytes, tuple[Content, ...]]
    """What is being restored: counts as restored, beside what is there, until that is done."""


class _Flushed(msgspec.Struct):
    """What the disk has: all that was saved up to the save `saves` of the index `name`."""

    name: str = ""
    saves: int = 0


class Index:
    """path (relative to the root) → signature and content."""

    def __init__(self, path: Path, *, trusted: bool = True) -> None:
        """Read the index at `path`; a missing or unreadable one is empty. One that is not `trusted` vouches for no bytes."""
        self._path, self._trusted = path, trusted
        self._changed: dict[bytes, bytes] = {}
        self._changed_coming: dict[bytes, tuple[Content, ...]] = {}
        self._head, self._files = self._read()

    @cached_property
    def _files(self) -> dict[bytes, bytes]:
        """The packed records, by their paths; read again when they are asked for after `_free`."""
        self._head, files = self._read()
        return files

    def _read(self, but: bytes | None = None) -> tuple[_Head, dict[bytes, bytes]]:
        """What is stored, with packed records, but for those whose path begins with `but`. Those of another boot that were not
        flushed vouch for no bytes, since a crash of the machine may have lost them, but still tell what was restored or
        saved."""
        with contextlib.suppress(OSError, *UNREADABLE):
            with open(self._path, "rb") as file:
                parts = _parts(file)
                head = msgspec.msgpack.decode(next(parts, b""), type=_Head)
                files: dict[bytes, bytes] = {}
                for part in parts:
                    records = msgspec.msgpack.decode(part, type=dict[bytes, _Packed])
                    files.update(
                        records
                        if but is None
                        else {path: records[path] for path in records if not path.startswith(but)}
                    )
            if head.version == VERSION:
                on_disk = head.saves
                if head.boot != boot_id():
                    flushed = _flushed(self._path)
                    on_disk = flushed.saves if flushed.name == head.name else ON_DISK
                if on_disk < head.saves or not self._trusted:
                    for path, packed in files.items():
                        record = _Record.of(packed)
                        seen = 0 if not self._trusted else UNPROVEN if record.saved > on_disk else record.seen
                        files[path] = record._replace(seen=seen).packed()
                return head, files
        return _Head(VERSION, "", os.urandom(8).hex(), 0, {}), {}

    def digests(self, path: bytes, signature: Signature) -> bytes | None:
        """The digests of `path` if it still has `signature` and had it long enough to be trusted."""
        packed = self._files.get(path)
        if packed is None or not packed.startswith(signature):
            return None
        ctime, seen = _TIMES.unpack_from(packed)
        return packed[_PACKED.size :] if ctime + RACE < seen else None

    def synced(self, path: bytes, content: Content) -> bool:
        """Whether `path` had this content when it was last restored or saved (or was just being restored)."""
        packed = self._files.get(path)
        if packed is not None:
            record = _Record.of(packed)
            if content == (record.digests, record.mode):
                return True
        return content in self._head.coming.get(path, ())

    def add(self, path: bytes, signature: Signature, content: Content, *, seen: int) -> None:
        """Remember what was restored, saved, or found equal to what is stored; `seen` is when the signature was
        taken (nanoseconds since the epoch)."""
        packed = self._packed(Seen(path, signature, content, seen), self._head.saves + 1)
        self._files[path] = self._changed[path] = packed
        if path in self._head.coming:
            del self._head.coming[path]
            self._changed_coming[path] = ()

    def update(self, items: Iterable[Seen]) -> None:
        """Remember these, but for what it vouches for already."""
        for path, signature, content, seen in items:
            if self.digests(path, signature) is None:
                self.add(path, signature, content, seen=seen)

    def _packed(self, item: Seen, save: int) -> bytes:
        """The record that comes with the save of this number."""
        path, signature, (digests, mode), seen = item
        before = self._files.get(path)
        if before is not None and before.startswith(signature) and _Record.of(before).seen == UNPROVEN:
            save = ON_DISK  # nobody wrote to it since the machine started, so what was read again came from the disk
        return _PACKED.pack(signature, seen, save, mode) + digests

    def restored(self, path: bytes, signature: Signature, content: Content) -> None:
        """Remember a file that was written and named here: see `known_at`."""
        self.add(path, signature, content, seen=known_at(signature))

    def distrust(self, path: bytes) -> None:
        """Vouch no more for the bytes of `path`: the disk has others under the same signature."""
        packed = self._files.get(path)
        if packed is not None:
            self._files[path] = self._changed[path] = _Record.of(packed)._replace(seen=0).packed()

    def coming(self, path: bytes, content: Content) -> None:
        """Remember that `path` is about to be restored: old and new content count as restored until that is done."""
        contents = tuple(dict.fromkeys((*self._head.coming.get(path, ()), content)))
        self._head.coming[path] = self._changed_coming[path] = contents

    def save(self) -> None:
        """Write what was added into the stored index; another process may have written meanwhile."""
        if not self._changed and not self._changed_coming:
            return
        with self._replacing():
            expected = self._head.saves + 1
            self._free()  # not twice in memory
            self._head, self._files = self._merged(expected)
            atomic.write_file(self._path, _encoded(self._head, self._files.items()))
        self._changed.clear()
        self._changed_coming.clear()

    def replace(self, prefix: bytes, items: Iterable[Seen]) -> None:
        """Save, and know nothing but `items` below `prefix` from now on: what is vouched for already as it was, the others as
        if they were added. They are in memory a few at a time, however many they are."""
        with self._replacing():
            expected = self._head.saves + 1
            head, others = self._merged(expected, but=prefix)

            def record(item: Seen) -> bytes:
                if self.digests(item.path, item.signature) is None:
                    return self._packed(item, head.saves)
                return _numbered(self._files[item.path], expected, head)

            new = ((item.path, record(item)) for item in items)
            atomic.write_file(self._path, _encoded(head, itertools.chain(others.items(), new)))
        self._head = head
        self._free()
        self._changed.clear()
        self._changed_coming.clear()

    def _free(self) -> None:
        self.__dict__.pop("_files", None)

    def _replacing(self) -> contextlib.AbstractContextManager[None]:
        return atomic.locked(self._path.with_name(self._path.name + ".lock"))

    def _merged(self, expected: int, but: bytes | None = None) -> tuple[_Head, dict[bytes, bytes]]:
        """What is stored, and what was added, to be the next save; it was `expected` to have that number. Without what
        begins with `but`."""
        head, files = self._read(but)
        head.boot, head.saves = boot_id(), head.saves + 1
        for path, packed in self._changed.items():
            if but is None or not path.startswith(but):
                files[path] = _numbered(packed, expected, head)
        for path, contents in self._changed_coming.items():
            if contents:
                head.coming[path] = contents
            else:
                head.coming.pop(path, None)
        return head, files


def known_at(signature: Signature) -> int:
    """When a file was seen that was written and named here, with times that were set. Whoever changes it changes those, so it
    can be trusted at once."""
    return signature.ctime + RACE + 1


def _numbered(packed: bytes, expected: int, head: _Head) -> bytes:
    """A record with the number of the save that it comes with, which was expected to be another one."""
    if head.saves != expected and (record := _Record.of(packed)).saved == expected:
        return record._replace(saved=head.saves).packed()
    return packed


def _encoded(head: _Head, files: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The content of the file, part by part: the length of each (4 bytes, little-endian), and its msgpack."""
    every = iter(files)
    parts = iter(lambda: dict(itertools.islice(every, _TOGETHER)), {})
    for part in itertools.chain([head], parts):
        encoded = msgspec.msgpack.encode(part)
        yield len(encoded).to_bytes(4, "little")
        yield encoded


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    while length := file.read(4):
        yield file.read(int.from_bytes(length, "little"))


def flush(path: Path) -> None:
    """Have the disk take the files that the index at `path` tells of, and remember that it did: the index vouches for
    them after another boot, too. Does nothing where that is so already.

    Waits until the whole file system is written, which nothing can interrupt. Whoever saves meanwhile need not wait;
    what is saved then is not what is remembered. What is remembered gets the time of the index. Raises OSError.
    """
    try:
        with open(path, "rb") as file:
            head = msgspec.msgpack.decode(next(_parts(file), b""), type=_Head)
            saved_at = os.fstat(file.fileno()).st_mtime_ns
    except (FileNotFoundError, *UNREADABLE):
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
    except (FileNotFoundError, *UNREADABLE):
        return _Flushed()


def now() -> int:
    """The time that signatures are compared with."""
    return time.time_ns()
