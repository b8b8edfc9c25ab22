"""Scanning: what lies in a directory tree, by name and stat(2), without reading a file.

Names are bytes. Knows nothing of frames or stores.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import NamedTuple

PERMISSIONS = 0o777
"""The mode bits that snapshots keep; setuid, setgid and sticky are dropped."""


class Signature(NamedTuple):
    """What tells that a file has not changed since it was looked at."""

    size: int
    mtime: int
    ctime: int
    device: int
    inode: int


class Found(NamedTuple):
    """One entry of a tree: its path relative to the base, its type and what stat says of it."""

    path: bytes
    kind: str
    """`directory`, `file` or `symlink`."""
    mode: int
    signature: Signature
    links: int


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
    `skipped` hears of what no snapshot can hold: path, and what it is.
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
            found.append(Found(part, "directory", status.st_mode & PERMISSIONS, signature_of(status), 1))
            found.extend(_below(base, part + b"/", exclude, skipped))
    found.sort()
    return found


def _below(
    base: bytes, prefix: bytes, exclude: Sequence[str], skipped: Callable[[bytes, str], None] | None
) -> Iterator[Found]:
    pending = [prefix]
    while pending:
        prefix = pending.pop()
        try:
            listing = os.scandir(os.path.join(base, prefix))
        except FileNotFoundError:  # went away while we looked
            continue
        with listing:
            for item in listing:
                path = prefix + item.name
                if exclude and _excluded(path, item.name, exclude):
                    continue
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                mode = status.st_mode
                if stat.S_ISREG(mode):
                    kind = "file"
                elif stat.S_ISDIR(mode):
                    kind = "directory"
                    pending.append(path + b"/")
                elif stat.S_ISLNK(mode):
                    kind = "symlink"
                else:
                    if skipped is not None:
                        skipped(path, "a socket, FIFO or device")
                    continue
                yield Found(path, kind, mode & PERMISSIONS, signature_of(status), status.st_nlink)


def _excluded(path: bytes, name: bytes, exclude: Sequence[str]) -> bool:
    plain, whole = os.fsdecode(name), os.fsdecode(path)
    return any(fnmatch(plain, pattern) or fnmatch(whole, pattern) for pattern in exclude)
