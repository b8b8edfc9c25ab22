"""The shared directories of a tag: the union of its shared manifests, by path the newest wins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from packhorse.snapshot.contents import content_of
from packhorse.snapshot.manifest import Directory, Entry, File, Hardlink, Manifest, Symlink


class Winner(NamedTuple):
    """The entry that counts for a path, and the manifest that it is in."""

    stamp: str
    digest: str
    entry: Entry
    content: bytes
    """What it contains: see `content_of`; for a symbolic link its target, for a directory nothing."""
    mode: int
    mtime: int
    """In nanoseconds; for a hard link that of its file."""
    file: File | None
    """The file that it is, or is a name of."""


def union(manifests: Iterable[tuple[str, str, Manifest]]) -> dict[bytes, Winner]:
    """path → what counts there, of (stamp, digest, manifest), in the order of the paths; an entry of a fold keeps its own
    stamp.

    A directory never hides a file below it: where a newer entry makes a directory of what was a file, the
    older entry is gone, and an older entry below what a newer one made a file is left out.
    """
    winners: dict[bytes, Winner] = {}
    for stamp, digest, manifest in manifests:
        files: dict[bytes, tuple[bytes, int, int, File | None]] = {}
        for number, entry in enumerate(manifest.entries):
            own = manifest.stamps[manifest.stamped[number]] if manifest.stamps else stamp
            held: tuple[bytes, int, int, File | None]
            if isinstance(entry, File):
                held = content_of(entry, manifest.frames), entry.mode, entry.mtime, entry
                files[entry.path] = held
            elif isinstance(entry, Hardlink):
                held = files[entry.target]
            elif isinstance(entry, Symlink):
                held = entry.target, 0, entry.mtime, None
            else:
                held = b"", entry.mode, entry.mtime, None
            present = winners.get(entry.path)
            if present is None or (own, digest) < (present.stamp, present.digest):
                winners[entry.path] = Winner(own, digest, entry, *held)
    return _reachable(winners)


def _reachable(winners: dict[bytes, Winner]) -> dict[bytes, Winner]:
    """Those below nothing but directories, in the order of their paths: what a path lies in comes before it."""
    reached: dict[bytes, Winner] = {}
    for path, winner in sorted(winners.items(), key=lambda each: each[0]):
        parent = path.rpartition(b"/")[0]
        above = reached.get(parent)
        if not parent or (above is not None and isinstance(above.entry, Directory)):
            reached[path] = winner
    return reached
