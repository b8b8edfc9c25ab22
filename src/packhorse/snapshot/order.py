"""The order in which held files are restored: those under 1 MiB first, then what a command opened before, in the order it did.

Pure functions of paths, sizes and times. Paths are relative to the root: `packages/torch/lib/libtorch.so`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from packhorse.snapshot.frames import LARGE_FILE

MOST_FILES = 2000
"""A profile names no more."""
NEEDED = -1
"""The rank of what must be there before a command starts."""
UNCALLED = 1 << 20
"""Ranks from here on are of what nobody is expected to open soon."""
_DIRECTORIES = (b"packages", b"deps", b"models", b"pip")
_FOR_COMPILERS = (b".a", b".lib", b".h", b".hpp", b".cuh")
"""Static libraries and headers: only compilers read them."""


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """A file that a command opened, and how many seconds after its start it did so for the first time."""

    path: bytes
    seconds: float


def ranks(sizes: Mapping[bytes, int], profile: Sequence[Opened] = ()) -> dict[bytes, int]:
    """The rank of each file (path → size in bytes), 0 for the one to restore first.

    Files under 1 MiB, which together are soon there, then larger ones. Of either kind those of the profile in its order,
    then packages, deps, models and pip, each by path. What only compilers read, unless the profile names it, last. Where
    there is a profile, this and large files that it does not name have ranks from UNCALLED on.
    """
    known = {opened.path: number for number, opened in reversed(list(enumerate(profile)))}

    def last(path: bytes) -> bool:
        return path not in known and path.endswith(_FOR_COMPILERS)

    def large(path: bytes) -> bool:
        return sizes[path] >= LARGE_FILE

    def key(path: bytes) -> tuple[bool, bool, float, int, bytes]:
        first = path.partition(b"/")[0]
        directory = _DIRECTORIES.index(first) if first in _DIRECTORIES else len(_DIRECTORIES)
        return last(path), large(path), known.get(path, math.inf), directory, path

    return {
        path: UNCALLED + rank if known and path not in known and (large(path) or last(path)) else rank
        for rank, path in enumerate(sorted(sizes, key=key))
    }


def refined(profile: Sequence[Opened], wanted: Iterable[tuple[bytes, float]]) -> tuple[Opened, ...]:
    """`profile` after a boot in which files were `wanted` before they had arrived, each with the seconds after the
    start.

    A wanted file comes no later than it was wanted, no later than it came before, and before those that were wanted
    after it; the others keep their order. Where that changes no place the result equals `profile`, seconds included:
    what was observed once changes nothing the second time.
    """
    times: dict[bytes, float] = {}
    for opened in profile:
        times.setdefault(opened.path, opened.seconds)
    places = {path: number for number, path in enumerate(times)}
    first: dict[bytes, float] = {}
    for path, seconds in wanted:
        first.setdefault(path, round(seconds, 3))
    due = math.inf
    for path, seconds in reversed(first.items()):
        due = times[path] = min(times.get(path, math.inf), seconds, due)
    turns = {path: number for number, path in enumerate(first)}

    def key(path: bytes) -> tuple[float, bool, int]:
        return times[path], path not in turns, turns.get(path, places.get(path, 0))

    order = sorted(times, key=key)[:MOST_FILES]
    if order == [opened.path for opened in profile]:
        return tuple(profile)
    return tuple(Opened(path, times[path]) for path in order)
