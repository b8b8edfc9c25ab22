"""References: which objects an object of the store needs, and so all that a set of objects needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from packhorse.errors import MEND, IntegrityError
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.manifest import Placement
from packhorse.store import tags
from packhorse.store.objects import Listed, NotFoundError, Store, side_by_side


class References:
    """What objects of a store need. `placements` are the placements that count, by manifest, as far as asked for."""

    def __init__(self, store: Store, listed: Mapping[str, list[Listed]]) -> None:
        """`listed` has the placements of each manifest, newest first."""
        self._store = store
        self._listed = listed
        self.placements: dict[str, Placement] = {}

    def needs(self, key: str) -> list[str]:
        """The keys of what the object `key` needs directly. Raises IntegrityError where that cannot be told.

        A snapshot needs its manifests, a manifest the placement that counts, a placement its packs. A manifest that is
        stored by what differs from another needs that one too, but only its bytes, not its frames: it is named
        `bases/<digest>` instead of `manifests/<digest>`. A corrupt snapshot, which nobody can restore, needs nothing.
        """
        kind, _, name = key.partition("/")
        if kind == "snapshots":
            try:
                snapshot = tags.read_snapshot(self._store, name)
            except tags.CorruptSnapshotError:
                return []
            digests = [
                *([snapshot.packages] if snapshot.packages else []),
                *(each for _, each in snapshot.shared),
            ]
            return [f"manifests/{digest}" for digest in digests]
        if kind == "bases":
            return self._base(name)
        if kind == "manifests":
            listed = self._listed.get(name)
            newest = listed[0].key if listed else tags.newest_placement(self._store, name)
            return [newest, *self._base(name)]
        if kind == "placements":
            digest = name.partition("/")[0]
            placement = documents.decode_any_placement(self._store.get(key))
            if placement.manifest.hex() != digest:
                raise IntegrityError(f"A placement of manifest {digest[:12]} belongs to another one.", MEND)
            self.placements[digest] = placement
            return [f"packs/{pack}" for pack in placement.packs]
        return []

    def _base(self, digest: str) -> list[str]:
        try:
            base = documents.base_of(self._store.get(f"manifests/{digest}"))
        except NotFoundError as error:
            raise IntegrityError(f"The manifest {digest[:12]} is missing from the store.", MEND) from error
        return [f"bases/{base}"] if base else []

    def closure(self, keys: Iterable[str]) -> set[str]:
        """`keys` and all that they need, however far down."""
        reached: set[str] = set()
        frontier = set(keys)
        while frontier:
            reached |= frontier
            found = side_by_side(self.needs, list(frontier))
            frontier = {key for keys in found for key in keys} - reached
        return reached
