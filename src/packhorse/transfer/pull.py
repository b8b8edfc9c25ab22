"""Pull: a snapshot of the store becomes the persistent directories of a root.

Promises that `packages/` is exchanged whole or left alone, that shared files arrive one by one and whole, never
over one that changed here, and that a killed pull goes on where it was.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from packhorse import atomic
from packhorse.errors import NoSuchSnapshotError, PackhorseError
from packhorse.install.interpreter import Interpreter
from packhorse.progress import Progress
from packhorse.root import Root, State
from packhorse.snapshot.manifest import PERMISSIONS, Directory, File, Hardlink, Manifest
from packhorse.snapshot.reader import Tree, own_bytes
from packhorse.snapshot.scan import Found, look, readable, signature_of
from packhorse.snapshot.writer import content_of, placed_by
from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.store.tags import SnapshotFacts
from packhorse.transfer.fetch import Job, fetch
from packhorse.transfer.local import PACKAGES, Local, Synced, source_of
from packhorse.transfer.merge import Plan, Standing, plan, standing
from packhorse.transfer.union import Winner, union
from packhorse.watch.memory import peak

MARGIN = 64 << 20
"""Bytes of the root's disk that a pull leaves free beside what it writes."""


class Target(NamedTuple):
    """What is to be restored."""

    snapshot: SnapshotFacts
    tag: str
    time: float
    """When its newest entry was written (seconds since the epoch); 0 for a snapshot named by its id."""


class PullResult(msgspec.Struct):
    """What a pull did. `files` and `bytes` count what the snapshot holds, sizes are bytes."""

    snapshot: str
    tag: str
    files: int = 0
    bytes: int = 0
    transferred_bytes: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    pulled: list[str] = []
    """`packages` and `shared`, as far as they had to be brought."""
    kept: list[str] = []
    """Paths that changed here and were left alone."""


def find(
    store: Store, tag: str, interpreter: Callable[[], Interpreter], fingerprint: str, snapshot: str = ""
) -> Target:
    """What a pull of `tag` (or of `snapshot`, by id) restores for this worker.

    With a `fingerprint` the newest packages made of the same requirements, Python and platform; without one the
    newest that any worker pushed. Raises NoSuchSnapshotError (3) with the reason.
    """
    if snapshot:
        return Target(tags.read_snapshot(store, snapshot), "", 0.0)
    entries = tags.read_tag(store, tag)
    if not entries:
        raise NoSuchSnapshotError(
            f"The tag {tag} has no snapshot in {store.url}.",
            "`packhorse install` and `packhorse push` make one.",
        )
    packages = [entry for entry in entries if entry.part == "packages"]
    own = [entry for entry in packages if entry.fingerprint == fingerprint] if fingerprint else packages
    if packages and not own:
        worker = interpreter()
        raise NoSuchSnapshotError(
            f"The tag {tag} has no snapshot made of these requirements for Python {worker.version} on "
            f"{worker.platform}; of others it has {len(packages)}.",
            "`packhorse install` and `packhorse push` make one.",
        )
    shared = [entry for entry in entries if entry.part == "shared"]
    return Target(tags.snapshot_of(own[0] if own else None, shared), tag, entries[0].time)


def pull(
    root: Root,
    store: Store,
    target: Target,
    *,
    interpreter: Callable[[], Interpreter],
    progress: Progress,
    waiting: Callable[[str], None],
    connections: int | None = None,
    threads: int | None = None,
) -> PullResult:
    """Make the root hold `target`.

    Raises IntegrityError, NoSpaceError (before anything is written), StorageError, and PackhorseError where the
    packages are for another Python or platform, or are in use by a running command. `connections` and `threads` are those
    of `fetch`.
    """
    started = time.monotonic()
    with root.writing(waiting):
        restore = _Restore(root, store, target, interpreter, progress)
        result = restore.run(connections, threads)
    result.seconds = time.monotonic() - started
    result.peak_rss_bytes = peak()
    return result


class _Restore:
    """One pull on its way; the root is held against other writers."""

    def __init__(
        self,
        root: Root,
        store: Store,
        target: Target,
        interpreter: Callable[[], Interpreter],
        progress: Progress,
    ) -> None:
        self.root, self.store, self.snapshot = root, store, target.snapshot
        self.interpreter, self.progress = interpreter, progress
        self.local = Local(root)
        self.state = root.state()
        self.result = PullResult(snapshot=target.snapshot.id, tag=target.tag)
        self.winners: dict[bytes, Winner] = {}
        self.plan = Plan({}, set(), [])

    def run(self, connections: int | None, threads: int | None) -> PullResult:
        packages = self._plan_packages()
        shared = self._plan_shared()
        trees = [*([packages] if packages else []), *shared.values()]
        if packages is None and not self.plan.wanted:
            self._record()
            return self.result
        if packages is not None:
            with self.root.packages_unused() as free:
                if not free:
                    raise _in_use(self.root)
        self._require_space(trees)
        self.root.record(msgspec.structs.replace(self.state, state="partial"))
        try:
            self._bring(packages, shared, connections, threads)
            if packages is not None:
                self._exchange(packages)
        except BaseException:
            # Nothing of it was published: what was there before is as whole as it was.
            self.root.record(self.state)
            raise
        if packages is not None:
            self.root.remove_retired()
            self._remember_packages(packages)
        _Publication(self.local, self.winners, shared, self.plan, self._keep).publish()
        self._record()
        return self.result

    def _require_space(self, trees: Sequence[Tree]) -> None:
        """Raise NoSpaceError where the trees find no place; what a killed pull staged of them counts as there."""
        staging = self.root.staging
        staged = {name for tree in trees for name in tree.names}
        for name in os.listdir(staging) if staging.is_dir() else ():
            if name not in staged:
                atomic.remove_tree(staging / name)
        needed = sum(tree.new_bytes for tree in trees) - own_bytes(staging)
        self.root.require_space(max(needed, 0) + MARGIN, "the snapshot")

    # --- planning ---

    def _plan_packages(self) -> Tree | None:
        digest = self.snapshot.packages
        if not digest:
            return None
        manifest = self.local.manifest(self.store, digest, "packages")
        self._refuse_foreign(manifest)
        self._count(manifest)
        found = self.local.packages()
        if self.state.manifest == digest and self.local.equals(found, manifest):
            return None
        here = {item.path: item for item in found if item.kind == "file"}
        base = os.fsencode(self.root.packages)
        kept = {}
        for entry in manifest.entries:
            item = here.get(entry.path)
            if (
                isinstance(entry, File)
                and item is not None
                and self.local.holds(item, entry, manifest.frames)
            ):
                kept[entry.path] = os.path.join(base, entry.path)
        return Tree(self.root.staging / "packages", manifest, digest, kept=kept)

    def _refuse_foreign(self, manifest: Manifest) -> None:
        worker = self.interpreter()
        if manifest.soabi and (manifest.soabi, manifest.platform) != (worker.soabi, worker.platform):
            raise PackhorseError(
                f"The snapshot was made for {manifest.soabi} on {manifest.platform}, this worker's Python is "
                f"{worker.soabi} on {worker.platform}.",
                "Use the Python it was made for (environment.python), or install and push with this one.",
            )

    def _plan_shared(self) -> dict[str, Tree]:
        """What has to be brought of the shared manifests, by their digests."""
        manifests = [
            (stamp, digest, self.local.manifest(self.store, digest, "shared"))
            for stamp, digest in self.snapshot.shared
        ]
        winners = self.winners = union(manifests)
        for winner in winners.values():
            if not isinstance(winner.entry, Directory):
                self.result.files += 1
            if isinstance(winner.entry, File):
                self.result.bytes += winner.entry.size
        self.plan = plan(self.local, winners)
        for path in self.plan.kept:
            self._keep(path)
        wanted: dict[str, set[bytes]] = {}
        for path, stands in self.plan.wanted.items():
            if not (
                stands is Standing.OLDER_MODE
                or isinstance(winners[path].entry, Directory)
                or _target_here(path, winners, self.plan)
            ):
                wanted.setdefault(winners[path].digest, set()).add(path)
        return {
            digest: Tree(self.root.staging / digest[:16], manifest, digest, wanted=wanted[digest])
            for digest, manifest in {digest: manifest for _, digest, manifest in manifests}.items()
            if digest in wanted
        }

    def _keep(self, path: bytes) -> None:
        name = readable(path)
        if name not in self.result.kept:
            self.result.kept.append(name)

    def _count(self, manifest: Manifest) -> None:
        self.result.files += manifest.files
        self.result.bytes += manifest.bytes

    # --- bringing ---

    def _bring(
        self,
        packages: Tree | None,
        shared: Mapping[str, Tree],
        connections: int | None,
        threads: int | None,
    ) -> None:
        jobs: list[Job] = []
        if packages is not None:
            jobs += self._jobs(packages, self.snapshot.packages)
            self.result.pulled.append("packages")
        for digest, tree in shared.items():
            jobs += self._jobs(tree, digest)
        if self.plan.wanted:
            self.result.pulled.append("shared")
        self.progress.stage("restoring", sum(job.frame.length for job in jobs))
        self.result.transferred_bytes = fetch(
            self.store, jobs, self.progress, connections=connections, threads=threads
        )
        for tree in (*([packages] if packages else []), *shared.values()):
            tree.finish()

    def _jobs(self, tree: Tree, digest: str) -> Iterator[Job]:
        placement = tags.get_placement(self.store, tree.manifest, digest)
        placed = placed_by(placement)
        for number in tree.prepare():
            frame = tree.manifest.frames[number]
            yield Job(tree, number, frame, placed[frame.digest])

    # --- publishing ---

    def _exchange(self, tree: Tree) -> None:
        with self.root.packages_unused() as free:
            if not free:
                raise _in_use(self.root)
            self.root.exchange_packages(self.root.staging / "packages")
            self.state = State(
                state="partial",
                fingerprint=tree.manifest.fingerprint,
                soabi=tree.manifest.soabi,
                platform=tree.manifest.platform,
                manifest=self.snapshot.packages,
                shared=self.state.shared,
            )
            self.root.record(self.state)

    def _remember_packages(self, tree: Tree) -> None:
        """Bring the index up to date: the links of the retired generation are gone, which changed the ctime
        of what was kept of it."""
        base, index = os.fsencode(self.root.packages), self.local.index
        for entry in tree.entries:
            if isinstance(entry, File):
                signature = tree.signatures.get(entry.path)
                if signature is None:
                    signature = signature_of(os.lstat(os.path.join(base, entry.path)))
                if (signature.size, signature.mtime) == (entry.size, entry.mtime):
                    content = content_of(entry, tree.manifest.frames)
                    index.restored(PACKAGES + entry.path, signature, (content, entry.mode))
        index.keep_only(PACKAGES, {PACKAGES + entry.path for entry in tree.entries})
        index.save()

    def _record(self) -> None:
        shared = tuple(digest for _, digest in self.snapshot.shared)
        self.local.index.save()
        self.local.record_synced(Synced(source_of(self.store, self.result.tag), tuple(self.snapshot.shared)))
        self.local.keep_only([self.snapshot.packages or self.state.manifest, *shared])
        self.root.record(
            msgspec.structs.replace(
                self.state, state="complete", snapshot=self.result.snapshot, shared=shared
            )
        )
        atomic.remove_tree(self.root.staging)


class _Publication:
    """What was brought for the shared directories goes to its place, each path by one rename."""

    def __init__(
        self,
        local: Local,
        winners: Mapping[bytes, Winner],
        trees: Mapping[str, Tree],
        plan: Plan,
        keep: Callable[[bytes], None],
    ) -> None:
        self.local, self.winners, self.trees, self.plan, self.keep = local, winners, trees, plan, keep
        self.opened: dict[bytes, int] = {}
        """Directories that had to be made writable for a moment, and their mode bits."""

    def publish(self) -> None:
        """Bring the wanted paths, parents first, unless they changed here meanwhile."""
        index, wanted = self.local.index, self.plan.wanted
        for path in wanted:
            index.coming(path, self._content(path))
        index.save()  # a pull killed from here on leaves nothing that looks changed here
        brought: dict[bytes, tuple[int, int]] = {}
        made: list[Directory] = []
        for path in wanted:
            entry = self.winners[path].entry
            item = look(self.local.base, path)
            stands = None if item is None else standing(self.local, item, self.winners[path])
            if stands is Standing.CHANGED or not self._own_parents(path):
                self.keep(path)
            elif isinstance(entry, Directory):
                if item is None or item.kind != "directory":
                    self._writable(path, partial(self._make_directory, path, item))
                    made.append(entry)
                elif stands is not Standing.SAME:
                    os.chmod(self._at(path), entry.mode)
                    index.add(path, item.signature, self._content(path), seen=0)
            elif stands is Standing.OLDER_MODE:
                os.chmod(self._at(path), self.winners[path].mode)
                brought[path] = _size_and_time(self._at(path))
            elif stands is not Standing.SAME:
                staged = self._staged(path)
                if staged is None:
                    self.keep(path)
                    continue
                brought[path] = _size_and_time(staged)
                self._writable(path, partial(self._put, path, staged, item))
        for path, mode in self.opened.items():
            os.chmod(self._at(path), mode)
        for entry in reversed(made):
            os.chmod(self._at(entry.path), entry.mode)
            os.utime(self._at(entry.path), ns=(entry.mtime, entry.mtime))
            index.add(entry.path, signature_of(os.lstat(self._at(entry.path))), (b"", entry.mode), seen=0)
        for path, expected in brought.items():  # last: links and renames of other names change the ctime
            signature = signature_of(os.lstat(self._at(path)))
            if (signature.size, signature.mtime) == expected:
                index.restored(path, signature, self._content(path))

    def _content(self, path: bytes) -> tuple[bytes, int]:
        return self.winners[path].content, self.winners[path].mode

    def _at(self, path: bytes) -> bytes:
        return os.path.join(self.local.base, path)

    def _staged(self, path: bytes) -> bytes | None:
        """Where the new content of `path` lies; None where the file that it is a name of changed meanwhile."""
        target = _target_here(path, self.winners, self.plan)
        if target is None:
            return self.trees[self.winners[path].digest].path(path)
        item = look(self.local.base, target)
        if item is None or standing(self.local, item, self.winners[target]) is not Standing.SAME:
            return None
        self.local.root.staging.mkdir(exist_ok=True)
        staged = os.fsencode(self.local.root.staging / "link")
        os.link(self._at(target), staged, follow_symlinks=False)
        return staged

    def _make_directory(self, path: bytes, before: Found | None) -> None:
        if before is not None:
            os.unlink(self._at(path))
        os.mkdir(self._at(path), 0o700)

    def _put(self, path: bytes, staged: bytes, before: Found | None) -> None:
        if before is not None and before.kind == "directory":
            atomic.remove_tree(Path(os.fsdecode(self._at(path))))
        os.rename(staged, self._at(path))

    def _writable(self, path: bytes, action: Callable[[], None]) -> None:
        """Do `action` in the directory of `path`, which may be one that its owner must not write to."""
        try:
            action()
        except PermissionError:
            parent = path.rpartition(b"/")[0]
            self.opened.setdefault(parent, os.stat(self._at(parent)).st_mode & PERMISSIONS)
            os.chmod(self._at(parent), 0o700)
            action()

    def _own_parents(self, path: bytes) -> bool:
        """Whether the parents of a path are directories, not symbolic links that lead elsewhere."""
        parent = path.rpartition(b"/")[0]
        while parent:
            item = look(self.local.base, parent)
            if item is None or item.kind != "directory":
                return False
            parent = parent.rpartition(b"/")[0]
        return True


def _target_here(path: bytes, winners: Mapping[bytes, Winner], plan: Plan) -> bytes | None:
    """The target of a hard link, if it is here as the link's own manifest has it."""
    entry = winners[path].entry
    if not isinstance(entry, Hardlink) or entry.target not in plan.same:
        return None
    return entry.target if winners[entry.target].digest == winners[path].digest else None


def _size_and_time(path: bytes) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_size, status.st_mtime_ns


def _in_use(root: Root) -> PackhorseError:
    return PackhorseError(
        f"The packages of {root.path} are in use by a running command.",
        "Stop it, or pull into another root; what was fetched is kept for the next pull.",
    )
