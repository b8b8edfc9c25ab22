"""The shared directories beside what their tag says: which paths are older here, and which changed here.

One answer for all: a pull brings what is missing or older, a push saves what changed here and nothing else, so
that a worker which saves never undoes what another one saved. Changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from packhorse.root import SHARED
from packhorse.snapshot.contents import OutOfTime
from packhorse.snapshot.index import now
from packhorse.snapshot.manifest import Directory, File, Hardlink
from packhorse.snapshot.scan import Found, look, scan
from packhorse.transfer.local import Local
from packhorse.transfer.union import Winner

_TOP = {name.encode() for name in SHARED}
_SECOND = 10**9


class Standing(enum.Enum):
    """A path here beside what counts for it in the tag."""

    SAME = enum.auto()
    OLDER = enum.auto()
    """As it was last restored or saved here; another worker saved something newer since."""
    OLDER_MODE = enum.auto()
    """The same, but only the permission bits differ, and no other name has them too."""
    DAMAGED = enum.auto()
    """Of the tag's time but not of its content, as a crash of the machine or a bad disk leaves it."""
    CHANGED = enum.auto()
    """Changed here since it was last restored or saved, or never was."""


def standing(local: Local, item: Found, winner: Winner, until: float | None = None) -> Standing:
    """How `item`, a path of the shared directories, stands to the entry that counts for it. Raises OutOfTime where that has
    not been read by `until`."""
    seen = now()
    content = local.content(item, expected=winner.content, like=winner.file, until=until)
    if content is None:
        return Standing.CHANGED
    counts = winner.content, winner.mode
    if (content, item.mode) == counts or (item.path in _TOP and item.kind == "directory"):
        if local.index.digests(item.path, item.signature) != content:
            local.index.add(item.path, item.signature, (content, item.mode), seen=seen)
        return Standing.SAME
    if item.kind == "directory" and content != winner.content:
        return Standing.OLDER if _unchanged_below(local, item.path) else Standing.CHANGED
    if local.index.synced(item.path, (content, item.mode)):
        alone = item.kind == "directory" or item.links == 1
        return Standing.OLDER_MODE if content == winner.content and alone else Standing.OLDER
    untouched = item.signature.mtime == winner.mtime and mended_by_pull(winner)
    if (
        item.kind == "file"
        and isinstance(winner.entry, (File, Hardlink))
        and content != winner.content
        and untouched
    ):
        return Standing.DAMAGED
    return Standing.CHANGED


def mended_by_pull(winner: Winner) -> bool:
    """Whether a file with the winner's time and other bytes is damaged, and none that changed here.

    To the nanosecond: nobody wrote here since it was restored. Whole seconds prove nothing, since some file systems
    know no others.
    """
    return bool(winner.mtime % _SECOND)


def _unchanged_below(local: Local, path: bytes) -> bool:
    """Whether a directory holds nothing but what was restored or saved as it is."""
    special: list[bytes] = []
    found = scan(local.base, [path], skipped=lambda item, _: special.append(item))
    return not special and all(
        item.kind == "directory"
        or (
            (content := local.content(item)) is not None
            and local.index.synced(item.path, (content, item.mode))
        )
        for item in found
    )


class Plan(NamedTuple):
    """What a pull has to do in the shared directories."""

    wanted: dict[bytes, Standing | None]
    """In the order of the paths: what is missing here (None), or not as the tag has it and unchanged here."""
    same: set[bytes]
    """What is here as the tag has it."""
    kept: list[bytes]
    """What changed here and is left alone; what the tag has below it is not listed."""


def plan(local: Local, winners: Mapping[bytes, Winner]) -> Plan:
    """Hold every path of the union against what is here."""
    wanted: dict[bytes, Standing | None] = {}
    same: set[bytes] = set()
    kept: list[bytes] = []
    new: set[bytes] = set()
    blocked: set[bytes] = set()
    for path, winner in winners.items():
        parent = path.rpartition(b"/")[0]
        if parent in blocked:
            blocked.add(path)
            continue
        item = None if parent in new else look(local.base, path)
        stands = None if item is None else standing(local, item, winner)
        if stands is Standing.CHANGED:
            kept.append(path)
        elif stands is Standing.SAME:
            same.add(path)
        else:
            wanted[path] = stands
        if isinstance(winner.entry, Directory) and (item is None or item.kind != "directory"):
            (blocked if stands is Standing.CHANGED else new).add(path)
    return Plan(wanted, same, kept)


def changed_paths(
    found: Sequence[Found],
    winners: Mapping[bytes, Winner],
    local: Local,
    *,
    synced: bool,
    until: float | None = None,
) -> tuple[set[bytes], list[bytes]]:
    """The scanned paths that the tag does not have as they are here, and those of which that is not known by `until`
    (time.monotonic).

    Where this root was last brought together with this very tag (`synced`), what is merely older here is none
    of them.
    """
    new: set[bytes] = set()
    linked: dict[tuple[int, int], list[bytes]] = {}
    passed: set[bytes] = set()
    unknown: list[bytes] = []
    for item in found:
        if item.path.rpartition(b"/")[0] in passed:
            passed.add(item.path)
            continue
        if item.links > 1 and item.kind == "file":
            linked.setdefault(item.signature.identity, []).append(item.path)
        winner = winners.get(item.path)
        if winner is None and item.path in _TOP:
            continue
        try:
            stands = Standing.CHANGED if winner is None else standing(local, item, winner, until)
        except OutOfTime:
            unknown.append(item.path)
            continue
        if stands is Standing.CHANGED or (not synced and stands in (Standing.OLDER, Standing.OLDER_MODE)):
            new.add(item.path)
        elif stands is Standing.OLDER and item.kind == "directory":
            passed.add(item.path)
    for paths in linked.values():  # names of one file are saved together
        if new.intersection(paths):
            new.update(paths)
    return new, [path for path in unknown if path not in new]
