"""Tags and snapshots as objects: keys that sort newest first, so that one listing tells what a tag holds.

    tags/<tag>/packages/<stamp>-<kind>-<digest>-<fingerprint>-<nonce>
    tags/<tag>/shared/<stamp>-<kind>-<digest>-<fingerprint>-<nonce>

Nothing is ever overwritten and nothing needs a conditional write: two workers that push at the same moment both
leave an entry, and every reader orders them alike.
"""

from __future__ import annotations

import bisect
import contextlib
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

import msgspec

from packhorse.config import TAG
from packhorse.errors import MEND, UNREADABLE, IntegrityError, NoSuchSnapshotError
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.frames import digest_of
from packhorse.snapshot.manifest import Encoded, Manifest, Placement
from packhorse.store.objects import AT_A_TIME, Listed, NotFoundError, Store, side_by_side

Part = documents.Kind
NO_FINGERPRINT = "0" * 64
SNAPSHOT_FORMAT = 1
_BASES = 4
"""The longest chain of manifests that are stored by what differs; writers make chains of one."""
_LAST = 10**14 - 1
_ATTEMPTS = 5
_NAMED = 10
"""Tags that a message names."""
_LARGEST = 16 << 20
"""Bytes of a snapshot's document and of an entry's body: enough for eighty thousand names."""
_T = TypeVar("_T")
_PLACEMENT = re.compile(r"placements/[0-9a-f]{64}/([0-9]{14})-[0-9a-f]{8}")
_KEY = re.compile(
    r"tags/([^/]+)/(packages|shared)/([0-9]{14})-(put|fold)-([0-9a-f]{64})-([0-9a-f]{64})-([0-9a-f]{8})"
)


class TagEntry(NamedTuple):
    """One entry of a tag. `stamp` is the inverted store time: smaller is newer."""

    stamp: str
    kind: str
    digest: str
    fingerprint: str
    nonce: str
    part: str
    tag: str

    @property
    def key(self) -> str:
        """The key of its object."""
        return f"tags/{self.tag}/{self.part}/{self.stamp}-{self.kind}-{self.digest}-{self.fingerprint}-{self.nonce}"

    @property
    def time(self) -> float:
        """When it was written, by the store's clock, in seconds since the epoch."""
        return (_LAST - int(self.stamp)) / 1000


class EntryFacts(msgspec.Struct, frozen=True):
    """The body of a tag entry: what a listing of snapshots shows, and what a fold replaces."""

    snapshot: str = ""
    """"" where the body cannot be read."""
    files: int = 0
    bytes: int = 0
    soabi: str = ""
    platform: str = ""
    partial: bool = False
    """Written at a deadline: files were left out that had not been stored in time."""
    absorbs: tuple[str, ...] = ()
    replaced: int = 0
    """In a fold since which none of the shared entries of its tag counts that were there before: how many those are."""
    history: str = ""
    """Then also the digest over them, see `history`."""


class CorruptSnapshotError(IntegrityError):
    """The document of a snapshot is not what its name promises."""


class SnapshotFacts(msgspec.Struct, frozen=True):
    """The document whose BLAKE3 is the snapshot's id: the packages manifest, and (stamp, digest) of each shared
    manifest that counts, newest first."""

    packages: str
    shared: tuple[tuple[str, str], ...]
    format: int = SNAPSHOT_FORMAT

    def encode(self) -> bytes:
        """The canonical bytes."""
        return msgspec.json.encode(self)

    @property
    def id(self) -> str:
        """The snapshot's id."""
        return digest_of(self.encode()).hex()


# Made when this is imported, as those of `snapshot.manifest` are.
_ENTRY_FACTS = msgspec.json.Decoder(EntryFacts)
_SNAPSHOT_FACTS = msgspec.json.Decoder(SnapshotFacts)


def listed_entries(listing: Iterable[Listed]) -> list[TagEntry]:
    """The tag entries among listed objects, newest first."""
    entries = []
    for item in listing:
        match = _KEY.fullmatch(item.key)
        if match:
            tag, part, stamp, kind, digest, fingerprint, nonce = match.groups()
            entries.append(TagEntry(stamp, kind, digest, fingerprint, nonce, part, tag))
    return sorted(entries)


def read_tag(store: Store, tag: str) -> list[TagEntry]:
    """The entries of one tag, newest first, without the shared ones that a fold replaced."""
    return steady(lambda: without_absorbed(store, listed_entries(store.list(f"tags/{tag}/"))))


def read_tags(store: Store) -> list[TagEntry]:
    """The entries of every tag, newest first, without those that a fold replaced."""
    return read_with_history(store)[1]


def require_tag(store: Store, tag: str) -> None:
    """Raise NoSuchSnapshotError where `tag` has no entry, but others have: then it is a slip. A store without any tag is
    one that is new."""
    if listed_entries(store.list(f"tags/{tag}/")):
        return
    others = sorted({entry.tag for entry in listed_entries(store.list("tags/"))})
    if others:
        more = f" and {len(others) - _NAMED:,} more" if len(others) > _NAMED else ""
        raise NoSuchSnapshotError(
            f"There is no tag {tag} in {store.url}; there are: {', '.join(others[:_NAMED])}{more}.",
            "Name one of those with --tag, or none for all of them.",
        )


def read_with_history(store: Store) -> tuple[list[TagEntry], list[TagEntry]]:
    """The entries of every tag, newest first: all of them, and those that no fold replaced."""

    def read() -> tuple[list[TagEntry], list[TagEntry]]:
        listed = listed_entries(store.list("tags/"))
        return listed, without_absorbed(store, listed)

    return steady(read)


def steady(read: Callable[[], _T]) -> _T:
    """What `read`, which lists entries and gets their bodies, finds; again where an entry was forgotten between the
    two."""
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(NotFoundError):
            return read()
    return read()


def without_absorbed(store: Store, entries: Sequence[TagEntry]) -> list[TagEntry]:
    """`entries`, which are ordered newest first, less those that a fold among them names."""
    shared: dict[str, list[TagEntry]] = {}
    for entry in shared_of(entries):
        shared.setdefault(entry.tag, []).append(entry)
    absorbed = {key for listed in shared.values() for key in _absorbed(store, listed)}
    return [entry for entry in entries if entry.key not in absorbed]


def _absorbed(store: Store, listed: Sequence[TagEntry]) -> set[str]:
    """The keys among the shared entries of a tag that a fold among them names.

    Folds name each other, thousands in a tag with much history. The newest are asked first, and no more where one of
    them tells that nothing before it counts.
    """
    folds = [number for number, entry in enumerate(listed) if entry.kind == "fold"]
    stamps = [entry.stamp for entry in listed]
    absorbed: set[str] = set()
    for start in range(0, len(folds), AT_A_TIME):
        asked = folds[start : start + AT_A_TIME]
        for number, facts in zip(asked, entry_facts(store, [listed[number] for number in asked])):
            absorbed.update(facts.absorbs)
            first = bisect.bisect_right(stamps, stamps[number])
            if facts.replaced == len(listed) - first and facts.history == history(listed[first:]):
                return absorbed | {entry.key for entry in listed[first:]}
    return absorbed


def history(shared: Iterable[TagEntry]) -> str:
    """The digest over the keys of shared entries. Who finds the same entries before a fold as its writer did, knows that
    it, or a fold before it, replaced them all: one that was written meanwhile would make another digest."""
    return digest_of("\n".join(sorted(entry.key for entry in shared)).encode()).hex()


def entry_facts(store: Store, entries: Sequence[TagEntry]) -> list[EntryFacts]:
    """The bodies of tag entries. What counts of a push stands in its key, so one whose body cannot be read only tells
    nothing; raises IntegrityError for such a fold."""
    return side_by_side(lambda entry: _facts(store, entry), entries)


def _facts(store: Store, entry: TagEntry) -> EntryFacts:
    try:
        return _ENTRY_FACTS.decode(store.get(entry.key, _LARGEST))
    except (IntegrityError, *UNREADABLE) as error:
        if entry.kind == "put":
            return EntryFacts()
        raise IntegrityError(
            f"The object {entry.key} cannot be read: the store's copy is corrupt.",
            "Bring it back from another copy of the store, or delete it: what it replaced counts again, as far as that is "
            "still there.",
        ) from error


def snapshot_of(packages: TagEntry | None, shared: Iterable[TagEntry]) -> SnapshotFacts:
    """The snapshot that a packages entry and the shared entries of a tag make."""
    return SnapshotFacts(
        packages=packages.digest if packages else "",
        shared=tuple(sorted((entry.stamp, entry.digest) for entry in shared)),
    )


def newest_packages(entries: Iterable[TagEntry], fingerprint: str) -> TagEntry | None:
    """The newest packages entry of `fingerprint` ("" for packages that no configuration made) among `entries`,
    which are ordered newest first."""
    wanted = fingerprint or NO_FINGERPRINT
    return next(
        (entry for entry in entries if entry.part == "packages" and entry.fingerprint == wanted), None
    )


def shared_of(entries: Iterable[TagEntry]) -> list[TagEntry]:
    """The shared entries among `entries`."""
    return [entry for entry in entries if entry.part == "shared"]


def read_snapshot(store: Store, snapshot: str) -> SnapshotFacts:
    """The document of a snapshot, by its id or at least eight digits of it. Raises NoSuchSnapshotError (3)."""
    named, snapshot = snapshot, snapshot.lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", snapshot):
        tag = f" A tag is named with --tag {named}." if re.fullmatch(TAG, named) else ""
        raise NoSuchSnapshotError(
            f"`{named}` is no snapshot id: those have 8 to 64 hexadecimal digits.",
            f"`packhorse snapshots` lists them.{tag}",
        )
    if len(snapshot) < 64:
        ids = (item.key.removeprefix("snapshots/") for item in store.list("snapshots/"))
        fitting = [each for each in ids if each.startswith(snapshot) and documents.is_digest(each)]
        if len(fitting) != 1:
            many = f"{len(fitting)} snapshots begin" if fitting else "No snapshot begins"
            raise NoSuchSnapshotError(f"{many} with {snapshot}.", "`packhorse snapshots` lists them.")
        snapshot = fitting[0]
    corrupt = CorruptSnapshotError(
        f"The document of snapshot {snapshot[:12]} is corrupt.", "Use another snapshot."
    )
    try:
        body = store.get(f"snapshots/{snapshot}", _LARGEST)
    except NotFoundError as error:
        raise NoSuchSnapshotError(
            f"There is no snapshot {snapshot[:12]}.", "`packhorse snapshots` lists them."
        ) from error
    except IntegrityError as error:
        raise corrupt from error
    if digest_of(body).hex() != snapshot:
        raise corrupt
    try:
        facts = _SNAPSHOT_FACTS.decode(body)
        if facts.format != SNAPSHOT_FORMAT:
            raise IntegrityError(
                f"The snapshot {snapshot[:12]} is written in format {facts.format}, which this packhorse does not know.",
                "Install a newer packhorse.",
            )
    except UNREADABLE as error:
        raise IntegrityError(
            f"The document of snapshot {snapshot[:12]} cannot be read.", "It may need a newer packhorse."
        ) from error
    if not _is_sane(facts):  # the names become paths and keys
        raise corrupt
    return facts


def _is_sane(snapshot: SnapshotFacts) -> bool:
    return (not snapshot.packages or documents.is_digest(snapshot.packages)) and all(
        documents.is_stamp(stamp) and documents.is_digest(digest) for stamp, digest in snapshot.shared
    )


def stamp_after(moment: int, newest: str) -> str:
    """The stamp of an entry written at `moment` (milliseconds) where `newest` is the smallest stamp so far."""
    inverted = _LAST - moment
    if newest:
        inverted = min(inverted, int(newest) - 1)
    return f"{max(inverted, 0):014d}"


def new_entry(
    tag: str,
    part: Part,
    digest: str,
    stamp: str,
    *,
    fingerprint: str = "",
    kind: Literal["put", "fold"] = "put",
) -> TagEntry:
    """An entry to be written."""
    return TagEntry(stamp, kind, digest, fingerprint or NO_FINGERPRINT, secrets.token_hex(4), part, tag)


# --- documents ---


def get_manifest(
    store: Store, digest: str, known: Callable[[str], Encoded | None] = lambda _: None
) -> Encoded:
    """The bytes of the manifest `digest`. Raises IntegrityError where it is missing or corrupt.

    One that is stored by what differs from another needs that one: asked of `known` first, then of the store.
    """
    return _manifest(store, digest, known, _BASES)


def _manifest(store: Store, digest: str, known: Callable[[str], Encoded | None], bases: int) -> Encoded:
    try:
        stored = store.get(f"manifests/{digest}")
    except NotFoundError as error:
        raise _missing("manifest", digest) from error
    base = documents.base_of(stored)
    if not base:
        return documents.raw_manifest(stored, digest)
    if not bases:
        raise IntegrityError(f"The manifest {digest[:12]} is stored in too many parts.", MEND)
    return documents.raw_manifest(stored, digest, known(base) or _manifest(store, base, known, bases - 1))


def base_for(
    store: Store, digest: str, known: Callable[[str], Encoded | None], condemned: Collection[str]
) -> Encoded | None:
    """What a manifest much like `digest` is best stored beside: that one, or the one which it is stored beside itself.

    None where that is gone, or among the keys that are `condemned` and may soon be.
    """
    try:
        base = _stored_beside(store, digest) or digest
        key = f"manifests/{base}"
        if key in condemned or (base != digest and not store.has(key)):
            return None
        return known(base) or get_manifest(store, base)
    except (NotFoundError, IntegrityError):
        return None


def _stored_beside(store: Store, digest: str) -> str:
    """The digest of the manifest that `digest` is stored beside, or nothing. Raises NotFoundError."""
    length = len(documents.DELTA_MAGIC) + 32
    [head] = store.ranges(f"manifests/{digest}", [(0, length)])
    return documents.base_of(bytes(head))


def put_manifest(
    store: Store, manifest: Encoded, base: Encoded | None = None, condemned: Collection[str] = ()
) -> None:
    """Store a manifest, by what differs from `base` where that is given and saves much.

    One that is there stays as it is: others may be stored by what differs from it. But one that no tag needed may have lost
    its own base, or lose it soon, since that is among the keys that are `condemned`: then the whole takes its place.
    """
    key = f"manifests/{manifest.digest}"
    if not store.has(key):
        store.put(key, manifest.beside(base) if base else manifest.whole)
        return
    with contextlib.suppress(IntegrityError):  # shorter than the head of one that has a base
        beside = _stored_beside(store, manifest.digest)
        if beside and (f"manifests/{beside}" in condemned or not store.has(f"manifests/{beside}")):
            store.put(key, manifest.whole)


def get_placement(store: Store, manifest: Manifest, digest: str) -> Placement:
    """The newest placement of a manifest. Raises IntegrityError where there is none that fits."""
    return documents.decode_placement(get_stored_placement(store, digest), manifest, digest)


def get_stored_placement(store: Store, digest: str) -> bytes:
    """The object of it. Raises IntegrityError where there is none."""
    return store.get(newest_placement(store, digest))


def newest_placement(store: Store, digest: str) -> str:
    """The key of the placement of a manifest that counts. Raises IntegrityError where there is none."""
    listed = _listed_placements(store, digest)
    if not listed:
        raise _missing("placement", digest)
    return listed[0]


def _listed_placements(store: Store, digest: str) -> list[str]:
    """The keys of the placements of a manifest, the one that counts first."""
    keys = [item.key for item in store.list(f"placements/{digest}/")]
    return [key for key in keys if _PLACEMENT.fullmatch(key)]


def get_placements(store: Store, digests: Sequence[str]) -> list[Placement]:
    """The newest placements of several manifests, as far as they can be had: for dedup, where none is needed."""

    def newest(digest: str) -> list[Placement]:
        try:
            return [documents.decode_any_placement(store.get(newest_placement(store, digest)))]
        except (IntegrityError, NotFoundError):
            return []

    return [placement for found in side_by_side(newest, digests) for placement in found]


def put_placement(store: Store, placement: Placement) -> int:
    """Store a placement, which counts from now on; returns the store's time of it, in milliseconds, by which the tag's
    entry is stamped.

    The key's own stamp is by the local clock, but before all that are there: whoever wrote one may have had a clock that
    ran ahead. It orders only placements of one manifest.
    """
    digest = placement.manifest.hex()
    before = _listed_placements(store, digest)
    newest = before[0].rpartition("/")[2][:14] if before else ""
    key = f"placements/{digest}/{stamp_after(int(time.time() * 1000), newest)}-{secrets.token_hex(4)}"
    store.put(key, documents.encode_placement(placement))
    return store.modified(key)


def _missing(what: str, digest: str) -> IntegrityError:
    return IntegrityError(
        f"The {what} of {digest[:12]} is missing from the store.",
        MEND,
    )
