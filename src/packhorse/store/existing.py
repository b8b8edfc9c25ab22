"""Which frames a store has and where they lie, so that a push does not send them again."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from packhorse.snapshot.writer import Placed, placed_by
from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.store.tags import TagEntry


class Existing:
    """The frames known by the newest packages manifest of every tag and fingerprint and by all shared ones of
    `entries`, less those in the packs that are `condemned`; asked for once, when first needed."""

    def __init__(self, store: Store, entries: Sequence[TagEntry], condemned: Collection[str]) -> None:
        self._store = store
        self._condemned = condemned
        newest: dict[tuple[str, str], TagEntry] = {}
        for entry in entries:
            if entry.part == "packages":
                newest.setdefault((entry.tag, entry.fingerprint), entry)
        self._digests = {entry.digest for entry in newest.values()}
        self._digests |= {entry.digest for entry in entries if entry.part == "shared"}
        self._frames: dict[bytes, Placed] | None = None

    def frames(self) -> dict[bytes, Placed]:
        """Where each lies, by its digest. Raises StorageError."""
        if self._frames is None:
            self._frames = {}
            for placement in tags.get_placements(self._store, sorted(self._digests)):
                self._frames |= {
                    frame: at for frame, at in placed_by(placement).items() if at.pack not in self._condemned
                }
        return self._frames
