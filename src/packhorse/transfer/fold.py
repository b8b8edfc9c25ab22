"""Fold: many shared manifests of a tag become one that says the same, so that a boot reads few documents."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from packhorse.snapshot.manifest import Entry, File, Frame, Hardlink, Manifest, triples
from packhorse.transfer.union import Winner

LIMIT = 64
"""A push that finds more shared entries than this folds them."""


def fold(winners: Mapping[bytes, Winner], manifests: Mapping[str, Manifest]) -> Manifest:
    """One manifest with what counts for each path, each entry under the stamp that it had.

    `winners` is the union of `manifests` (by digest). A hard link whose target now comes from another manifest
    becomes a file of its own.
    """
    frames: dict[bytes, int] = {}
    lengths: list[Frame] = []
    stamps: dict[str, int] = {}
    entries: list[Entry] = []
    stamped: list[int] = []
    for path, winner in winners.items():
        manifest, entry = manifests[winner.digest], winner.entry
        if isinstance(entry, Hardlink):
            target = winners.get(entry.target)
            if target is None or target.digest != winner.digest:
                own = next(each for each in manifest.entries if each.path == entry.target)
                assert isinstance(own, File)
                entry = msgspec.structs.replace(own, path=path)
        if isinstance(entry, File):
            pieces: list[int] = []
            for number, offset, length in triples(entry.pieces):
                frame = manifest.frames[number]
                if frame.digest not in frames:
                    frames[frame.digest] = len(lengths)
                    lengths.append(frame)
                elif (
                    lengths[frames[frame.digest]].gpus != frame.gpus
                ):  # equal bytes that different GPUs need: all do
                    lengths[frames[frame.digest]] = Frame(frame.digest, frame.length)
                pieces += (frames[frame.digest], offset, length)
            entry = msgspec.structs.replace(entry, pieces=tuple(pieces))
        entries.append(entry)
        stamped.append(stamps.setdefault(winner.stamp, len(stamps)))
    return Manifest(
        kind="shared",
        frames=tuple(lengths),
        entries=tuple(entries),
        stamps=tuple(stamps),
        stamped=tuple(stamped),
    )
