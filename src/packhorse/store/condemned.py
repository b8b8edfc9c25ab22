"""Condemned objects: what `prune` means to delete, and how a push keeps clear of it without any lock.

    condemned/<key of the object>     for packs, manifests and snapshots

An object that nothing needs is marked first and deleted 48 hours later, after the tags were read again. A push lists
the marks before it looks at the store, uses nothing that is marked, and gives up after 24 hours. So whatever it
uses was marked later than its beginning or not at all, and its tag is there when the time of that mark has come.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import msgspec

from packhorse.errors import PackhorseError
from packhorse.snapshot import frames
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.manifest import Encoded, Frame, Manifest
from packhorse.snapshot.writer import NONCE, Placed
from packhorse.store.objects import Store, side_by_side

LIMIT = 24 * 3600.0
"""Seconds after which a push, a pull or a prune gives up. An object is condemned when it is at least this old, so that
no push that still runs has made it, and deleted twice this time after that."""
CLOCK = "condemned/clock"
"""Written to learn the store's time."""
_MARK = re.compile(r"condemned/((?:packs|manifests|snapshots)/[0-9a-f]{64})")


class Marks(dict[str, int]):
    """The keys of all condemned objects, and when they were marked (store's time, milliseconds)."""

    now: int = 0
    """The present time by the store's clock, if that was asked for."""


def marks(store: Store, *, clock: bool = False) -> Marks:
    """What is condemned. With `clock` also the store's time, for which an empty object is written; not into a directory that
    is not there, so that a slip in its name makes no store."""
    if clock and store.is_there:
        store.put(CLOCK, b"")
    found = Marks()
    for item in store.list("condemned/"):
        if item.key == CLOCK:
            found.now = item.modified
        elif match := _MARK.fullmatch(item.key):
            found[match[1]] = item.modified
    return found


def mark(store: Store, keys: Iterable[str]) -> None:
    """Condemn objects; what is marked already counts from now on."""
    side_by_side(lambda key: store.put(f"condemned/{key}", b""), list(keys))


def lift(store: Store, keys: Sequence[str]) -> None:
    """Take marks away."""
    store.delete([f"condemned/{key}" for key in keys])


def clock() -> float:
    """Seconds that nobody sets and that pass while the machine sleeps, too, as they do for the store (clock_gettime(2),
    CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def require_time(started: float, what: str, limit: float = LIMIT) -> None:
    """Raise PackhorseError where `what`, begun at `started` (`clock`), has taken longer than `limit` seconds: what it
    relies on may be deleted from then on."""
    if clock() - started > limit:
        raise PackhorseError(
            f"The {what} took longer than {limit / 3600:g} hours, so what it relies on may be gone from the store.",
            f"Begin the {what} again.",
        )


def packs(condemned: Collection[str]) -> set[str]:
    """The names of the packs among condemned keys."""
    return {key.removeprefix("packs/") for key in condemned if key.startswith("packs/")}


class Taggable(NamedTuple):
    """A manifest, as bytes too, and where its frames lie."""

    encoded: Encoded
    manifest: Manifest
    """Its entries may be missing."""
    placed: Mapping[bytes, Placed]


def clear(store: Store, condemned: Collection[str], one: Taggable) -> Taggable:
    """`one`, or where its manifest is in `condemned` the same with a frame more, which no file uses, and so with another
    name: under the old one it may be deleted at any moment, also when it is written again. Raises StorageError.
    """
    encoded, manifest, placed = one
    if f"manifests/{encoded.digest}" not in condemned:
        return one
    raw = secrets.token_bytes(NONCE)
    own = frames.digest_of(raw)
    name = frames.group_digest([own]).hex()
    store.put(f"packs/{name}", raw)
    whole = documents.decode_manifest(encoded, cast("documents.Kind", manifest.kind))
    manifest = msgspec.structs.replace(whole, frames=(*whole.frames, Frame(own, len(raw))))
    placed = {**placed, own: Placed(name, 0, len(raw), frames.RAW, own)}
    return Taggable(documents.encode(manifest), manifest, placed)
