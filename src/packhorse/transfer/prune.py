"""Prune: what no tag needs any more is condemned, and deleted two days later; packs that are mostly unused are repacked.

Promises that whatever reads or pushes meanwhile finds all it needs, that a prune may be killed at any moment and that
several may run at once, without locks and without conditional writes: `store.condemned` says how.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import msgspec

from packhorse.errors import IntegrityError, NoSuchSnapshotError
from packhorse.progress import Progress
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.manifest import Placement
from packhorse.snapshot.writer import Placed, placed_by, placement_of
from packhorse.store import condemned, profiles, tags
from packhorse.store.condemned import LIMIT, Taggable
from packhorse.store.objects import Listed, Store, side_by_side
from packhorse.store.references import References
from packhorse.store.repack import copy_frames
from packhorse.store.tags import EntryFacts, SnapshotFacts, TagEntry
from packhorse.transfer.fold import fold
from packhorse.transfer.retention import Keep, Retention
from packhorse.transfer.union import union

LIVE_SHARE = 0.5
_BATCH = 100
"""Objects that are deleted at a time."""
_KINDS = ("manifests", "packs", "snapshots")
"""In the order in which they are condemned: a snapshot after the manifests that it names."""
_OBJECT = re.compile(r"(?:packs|manifests|snapshots)/[0-9a-f]{64}")
_PLACEMENT = re.compile(r"placements/([0-9a-f]{64})/([0-9]{14})-[0-9a-f]{8}")
_LEASE = re.compile(r"(leases/[^/]+/[0-9a-f]{16})\.\w+")


class PruneResult(msgspec.Struct):
    """What a prune did, or would do (`dry_run`). Bytes are those of the objects."""

    dry_run: bool
    kept: int = 0
    """Entries of tags."""
    forgotten: int = 0
    folded: int = 0
    """Entries of shared directories that became one."""
    repacked: int = 0
    """Packs of which the frames in use were copied, and that were then condemned."""
    copied_bytes: int = 0
    condemned: int = 0
    condemned_bytes: int = 0
    spared: int = 0
    """Condemned objects that are in use again."""
    deleted: int = 0
    deleted_bytes: int = 0
    waiting: int = 0
    """Condemned objects that a later prune deletes."""
    waiting_bytes: int = 0
    profiles: int = 0
    """Profiles deleted: those that a newer one replaced, and those of tags that are gone."""
    live_bytes: int = 0
    """Packs, manifests and snapshots in use."""
    seconds: float = 0.0


def prune(
    store: Store,
    progress: Progress,
    *,
    keep: Keep | None = None,
    live_share: float = LIVE_SHARE,
    dry_run: bool = False,
    limit: float = LIMIT,
) -> PruneResult:
    """Condemn what no tag needs, delete what was condemned twice `limit` seconds ago and is still not needed, and
    repack packs of which less than `live_share` is in use. Without `keep` no entry of a tag is forgotten.

    `limit` is how long pushes, pulls and prunes may take: less than LIMIT is safe only where none runs. Raises
    IntegrityError, with nothing deleted, where something that a tag needs cannot be read; StorageError.
    """
    run = _Prune(store, progress, keep or Keep(), live_share, limit, dry_run=dry_run)
    run.run()
    run.result.seconds = condemned.clock() - run.started
    return run.result


class _Fold(NamedTuple):
    """An entry that is to replace others."""

    entry: TagEntry
    facts: EntryFacts
    snapshot: SnapshotFacts
    clear: Taggable


class _Prune:
    """One prune on its way."""

    def __init__(
        self, store: Store, progress: Progress, keep: Keep, live_share: float, limit: float, *, dry_run: bool
    ) -> None:
        self.store, self.progress, self.keep = store, progress, keep
        self.live_share, self.limit, self.dry_run = live_share, limit, dry_run
        self.started = condemned.clock()
        self.result = PruneResult(dry_run=dry_run)
        self.bases: set[str] = set()
        """Manifests of which only the bytes are needed: others are stored by what differs from them. They are condemned
        like any other, so that no push uses them again, but stay as long as they are needed."""
        self.snapshots: dict[str, list[str]] = {}
        """What snapshots name that no kept entry names."""

    def run(self) -> None:
        self.progress.stage("looking at the store")
        # First the marks, as a push does; then the objects, and only then the tags: what is put meanwhile is either
        # not among the objects, or its tag is seen.
        self.marks = condemned.marks(self.store, clock=not self.dry_run)
        self.now = int(time.time() * 1000) if self.dry_run else self.marks.now
        self.objects = {
            item.key: item
            for kind in _KINDS
            for item in self.store.list(f"{kind}/")
            if _OBJECT.fullmatch(item.key)
        }
        self.retention = Retention(self.store, self.keep, self.now)
        self.placements = self._placements()
        self.references = References(self.store, self.placements)
        folds = self._folds()
        gone = self.retention.forgotten(self.limit)
        self.result.kept, self.result.forgotten = len(self.retention.entries) - len(gone), len(gone)
        live = self._live(folds)
        for each in folds:
            self._write(each)
        self._forget(gone)
        unused = self._repack()
        live = {key for key in live if not key.startswith("packs/")} | {
            f"packs/{pack}" for placement in self.references.placements.values() for pack in placement.packs
        }
        live -= unused
        self._sweep(live)
        self._condemn(live)
        self._tidy(live)
        self._tidy_profiles({entry.tag for entry in self.retention.entries})
        self.result.live_bytes = sum(
            item.size for key, item in self.objects.items() if key in live | self.bases
        )

    # --- tags ---

    def _folds(self) -> list[_Fold]:
        """For each tag one entry that replaces those shared ones that count, but are not kept for their snapshot."""
        folds = []
        for tag in sorted({entry.tag for entry in self.retention.state}):
            listed = [entry for entry in self.retention.state if entry.tag == tag]
            kept = {entry.stamp for entry in listed if entry in self.retention.kept}
            # Of entries with one stamp the digests tell which counts, and a fold has another one: they stay together.
            old = [entry for entry in listed if entry not in self.retention.kept and entry.stamp not in kept]
            if len(old) > 1:
                folds.append(self._fold(tag, listed, old))
        return folds

    def _fold(self, tag: str, listed: Sequence[TagEntry], old: Sequence[TagEntry]) -> _Fold:
        manifests = {
            entry.digest: documents.decode_manifest(tags.get_manifest(self.store, entry.digest), "shared")
            for entry in old
        }
        placed: dict[bytes, Placed] = {}
        for digest, manifest in manifests.items():
            placed |= placed_by(tags.get_placement(self.store, manifest, digest))
        folded = fold(union((entry.stamp, entry.digest, manifests[entry.digest]) for entry in old), manifests)
        clear = condemned.clear(
            self.store,
            () if self.dry_run else self.marks,
            Taggable(documents.encode(folded), folded, placed),
        )
        own = [entry for entry in self.retention.entries if entry.tag == tag]
        entry = tags.new_entry(
            tag, "shared", clear.encoded.digest, tags.stamp_after(self.now, own[0].stamp), kind="fold"
        )
        packages = next((each for each in own if each.part == "packages"), None)
        snapshot = tags.snapshot_of(packages, [entry, *(each for each in listed if each not in old)])
        facts = EntryFacts(
            snapshot=snapshot.id,
            files=folded.files,
            bytes=folded.bytes,
            absorbs=tuple(each.key for each in old),
        )
        self.result.folded += len(old)
        return _Fold(entry, facts, snapshot, clear)

    def _write(self, each: _Fold) -> None:
        """As a push does it, and in its order."""
        if self.dry_run:
            return
        tags.put_placement(self.store, self.references.placements[each.clear.encoded.digest])
        tags.put_manifest(self.store, each.clear.encoded)
        self.store.put(f"snapshots/{each.snapshot.id}", each.snapshot.encode())
        condemned.require_time(self.started, "prune")
        self.store.put(each.entry.key, msgspec.json.encode(each.facts))

    def _forget(self, gone: Sequence[TagEntry]) -> None:
        if self.dry_run:
            return
        for kind in ("put", "fold"):
            self.store.delete([entry.key for entry in gone if entry.kind == kind])

    # --- what is in use ---

    def _placements(self) -> dict[str, list[Listed]]:
        """The placements of each manifest, the one that counts first. Where a killed push left placements without
        their manifest, they stand for it among the objects."""
        placements: dict[str, list[Listed]] = {}
        for item in self.store.list("placements/"):
            if match := _PLACEMENT.fullmatch(item.key):
                placements.setdefault(match[1], []).append(item)
        for digest, listed in placements.items():
            key = f"manifests/{digest}"
            whole = self.objects.get(key, Listed(key, 0, 0))
            self.objects[key] = Listed(
                key,
                whole.size + sum(item.size for item in listed),
                max(whole.modified, *(item.modified for item in listed)),
            )
        return placements

    def _live(self, folds: Sequence[_Fold]) -> set[str]:
        """The keys of all objects that a tag needs, and of the snapshots that are whole with them."""
        absorbed = {key for each in folds for key in each.facts.absorbs}
        roots = {f"manifests/{entry.digest}" for entry in self.retention.kept}
        roots |= {f"manifests/{entry.digest}" for entry in self.retention.state if entry.key not in absorbed}
        roots |= {
            f"snapshots/{facts.snapshot}" for facts in self.retention.facts.values()
        } & self.objects.keys()
        live = self.references.closure(roots)
        self.bases = {key.replace("bases/", "manifests/") for key in live if key.startswith("bases/")}
        for each in folds:
            digest = each.clear.encoded.digest
            placement = placement_of(digest, each.clear.manifest.frames, each.clear.placed)
            self.references.placements[digest] = placement
            live |= {f"manifests/{digest}", f"snapshots/{each.snapshot.id}"}
            live |= {f"packs/{pack}" for pack in placement.packs}
        others = [key for key in self.objects if key.startswith("snapshots/") and key not in live]
        self.snapshots = dict(zip(others, side_by_side(self._named_by, others)))
        live |= {key for key, needs in self.snapshots.items() if needs and live.issuperset(needs)}
        return live

    def _named_by(self, key: str) -> list[str]:
        """The manifests that a snapshot names; none where it cannot be read, or another prune deleted it."""
        try:
            return self.references.needs(key)
        except (NoSuchSnapshotError, IntegrityError):
            return []

    # --- repacking ---

    def _repack(self) -> set[str]:
        """Copy what is in use of packs of which little is; returns the keys of the packs that are now unused."""
        used: dict[str, set[tuple[int, int]]] = {}
        for placement in self.references.placements.values():
            for place in placement.places:
                used.setdefault(f"packs/{placement.packs[place.pack]}", set()).add(
                    (place.offset, place.length)
                )
        old = {
            key
            for key, spans in used.items()
            if (item := self.objects.get(key)) is not None
            and key not in self.marks  # its time would have begun before it fell out of use
            and self._age(item.modified) >= self.limit
            and sum(length for _, length in spans) < self.live_share * item.size
        }
        homes: dict[bytes, Placed] = {}
        wanted: dict[bytes, Placed] = {}
        touched = []
        for digest, placement in self.references.placements.items():
            for frame, at in placed_by(placement).items():
                (wanted if f"packs/{at.pack}" in old else homes).setdefault(frame, at)
            if old.intersection(f"packs/{pack}" for pack in placement.packs):
                touched.append(digest)
        copied = {frame: at for frame, at in wanted.items() if frame not in homes}
        self.result.repacked, self.result.copied_bytes = len(old), sum(at.length for at in copied.values())
        if self.dry_run or not old:
            return old
        self.progress.stage("repacking", self.result.copied_bytes)
        homes |= copy_frames(self.store, copied, self.progress)
        for digest in touched:
            before = self.references.placements[digest]
            places = {
                frame: homes[frame] if f"packs/{at.pack}" in old else at
                for frame, at in placed_by(before).items()
            }
            after = placement_of(digest, before.frames, places)
            self._replace(digest, after)
        return old

    def _replace(self, digest: str, placement: Placement) -> None:
        condemned.require_time(self.started, "prune")
        tags.put_placement(self.store, placement)
        self.references.placements[digest] = placement

    # --- condemning and deleting ---

    def _age(self, modified: int) -> float:
        return (self.now - modified) / 1000

    def _sweep(self, live: Collection[str]) -> None:
        """Delete what was condemned long enough ago and is still not needed; take marks away that are in vain.

        A mark outlives its object by the time that another prune may take, which might delete it a second time: a
        push must not have written it again by then.
        """
        doomed, vain = [], []
        for key, marked in self.marks.items():
            if key in live:
                self.result.spared += 1
                vain.append(key)
            elif key not in self.objects:
                if self._age(marked) >= self.limit:
                    vain.append(key)
            elif self._age(marked) >= 2 * self.limit and key not in self.bases:
                doomed.append(key)
            else:
                self.result.waiting += 1
                self.result.waiting_bytes += self.objects[key].size
        self.result.deleted = len(doomed)
        self.result.deleted_bytes = sum(self.objects[key].size for key in doomed)
        if self.dry_run:
            return
        condemned.lift(self.store, vain)
        self.progress.stage("deleting", self.result.deleted_bytes)
        for start in range(0, len(doomed), _BATCH):
            batch = doomed[start : start + _BATCH]
            condemned.mark(self.store, batch)
            condemned.require_time(self.started, "prune")
            self.store.delete(batch)
            digests = [key.rpartition("/")[2] for key in batch if key.startswith("manifests/")]
            self.store.delete([item.key for digest in digests for item in self.placements.get(digest, ())])
            self.progress.advance(sum(self.objects[key].size for key in batch))

    def _condemn(self, live: Collection[str]) -> None:
        """Mark what is not needed and old enough that no push in progress has made it."""
        unused = [
            key
            for key, item in self.objects.items()
            if key not in live and key not in self.marks and self._age(item.modified) >= self.limit
        ]
        manifests = {key for key in unused if key.startswith("manifests/")}
        for kind in _KINDS:
            chosen = [key for key in unused if key.startswith(kind)]
            if kind == "snapshots":
                # Only with a manifest that is condemned or gone: a push that writes that one again does not take the
                # same name for it, and so none for the snapshot.
                chosen = [
                    key
                    for key in chosen
                    if any(
                        need in manifests or need in self.marks or need not in self.objects
                        for need in self.snapshots[key]
                    )
                ]
            self.result.condemned += len(chosen)
            self.result.condemned_bytes += sum(self.objects[key].size for key in chosen)
            if not self.dry_run:
                condemned.mark(self.store, chosen)
        self.result.waiting += self.result.condemned
        self.result.waiting_bytes += self.result.condemned_bytes

    def _tidy(self, live: Collection[str]) -> None:
        """Delete placements that have not counted for long enough, and what dead workers left of leases and of what they
        put into a directory."""
        gone = [
            item.key
            for digest, listed in self.placements.items()
            if f"manifests/{digest}" in live and self._age(listed[0].modified) >= 2 * self.limit
            for item in listed[1:]
        ]
        leases: dict[str, list[Listed]] = {}
        for item in self.store.list("leases/"):
            if match := _LEASE.fullmatch(item.key):
                leases.setdefault(match[1], []).append(item)
        gone += _keys(
            listed
            for listed in leases.values()
            if all(self._age(item.modified) >= 2 * self.limit for item in listed)
        )
        if not self.dry_run:
            condemned.require_time(self.started, "prune")
            self.store.delete(gone)
            self.store.remove_unfinished(max(self.limit, LIMIT))  # a put breaks that loses its file

    def _tidy_profiles(self, tagged: Collection[str]) -> None:
        """Delete profiles that newer ones replaced; of a tag without entries all that no push in progress may be
        about to give one."""
        found = profiles.listed_profiles(self.store.list("profiles/"))
        gone = {*profiles.surplus(found)}
        gone |= {
            each.listed.key
            for each in found
            if each.tag not in tagged and self._age(each.listed.modified) >= self.limit
        }
        self.result.profiles = len(gone)
        if not self.dry_run:
            self.store.delete(sorted(gone))


def _keys(listings: Iterable[Iterable[Listed]]) -> list[str]:
    return [item.key for listed in listings for item in listed]
