"""Retention: which entries of the store's tags a prune keeps, and which it may forget. Decides, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.store.tags import TagEntry


@dataclass(frozen=True)
class Keep:
    """Which entries of a tag are kept: of each fingerprint the `number` newest, and those that are not older than
    `seconds`. With neither all are. The newest packages of each fingerprint are always kept."""

    number: int = 0
    seconds: float = 0.0
    tag: str = ""
    """The tag that this is for; every tag if empty."""

    @property
    def all(self) -> bool:
        """Whether nothing is to be forgotten."""
        return not self.number and not self.seconds


class Retention:
    """The entries of all tags at the time `now` (the store's, milliseconds), newest first, and what becomes of them."""

    def __init__(self, store: Store, keep: Keep, now: int) -> None:
        """Read them. Raises StorageError."""
        self._store, self._keep, self._now = store, keep, now
        tags.steady(self._read)

    def _read(self) -> None:
        self.entries = tags.listed_entries(self._store.list("tags/"))
        folds = [entry for entry in self.entries if entry.kind == "fold"]
        self._folds = dict(zip(folds, tags.entry_facts(self._store, folds)))
        absorbed = {key for facts in self._folds.values() for key in facts.absorbs}
        self.state = [entry for entry in tags.shared_of(self.entries) if entry.key not in absorbed]
        """The shared entries that count."""
        self.kept = self._retained()
        self.facts = dict(zip(self.kept, tags.entry_facts(self._store, self.kept)))
        """The bodies of the entries that are kept."""

    def _retained(self) -> list[TagEntry]:
        if self._keep.all:
            return self.entries
        retained = []
        count: dict[tuple[str, str, str], int] = {}
        for entry in self.entries:
            if self._keep.tag and entry.tag != self._keep.tag:
                retained.append(entry)
            elif entry.kind == "put":  # a fold is no push: it only says what others said
                group = entry.tag, entry.part, entry.fingerprint
                number = count[group] = count.get(group, 0) + 1
                least = max(self._keep.number, 1 if entry.part == "packages" else 0)
                age = self._now / 1000 - entry.time
                if number <= least or (self._keep.seconds and age <= self._keep.seconds):
                    retained.append(entry)
        return retained

    def forgotten(self, limit: float) -> list[TagEntry]:
        """The entries that neither count nor are kept, folds last.

        What a fold replaced goes when no listing that began before the fold, at most `limit` seconds ago, is still in
        use; the fold itself stays as long as one of those does: else that one would count again.
        """
        if self._keep.all:
            return []
        replaced = {
            key
            for fold, facts in self._folds.items()
            if self._now / 1000 - fold.time >= limit
            for key in facts.absorbs
        }
        kept = set(self.kept)
        gone = {
            entry
            for entry in self.entries
            if entry not in kept and (entry.part == "packages" or entry.key in replaced)
        }
        staying = {entry.key for entry in self.entries if entry not in gone}
        gone -= {fold for fold, facts in self._folds.items() if staying.intersection(facts.absorbs)}
        return sorted(gone, key=lambda entry: (entry.kind == "fold", entry))
