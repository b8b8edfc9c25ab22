"""Push: the persistent directories of a root become objects and an entry of a tag.

Promises the order packs, placements, manifests, snapshot, tag, so that a reader sees the old state or the new
one; that what the store has is not sent again; and that a backup only ever adds paths.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import msgspec

from packhorse.errors import PackhorseError, unless_full
from packhorse.install.interpreter import Interpreter
from packhorse.progress import Progress
from packhorse.root import PERSISTENT, SHARED, Root, State
from packhorse.snapshot import frames, holes
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.contents import Before, content_of
from packhorse.snapshot.index import Seen
from packhorse.snapshot.manifest import Encoded, Entry, File, Listing, Manifest
from packhorse.snapshot.scan import Found, readable, scan
from packhorse.snapshot.writer import Placed, Written, placement_of, write
from packhorse.store import condemned, tags
from packhorse.store.existing import Existing
from packhorse.store.objects import Store
from packhorse.store.tags import EntryFacts, TagEntry, newest_packages, shared_of
from packhorse.store.uploader import HELD, HELD_DEEP, HELD_EACH, HELD_MOST, Uploader
from packhorse.transfer import arriving
from packhorse.transfer.fold import LIMIT, fold
from packhorse.transfer.local import PACKAGES, Local, Synced, source_of
from packhorse.transfer.merge import changed_paths
from packhorse.transfer.union import union
from packhorse.watch.memory import allowance, peak, uncollected


class PushResult(msgspec.Struct):
    """What a push did. `files` and `bytes` count what the pushed manifests hold, 0 where nothing was; sizes are bytes."""

    snapshot: str
    """The id of one that the store has; "" where the root holds nothing, or nothing was pushed and none is known."""
    tag: str
    files: int = 0
    bytes: int = 0
    transferred_bytes: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    pushed: list[str] = []
    """`packages` and `shared`, as far as they had changed."""
    unsaved: list[str] = []
    """Paths that changed while they were read, or were not stored by the deadline."""


class _Part(NamedTuple):
    """A manifest ready to be tagged."""

    part: tags.Part
    encoded: Encoded
    manifest: Manifest
    """That of packages without its entries, which take three times the memory of the bytes."""
    placed: Mapping[bytes, Placed]
    files: int
    bytes: int
    absorbed: tuple[TagEntry, ...] = ()
    """The entries that a fold replaces."""
    before: str = ""
    """The digest of a manifest that this one resembles."""

    @property
    def digest(self) -> str:
        return self.encoded.digest


class _Push:
    """One push on its way."""

    def __init__(
        self,
        root: Root,
        store: Store,
        tag: str,
        progress: Progress,
        warn: Callable[[str], None],
        *,
        level: int,
        threads: int | None,
        connections: int | None,
        repair: bool,
    ) -> None:
        self.level, self.threads = level, threads
        self.root, self.store, self.tag, self.progress, self.warn = root, store, tag, progress, warn
        self.repair = repair
        self.started = condemned.clock()
        self.condemned = condemned.marks(store)  # first of all: see there
        self.taken = condemned.packs(self.condemned)
        self.local = Local(root)
        self.source = source_of(store, tag)
        self.synced: Synced | None = None
        """What the shared directories were last brought together with; None while nobody asked."""
        self.state = root.state()
        self.known: list[_Part] = []
        """The packages, if the tag turned out to have them already."""
        self.seen: Callable[[], Iterator[Seen]] | None = None
        """What `packages/` contains, if its files were written down anew."""
        self.empty = False
        """Whether nothing was found where all was looked for."""
        listed, everything = tags.read_with_history(store)
        self.mine = [entry for entry in everything if entry.tag == tag]
        self.history = [entry for entry in shared_of(listed) if entry.tag == tag]
        """All shared entries of the tag, also those that a fold replaced."""
        self.sent: dict[bytes, Placed] = {}
        self.mended: dict[str, Manifest] = {}
        """Listed shared manifests of which all frames were sent again, by their digests; `sent` tells where they lie."""
        self.existing = Existing(store, [] if repair else everything, self.taken)
        held = allowance(HELD, HELD_EACH, HELD_MOST) if level < frames.DEEP else HELD_DEEP
        self.uploader = Uploader(store, connections=connections, held=held)
        self.result = PushResult(snapshot="", tag=tag)

    def packages(self, interpreter: Callable[[], Interpreter]) -> list[_Part]:
        """The part for `packages/`, if the tag does not have it as it is here."""
        base = os.fsencode(self.root.packages)
        state = self.state
        newest = newest_packages(self.mine, state.fingerprint)
        with uncollected():
            found = scan(base, skipped=self._tell)
            if not found:
                self.empty = True
                return []
            known = self.local.cached(state.manifest, "packages") if state.manifest else None
            if known is None and state.gpus:  # it tells what is a hole
                known = self.local.manifest(self.store, state.manifest, "packages")
            if (
                not self.repair
                and known is not None
                and newest
                and newest.digest == state.manifest
                and self.local.equals(found, known)
            ):
                return []
        if known is not None and self.local.holes:
            self._refuse_changed_holes(found, known)
        before = Before.of(known)
        del known  # 24 MB for 40,000 files
        self._announce("saving packages", found)
        written = self._write(
            base,
            found,
            index_prefix=PACKAGES,
            existing=self.existing.frames(),
            before=before,
            holes=self.local.holes,
        )
        if written.changed:
            first = os.path.join(base, written.changed[0])
            if os.path.lexists(first) and not os.access(first, os.R_OK, follow_symlinks=False):
                raise PackhorseError(
                    f"{readable(PACKAGES + written.changed[0])} may not be read by this user.",
                    "Change its owner or its mode, and push again.",
                )
            raise PackhorseError(
                f"{readable(written.changed[0])} in packages/ changed while it was saved.",
                "Push again when nothing installs into this root.",
            )
        self.seen = written.seen
        made_by = (
            (state.soabi, state.platform) if state.soabi else (interpreter().soabi, interpreter().platform)
        )
        manifest = Manifest(
            kind="packages",
            fingerprint=state.fingerprint,
            soabi=made_by[0],
            platform=made_by[1],
            frames=tuple(written.frames),
        )
        part = self._part("packages", manifest, written.placed, Listing(written.entries()))
        if newest is not None and newest.digest == part.digest and not self.repair:
            self.known = [part]
            self.local.keep(part.encoded)
            return []
        self._count(part)
        return [part._replace(before=state.manifest)]

    def _refuse_changed_holes(self, found: Sequence[Found], known: Manifest) -> None:
        """Raise PackhorseError for a changed file that still lacks code; the index vouches for the others from now on."""
        entries = {entry.path: entry for entry in known.entries if isinstance(entry, File)}
        lacking = holes.lacking(known, holes.cold(known, self.state.gpus))
        for item in found:
            if item.path not in lacking:
                continue
            entry = entries[item.path]
            if self.local.holds(item, entry, known.frames):
                # Also where it is too new to be trusted, having just been given another name: it must not be read.
                self.local.index.restored(
                    PACKAGES + item.path, item.signature, (content_of(entry, known.frames), item.mode)
                )
                continue
            if holes.has_holes(os.path.join(os.fsencode(self.root.packages), item.path)):
                raise PackhorseError(
                    f"packages/{readable(item.path)} was changed here while code for other GPUs was missing from it.",
                    "Bring it back with `packhorse pull`, change it again, and push then.",
                )

    def shared(
        self, directories: Sequence[str], exclude: Sequence[str], deadline: float | None
    ) -> list[_Part]:
        """The part for what was added to or changed in the shared `directories`."""
        base = os.fsencode(self.root.path)
        found = scan(base, [name.encode() for name in directories], exclude=exclude, skipped=self._tell)
        found = arriving.without(self.root, found)
        if any(b"/" in item.path for item in found):
            self.empty = False
        self.synced = self.local.synced()
        listed = shared_of(self.mine)
        manifests = {
            entry.digest: self.local.manifest(self.store, entry.digest, "shared") for entry in listed
        }
        present = union((entry.stamp, entry.digest, manifests[entry.digest]) for entry in listed)
        folded = self._folded(listed, fold(present, manifests)) if len(listed) > LIMIT else []
        synced = self.synced.source == self.source
        # Half of the time, so that what is known to have changed is saved whatever else has to be read to find out.
        until = None if deadline is None else (time.monotonic() + deadline) / 2
        new, unknown = changed_paths(found, present, self.local, synced=synced, until=until)
        self.result.unsaved += [readable(path) for path in unknown]
        if self.repair:
            for digest in manifests:
                self.store.put(f"manifests/{digest}", self.local.bytes_of(self.store, digest).whole)
            if not self._mend(base, found, listed, manifests) and any(
                item.kind != "directory" for item in found
            ):
                new = {item.path for item in found}
        if not new:
            return folded
        for path in list(new):  # a manifest names the directories above its paths
            while path := path.rpartition(b"/")[0]:
                new.add(path)
        chosen = [item for item in found if item.path in new]
        self._announce("saving " + ", ".join(directories), chosen)
        written = self._write(
            base, chosen, index_prefix=b"", existing=self.existing.frames() | self.sent, deadline=deadline
        )
        self.local.index.update(written.seen())
        self.result.unsaved += [readable(path) for path in (*written.changed, *written.unfinished)]
        frames_used, entries = _with_used_frames(written)
        if self.result.unsaved and all(isinstance(entry, documents.Directory) for entry in entries):
            return folded
        added = self._part(
            "shared", Manifest(kind="shared", frames=frames_used, entries=entries), written.placed
        )
        self._count(added)
        return [added, *folded]

    def _mend(
        self,
        base: bytes,
        found: Sequence[Found],
        listed: Sequence[TagEntry],
        manifests: Mapping[str, Manifest],
    ) -> bool:
        """Send the frames of the listed manifests once more; False where some cannot be cut again from what is here."""
        for entry in listed:
            manifest = manifests[entry.digest]
            paths = {each.path for each in manifest.entries}
            here = [item for item in found if item.path in paths]
            written = self._write(base, here, index_prefix=b"", existing=self.sent)
            self.local.index.update(written.seen())
            self.sent |= written.placed
            if all(frame.digest in self.sent for frame in manifest.frames):
                self.mended[entry.digest] = manifest
        return all(entry.digest in self.mended for entry in listed)

    def _write(self, base: bytes, found: Sequence[Found], **options: Any) -> Written:
        """`write` with what is the same for all that this push sends."""
        return write(
            base,
            found,
            self.uploader,
            index=self.local.index,
            progress=self.progress,
            level=self.level,
            threads=self.threads,
            taken=self.taken,
            **options,
        )

    def _folded(self, listed: Sequence[TagEntry], manifest: Manifest) -> list[_Part]:
        """The part that replaces `listed`, unless the store does not tell where all of its frames lie."""
        known = self.existing.frames()
        if any(frame.digest not in known for frame in manifest.frames):
            return []
        return [self._part("shared", manifest, known)._replace(absorbed=tuple(listed))]

    def publish(self, parts: Sequence[_Part], *, partial: bool) -> None:
        """Write placements, manifests, the snapshot and the tag's entries, in this order; record the state."""
        entries: list[TagEntry] = []
        for digest, manifest in self.mended.items():
            tags.put_placement(self.store, placement_of(digest, manifest.frames, self.sent))
        if parts:
            moment = 0
            parts = [self._clear(part) for part in parts]
            for part in parts:
                placement = placement_of(part.digest, part.manifest.frames, part.placed)
                moment = max(moment, tags.put_placement(self.store, placement))
            for part in parts:
                self._put_manifest(part)
                with unless_full(self._tell_full) if part.part == "shared" else nullcontext():
                    self.local.keep(part.encoded)
            stamp = tags.stamp_after(moment, min((entry.stamp for entry in self.mine), default=""))
            entries = [
                tags.new_entry(
                    self.tag,
                    part.part,
                    part.digest,
                    stamp,
                    fingerprint=part.manifest.fingerprint,
                    kind="fold" if part.absorbed else "put",
                )
                for part in parts
            ]
        absorbed = {entry for part in parts for entry in part.absorbed}
        together = sorted({*entries, *self.mine} - absorbed)
        state = _state_after(self.root.state(), [*parts, *self.known])
        snapshot = tags.snapshot_of(newest_packages(together, state.fingerprint), shared_of(together))
        if parts or self.mended:
            self.store.put(f"snapshots/{snapshot.id}", snapshot.encode())
        if parts:
            condemned.require_time(self.started, "push")
        for part, entry in zip(parts, entries):
            facts = EntryFacts(
                snapshot=snapshot.id,
                files=part.files,
                bytes=part.bytes,
                soabi=part.manifest.soabi,
                platform=part.manifest.platform,
                partial=partial,
                absorbs=tuple(gone.key for gone in part.absorbed),
                replaced=len(self.history) if part.absorbed else 0,
                history=tags.history(self.history) if part.absorbed else "",
            )
            self.store.put(entry.key, msgspec.json.encode(facts))
        if parts:
            self._name_what_others_added(together, state.fingerprint)
        named = snapshot.id if parts else self._named(snapshot.id)
        with unless_full(self._tell_full):
            if self.seen is not None:
                self.local.index.replace(PACKAGES, self.seen())
            else:
                self.local.index.save()
            with self.root.recording() as record:
                # A pull may have ended since this push began: what it recorded stays.
                present = self.root.state()
                state = _state_after(present, [*parts, *self.known])
                if present == self.state and named:
                    state = msgspec.structs.replace(state, snapshot=named)
                if self.synced is not None and self.synced == self.local.synced():
                    shared = [(entry.stamp, entry.digest) for entry in shared_of(together)]
                    held = tuple(each for each in shared if each[1] in state.shared)
                    self.local.record_synced(Synced(self.source, held))
                record(state)
        self.result.snapshot = named
        self.result.pushed = [part.part for part in parts if not part.absorbed]

    def _named(self, snapshot: str) -> str:
        """The id of what a root holds of which nothing was pushed: `snapshot`, which is the tag's as it is now, or else
        what the root is recorded to hold, whichever the store has. Not every state of a tag was given an id."""
        if self.empty:
            return ""
        if snapshot == self.state.snapshot:  # the store had it when that was recorded
            return snapshot
        for known in (snapshot, self.state.snapshot):
            if known and self.store.has(f"snapshots/{known}"):
                return known
        return ""

    def _tell_full(self) -> None:
        self.warn(f"{self.root.path} is full, so the next push reads again what this one saved")

    def _name_what_others_added(self, together: Sequence[TagEntry], fingerprint: str) -> None:
        """Give what the tag holds now a snapshot to be named by, if others pushed meanwhile: the last one to look
        sees them all."""
        listed = tags.read_tag(self.store, self.tag)
        if set(listed) != set(together):
            snapshot = tags.snapshot_of(newest_packages(listed, fingerprint), shared_of(listed))
            self.store.put(f"snapshots/{snapshot.id}", snapshot.encode())

    def _clear(self, part: _Part) -> _Part:
        """The part, with other names for what of it is condemned."""
        one = condemned.Taggable(part.encoded, part.manifest, part.placed)
        return part._replace(**condemned.clear(self.store, self.condemned, one)._asdict())

    @staticmethod
    def _part(
        part: tags.Part, manifest: Manifest, placed: Mapping[bytes, Placed], entries: Listing | None = None
    ) -> _Part:
        counted = entries or manifest
        encoded = documents.encode(manifest, entries)
        return _Part(part, encoded, manifest, placed, counted.files, counted.bytes)

    def _put_manifest(self, part: _Part) -> None:
        if self.repair:
            self.store.put(f"manifests/{part.digest}", part.encoded.whole)
        else:
            base = (
                tags.base_for(self.store, part.before, self.local.encoded, self.condemned)
                if part.before
                else None
            )
            tags.put_manifest(self.store, part.encoded, base, self.condemned)

    def _count(self, part: _Part) -> None:
        self.result.files += part.files
        self.result.bytes += part.bytes

    def _announce(self, stage: str, found: Sequence[Found]) -> None:
        self.progress.stage(stage, sum(item.signature.size for item in found if item.kind == "file"))

    def _tell(self, path: bytes, what: str) -> None:
        self.warn(f"{readable(path)} is {what}; it is not saved")


def push(
    root: Root,
    store: Store,
    tag: str,
    *,
    interpreter: Callable[[], Interpreter],
    progress: Progress,
    warn: Callable[[str], None],
    directories: Sequence[str] = PERSISTENT,
    exclude: Sequence[str] = (),
    level: int = frames.DEFAULT_LEVEL,
    threads: int | None = None,
    connections: int | None = None,
    deadline: float | None = None,
    repair: bool = False,
) -> PushResult:
    """Save `directories` of the root under `tag`. With `repair` everything is sent, also what the store seems to
    have: under the same names, so that corrupt or lost objects are there again.

    `interpreter` tells what made packages that no install recorded; `exclude` are patterns of shared files that
    are never saved; `level` and `threads` are those of `write`, `connections` that of the uploader. At `deadline`
    (time.monotonic) what is completely stored is tagged and the rest named in the result. Raises StorageError, and
    PackhorseError where `packages/` changes meanwhile or is only partly restored.
    """
    started = time.monotonic()
    lock = root.use_packages()
    try:
        if "packages" in directories and root.state().state == "partial":
            raise PackhorseError(
                f"The last pull into {root.path} was not finished.", "Run `packhorse pull` first."
            )
        run = _Push(
            root,
            store,
            tag,
            progress,
            warn,
            level=level,
            threads=threads,
            connections=connections,
            repair=repair,
        )
        parts: list[_Part] = []
        if "packages" in directories:
            parts += run.packages(interpreter)
        if any(name in directories for name in SHARED):
            parts += run.shared([name for name in SHARED if name in directories], exclude, deadline)
        run.uploader.finish()
        run.publish(parts, partial=deadline is not None and bool(run.result.unsaved))
    finally:
        os.close(lock)
    result = run.result
    result.transferred_bytes = run.uploader.bytes
    result.seconds = time.monotonic() - started
    result.peak_rss_bytes = peak()
    return result


def _with_used_frames(written: Written) -> tuple[tuple[documents.Frame, ...], tuple[Entry, ...]]:
    """Frames and entries without the frames that only left-out files used."""
    used: dict[int, int] = {}
    entries: list[Entry] = []
    for entry in written.entries():
        if isinstance(entry, File):
            pieces: list[int] = []
            for frame, offset, length in documents.triples(entry.pieces):
                pieces += (used.setdefault(frame, len(used)), offset, length)
            entries.append(msgspec.structs.replace(entry, pieces=tuple(pieces)))
        else:
            entries.append(entry)
    return tuple(written.frames[number] for number in used), tuple(entries)


def _state_after(state: State, parts: Sequence[_Part]) -> State:
    shared = [
        part.digest
        for part in parts
        if part.part == "shared" and {entry.digest for entry in part.absorbed} <= set(state.shared)
    ]
    state = msgspec.structs.replace(state, shared=tuple(dict.fromkeys((*state.shared, *shared))))
    for part in parts:
        if part.part == "packages":
            state = msgspec.structs.replace(
                state,
                state=state.state if state.state == "partial" else "sparse" if state.gpus else "complete",
                manifest=part.digest,
                fingerprint=part.manifest.fingerprint,
                soabi=part.manifest.soabi,
                platform=part.manifest.platform,
            )
    return state
