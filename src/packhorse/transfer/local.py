"""What a root already holds: cached manifests, the index, and whether files are still those of a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from packhorse import atomic
from packhorse.errors import IntegrityError
from packhorse.root import Root
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.index import Index
from packhorse.snapshot.manifest import Directory, File, Frame, Hardlink, Manifest, Symlink
from packhorse.snapshot.scan import Found, scan
from packhorse.snapshot.writer import content_of, content_on_disk
from packhorse.store import tags
from packhorse.store.objects import Store

PACKAGES = b"packages/"


class Local:
    """The root's copy of what it shares with a store."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.index = Index(root.private / "index")
        self._manifests = root.private / "manifests"

    def cached(self, digest: str, kind: documents.Kind) -> Manifest | None:
        """A manifest from the root's own copies."""
        try:
            return documents.decode_manifest((self._manifests / digest).read_bytes(), digest, kind)
        except (FileNotFoundError, IntegrityError):
            return None

    def manifest(self, store: Store, digest: str, kind: documents.Kind) -> Manifest:
        """A manifest, from the root's own copies or from the store. Raises IntegrityError, StorageError."""
        known = self.cached(digest, kind)
        if known is None:
            known = tags.get_manifest(store, digest, kind)
            self.keep(digest, documents.encode(known)[1])
        return known

    def keep(self, digest: str, stored: bytes) -> None:
        """Keep a copy of a manifest's object."""
        self._manifests.mkdir(mode=0o700, exist_ok=True)
        atomic.write_file(self._manifests / digest, stored)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Forget the copies of all manifests but these."""
        wanted = set(digests)
        if self._manifests.is_dir():
            for name in set(os.listdir(self._manifests)) - wanted:
                (self._manifests / name).unlink()

    def packages(self) -> list[Found]:
        """What lies in `packages/`."""
        return scan(os.fsencode(self.root.packages))

    def holds(self, item: Found, entry: File, frames: Sequence[Frame]) -> bool:
        """Whether a scanned file of `packages/` is the manifest's: by stat, and by content.

        What the index does not vouch for (after a crash, or just written) is read.
        """
        same = (item.mode, item.signature.mtime, item.signature.size) == (entry.mode, entry.mtime, entry.size)
        if item.kind != "file" or not same:
            return False
        path = PACKAGES + item.path
        known = self.index.digests(path, item.signature)
        if known is None:
            try:
                known = content_on_disk(os.path.join(os.fsencode(self.root.path), path), item.signature.size)
            except OSError:
                return False
            self.index.add(path, item.signature, known)
        return known == content_of(entry, frames)

    def equals(self, found: Sequence[Found], manifest: Manifest) -> bool:
        """Whether the scanned `packages/` is, by stat and index, what the manifest says."""
        if len(found) != len(manifest.entries):
            return False
        base = os.fsencode(self.root.packages)
        for item, entry in zip(found, manifest.entries):
            if item.path != entry.path:
                return False
            if isinstance(entry, File):
                same = self.holds(item, entry, manifest.frames)
            elif isinstance(entry, Symlink):
                same = item.kind == "symlink" and os.readlink(os.path.join(base, item.path)) == entry.target
            elif isinstance(entry, Directory):
                same = item.kind == "directory" and item.mode == entry.mode
            else:
                assert isinstance(entry, Hardlink)
                same = item.kind == "file" and item.links > 1
            if not same:
                return False
        return True
