"""What a root already holds: cached manifests, the index, and whether files are still those of a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE, IntegrityError, unless_full
from packhorse.root import Root
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.contents import content_of, content_on_disk, cut_alike
from packhorse.snapshot.frames import LARGE_FILE, digest_of
from packhorse.snapshot.holes import cold
from packhorse.snapshot.index import Index, now
from packhorse.snapshot.manifest import Directory, Encoded, File, Frame, Manifest, Symlink
from packhorse.snapshot.scan import Found, look, scan
from packhorse.store import tags
from packhorse.store.objects import Store

PACKAGES = b"packages/"


class Synced(msgspec.Struct, frozen=True):
    """What the shared directories were last brought together with."""

    source: str = ""
    """The store and the tag; no tag for a snapshot named by its id."""
    manifests: tuple[tuple[str, str], ...] = ()
    """(stamp, digest) of the shared manifests whose union they held."""


class Local:
    """The root's copy of what it shares with a store."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.base = os.fsencode(root.path)
        self._manifests = root.private / "manifests"
        self._synced = root.private / "synced"

    # --- documents ---

    def cached(self, digest: str, kind: documents.Kind) -> Manifest | None:
        """A manifest from the root's own copies."""
        try:
            known = self.encoded(digest)
            return documents.decode_manifest(known, kind) if known else None
        except IntegrityError:
            return None

    def encoded(self, digest: str) -> Encoded | None:
        """The bytes of a manifest from the root's own copies."""
        try:
            raw = (self._manifests / digest).read_bytes()
        except FileNotFoundError:
            return None
        return Encoded(digest, raw) if digest_of(raw).hex() == digest else None

    def manifest(self, store: Store, digest: str, kind: documents.Kind) -> Manifest:
        """A manifest, from the root's own copies or from the store. Raises IntegrityError, StorageError."""
        # Nothing but time hangs on the copy of a shared one; that of the packages tells what is a hole.
        return documents.decode_manifest(self.bytes_of(store, digest, keep=kind == "packages"), kind)

    def bytes_of(self, store: Store, digest: str, *, keep: bool = True) -> Encoded:
        """The bytes of a manifest, likewise. `keep`: a full disk is an error, not a reason to do without a copy."""
        known = self.encoded(digest)
        if known is None:
            known = tags.get_manifest(store, digest, self.encoded)
            with nullcontext() if keep else unless_full():
                self.keep(known)
        return known

    def keep(self, manifest: Encoded) -> None:
        """Keep a copy of a manifest."""
        self._manifests.mkdir(mode=0o700, exist_ok=True)
        atomic.write_file(self._manifests / manifest.digest, manifest.raw)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Forget the copies of all manifests but these."""
        wanted = set(digests)
        if self._manifests.is_dir():
            for name in set(os.listdir(self._manifests)) - wanted:
                if not name.startswith("."):  # which a push beside this is writing
                    (self._manifests / name).unlink(missing_ok=True)

    def synced(self) -> Synced:
        """What the shared directories were last brought together with."""
        try:
            return msgspec.json.decode(self._synced.read_bytes(), type=Synced)
        except (FileNotFoundError, *UNREADABLE):
            return Synced()

    def record_synced(self, synced: Synced) -> None:
        """Replace that."""
        atomic.write_file(self._synced, msgspec.json.encode(synced))

    # --- files ---

    def packages(self) -> list[Found]:
        """What lies in `packages/`."""
        return scan(os.fsencode(self.root.packages))

    @cached_property
    def index(self) -> Index:
        """The local index. Deleting the attribute frees its memory; it is read again when it is used again."""
        # Without the state nobody knows what is a hole: a crash of the machine may have taken it.
        return Index(self.root.index, trusted=bool(self.root.state().boot))

    @cached_property
    def holes(self) -> frozenset[bytes]:
        """The digests of the frames that `packages/` may lack, as its state says."""
        state = self.root.state()
        manifest = self.cached(state.manifest, "packages") if state.gpus and state.manifest else None
        if manifest is None:
            return frozenset()
        return frozenset(manifest.frames[number].digest for number in cold(manifest, state.gpus))

    def content(
        self,
        item: Found,
        prefix: bytes = b"",
        *,
        expected: bytes = b"",
        like: File | None = None,
        holes: Mapping[int, bytes] | None = None,
        until: float | None = None,
    ) -> bytes | None:
        """What a scanned path below `prefix` contains, as the index keeps it: see `snapshot.index.Content`.

        A file that the index does not vouch for (after a crash, or just written) is read. So is a large one that may be
        the file `like` with the content `expected`, where the index knows it by another cut; `holes` are frames of it
        (number → digest) that are taken for granted. None for what cannot be read, or changes meanwhile.
        """
        path = prefix + item.path
        try:
            if item.kind == "directory":
                return b""
            if item.kind == "symlink":
                return os.readlink(os.path.join(self.base, path))
            if item.kind == "special":
                return None
            known = self.index.digests(path, item.signature)
            if like is not None and (like.size < LARGE_FILE or like.size != item.signature.size):
                like = None
            if known is None or (like is not None and not cut_alike(known, expected)):
                read = content_on_disk(os.path.join(self.base, path), item.signature.size, like, holes, until)
                after = look(self.base, path)
                if after is None or after.signature != item.signature:
                    return None
                return read if known is None or read == expected else known
            return known
        except OSError:
            return None

    def holds(self, item: Found, entry: File, frames: Sequence[Frame]) -> bool:
        """Whether a scanned file of `packages/` is the manifest's: by stat, and by content."""
        signature = item.signature
        same = item.kind == "file" and item.mode == entry.mode and signature.size == entry.size
        if not same or signature.mtime != entry.mtime:
            return False
        path, expected = PACKAGES + item.path, content_of(entry, frames)
        if self.index.digests(path, item.signature) == expected:
            return True
        seen = now()
        holes = None
        if self.holes:
            numbers = set(entry.pieces[::3])
            holes = {each: frames[each].digest for each in numbers if frames[each].digest in self.holes}
        content = self.content(item, PACKAGES, expected=expected, like=entry, holes=holes)
        if content is None or content != expected:
            return False
        self.index.add(path, item.signature, (content, item.mode), seen=seen)
        return True

    def whole(self) -> bool:
        """Whether `packages/` has all files of the manifest that the state names, with their bytes; there may be more.
        What the index does not vouch for is read."""
        digest = self.root.state().manifest
        manifest = self.cached(digest, "packages") if digest else None
        if manifest is None:
            return False
        found = {item.path: item for item in self.packages()}
        for entry in manifest.entries:
            if isinstance(entry, File):
                item = found.get(entry.path)
                if item is None or not self.holds(item, entry, manifest.frames):
                    return False
        self.index.save()
        return True

    def equals(self, found: Sequence[Found], manifest: Manifest) -> bool:
        """Whether the scanned `packages/` is, by stat and index, what the manifest says."""
        if len(found) != len(manifest.entries):
            return False
        inodes: dict[bytes, tuple[int, int]] = {}
        for item, entry in zip(found, manifest.entries):
            if item.path != entry.path:
                return False
            if isinstance(entry, File):
                if item.links > 1:
                    inodes[entry.path] = item.signature.identity
                same = self.holds(item, entry, manifest.frames)
            elif isinstance(entry, Symlink):
                same = item.kind == "symlink" and self.content(item, PACKAGES) == entry.target
            elif isinstance(entry, Directory):
                same = item.kind == "directory" and item.mode == entry.mode
            else:
                same = item.kind == "file" and inodes.get(entry.target) == item.signature.identity
            if not same:
                return False
        return True


def source_of(store: Store, tag: str) -> str:
    """How `Synced` names a tag of a store."""
    return f"{store.url} {tag}"
