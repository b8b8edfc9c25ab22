"""Scanning: what lies in a directory tree, by name and stat(2), without reading a file.

Names are bytes. Knows nothing of frames or stores.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Literal, NamedTuple, TypeAlias

from packhorse.snapshot.manifest import PERMISSIONS


class Signature(bytes):
    """What tells that a file has not changed since it was looked at: its size in bytes, its times of modification and
    change in nanoseconds, its device and inode. Packed, since there is one in memory for each file.

    Times beyond what 64 bits hold (the years 1677 to 2262) count as the last that these do.
    """

    __slots__ = ()

    def __new__(cls, size: int, mtime: int, ctime: int, device: int, inode: int) -> Signature:
        try:
            packed = _SIGNATURE.pack(size, mtime, ctime, device, inode)
        except struct.error:
            packed = _SIGNATURE.pack(size, _bounded(mtime), _bounded(ctime), device, inode)
        return bytes.__new__(cls, packed)

    @property
    def size(self) -> int:
        return int.from_bytes(self[:8], "little")

    @property
    def mtime(self) -> int:
        return int.from_bytes(self[8:16], "little", signed=True)

    @property
    def ctime(self) -> int:
        return int.from_bytes(self[16:24], "little", signed=True)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: two names of one file have the same."""
        return int.from_bytes(self[24:32], "little"), int.from_bytes(self[32:], "little")

    def written_as(self, other: Signature) -> bool:
        """Whether they differ in the time of change at most, which a link or a rename moves."""
        return self[:16] == other[:16] and self[24:] == other[24:]


_SIGNATURE = struct.Struct("<QqqQQ")
_FIRST, _LAST = -(1 << 63), (1 << 63) - 1


_LONGEST = 3072
"""Bytes of a shared path. With that of a root, and of where a pull puts it first, it must fit into PATH_MAX (4096) anywhere."""
_DEEPEST = 256
"""Directories that a shared path lies in at most. Python's ways to make, walk and remove a tree call themselves for each."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MODES = tuple(range(PERMISSIONS + 1))
"""One number in memory for all files that have it."""


def _bounded(time: int) -> int:
    return min(max(time, _FIRST), _LAST)


Kind: TypeAlias = Literal["directory", "file", "symlink", "special"]
"""Special is what no snapshot can hold: a socket, FIFO or device."""
_KINDS: dict[int, Kind] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


class Found(NamedTuple):
    """One entry of a tree: its path relative to the base, its type and what stat says of it."""

    path: bytes
    kind: Kind
    mode: int
    """The permission bits; 0 for a symbolic link, which has none."""
    signature: Signature
    links: int


def readable(path: bytes) -> str:
    """A path for people and JSON; bytes that are no UTF-8 and control characters, which a terminal obeys, are escaped."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", path.decode(errors="backslashreplace"))


def signature_of(status: os.stat_result) -> Signature:
    """The signature of a file by its stat."""
    return Signature(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_dev, status.st_ino)


def scan(
    base: bytes,
    parts: Sequence[bytes] = (),
    *,
    exclude: Sequence[str] = (),
    skipped: Callable[[bytes, str], None] | None = None,
) -> list[Found]:
    """Everything below `base` (or below its directories `parts`, themselves included), ordered by path.

    A path that fits a pattern of `exclude` (fnmatch on the name and on the whole path) is left out.
    `skipped` hears of what no snapshot can hold: path, and what it is. Directories that may not be listed, and what has
    too long a path or lies too deep, are among that below `parts`; without those OSError is raised.
    """
    found: list[Found] = []
    if not parts:
        found.extend(_below(base, b"", exclude, skipped))
    for part in parts:
        try:
            status = os.lstat(os.path.join(base, part))
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(status.st_mode):
            found.append(_found(part, status))
            found.extend(_below(base, part + b"/", exclude, skipped))
        elif skipped is not None:
            skipped(part, "no directory, but a link or a file")
    found.sort()
    return found


def look(base: bytes, path: bytes) -> Found | None:
    """What lies at one path, or None; also None where something above it is no directory."""
    try:
        return _found(path, os.lstat(os.path.join(base, path)))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _below(
    base: bytes, top: bytes, exclude: Sequence[str], skipped: Callable[[bytes, str], None] | None
) -> Iterator[Found]:
    pending = [top]
    while pending:
        prefix = pending.pop()
        try:
            listing = os.scandir(os.path.join(base, prefix))
        except (FileNotFoundError, NotADirectoryError):  # went away while we looked
            continue
        except OSError as error:
            why = _left_out(error)
            if not top or not why:
                raise
            if skipped is not None:
                skipped(prefix.rstrip(b"/"), f"a directory {why}")
            continue
        with listing:
            for item in listing:
                path = prefix + item.name
                if exclude and _excluded(path, item.name, exclude):
                    continue
                if top and (len(path) > _LONGEST or path.count(b"/") > _DEEPEST):
                    if skipped is not None:
                        long = len(path) > _LONGEST
                        skipped(
                            path, f"something {'whose path is too long' if long else 'that lies too deep'}"
                        )
                    continue
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    why = _left_out(error)
                    if not top or not why:
                        raise
                    if skipped is not None:
                        skipped(path, f"in a directory {why}")
                    continue
                entry = _found(path, status)
                if entry.kind == "directory":
                    pending.append(path + b"/")
                if entry.kind != "special":
                    yield entry
                elif skipped is not None:
                    skipped(path, "a socket, FIFO or device")


def _left_out(error: OSError) -> str:
    """Why a directory below the shared ones is left out; nothing where it must not be."""
    if isinstance(error, PermissionError):
        return "that may not be read"
    return "whose path is too long" if error.errno == errno.ENAMETOOLONG else ""


def _found(path: bytes, status: os.stat_result) -> Found:
    bits = status.st_mode
    kind = _KINDS.get(stat.S_IFMT(bits), "special")
    mode = 0 if kind == "symlink" else _MODES[bits & PERMISSIONS]
    return Found(path, kind, mode, signature_of(status), status.st_nlink)


def _excluded(path: bytes, name: bytes, exclude: Sequence[str]) -> bool:
    plain, whole = os.fsdecode(name), os.fsdecode(path)
    return any(fnmatch(plain, pattern) or fnmatch(whole, pattern) for pattern in exclude)
