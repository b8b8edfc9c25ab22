"""Pull: a snapshot of the store becomes the persistent directories of a root.

Promises that `packages/` is exchanged whole or left alone, that shared files arrive one by one and whole, never
over one that changed here, and that a killed pull goes on where it was.
"""

from __future__ import annotations

import contextlib
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from packhorse import atomic
from packhorse.errors import NoSuchSnapshotError, PackhorseError
from packhorse.install.interpreter import Interpreter
from packhorse.progress import Progress
from packhorse.root import Root, State
from packhorse.snapshot.manifest import Directory, File, Manifest, Symlink
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.scan import signature_of
from packhorse.snapshot.writer import content_of, content_on_disk, placed_by
from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.store.tags import SnapshotFacts
from packhorse.transfer.fetch import THREADS, Job, fetch
from packhorse.transfer.local import PACKAGES, Local
from packhorse.transfer.union import Winner, union

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
            f"The tag {tag} has {len(packages)} snapshots, but none made of these requirements for Python "
            f"{worker.version} on {worker.platform}.",
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
    warn: Callable[[str], None],
    waiting: Callable[[str], None],
    threads: int = THREADS,
) -> PullResult:
    """Make the root hold `target`.

    Raises IntegrityError, NoSpaceError (before anything is written), StorageError, and PackhorseError where the
    packages are for another Python or platform, or are in use by a running command.
    """
    started = time.monotonic()
    with root.writing(waiting):
        restore = _Restore(root, store, target, interpreter, progress, warn)
        result = restore.run(threads)
    result.seconds = time.monotonic() - started
    result.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


class _Shared(NamedTuple):
    """A shared manifest of which some paths are wanted."""

    digest: str
    tree: Tree


class _Restore:
    """One pull on its way; the root is held against other writers."""

    def __init__(
        self,
        root: Root,
        store: Store,
        target: Target,
        interpreter: Callable[[], Interpreter],
        progress: Progress,
        warn: Callable[[str], None],
    ) -> None:
        self.root, self.store, self.snapshot = root, store, target.snapshot
        self.interpreter, self.progress, self.warn = interpreter, progress, warn
        self.local = Local(root)
        self.state = root.state()
        self.result = PullResult(snapshot=target.snapshot.id, tag=target.tag)
        self.winners: dict[bytes, Winner] = {}

    def run(self, threads: int) -> PullResult:
        packages = self._plan_packages()
        shared = self._plan_shared()
        if packages is None and not shared:
            self._record()
            return self.result
        if packages is not None:
            with self.root.packages_unused() as free:
                if not free:
                    raise _in_use(self.root)
        trees = [*([packages] if packages else []), *(item.tree for item in shared)]
        self.root.require_space(sum(tree.new_bytes for tree in trees) + MARGIN, "the snapshot")
        self.root.record(msgspec.structs.replace(self.state, state="partial"))
        try:
            self._bring(packages, shared, threads)
            if packages is not None:
                self._exchange(packages)
        except BaseException:
            # Nothing of it was published: what was there before is as whole as it was.
            self.root.record(self.state)
            raise
        if packages is not None:
            self.root.remove_retired()
            self._remember_packages(packages)
        for item in shared:
            self._publish(item)
        self._record()
        atomic.remove_tree(self.root.staging)
        return self.result

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

    def _plan_shared(self) -> list[_Shared]:
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
        wanted: dict[str, set[bytes]] = {}
        for path, winner in winners.items():
            if self._wanted(path, winner):
                wanted.setdefault(winner.digest, set()).add(path)
        return [
            _Shared(digest, Tree(self.root.staging / digest[:16], manifest, digest, wanted=wanted[digest]))
            for digest, manifest in {digest: manifest for _, digest, manifest in manifests}.items()
            if digest in wanted
        ]

    def _wanted(self, path: bytes, winner: Winner) -> bool:
        """Whether the path is to be brought: it is missing, or older here and unchanged since it was brought."""
        here = os.path.join(os.fsencode(self.root.path), path)
        try:
            status = os.lstat(here)
        except (FileNotFoundError, NotADirectoryError):
            return True
        mode = status.st_mode
        if isinstance(winner.entry, Directory):
            if not stat.S_ISDIR(mode):
                self._keep(path)
            return False
        if isinstance(winner.entry, Symlink):
            if not stat.S_ISLNK(mode) or os.readlink(here) != winner.content:
                self._keep(path)
            return False
        if not stat.S_ISREG(mode):
            self._keep(path)
            return False
        signature = signature_of(status)
        known = self.local.index.digests(path, signature)
        content = known if known is not None else content_on_disk(here, signature.size)
        if content == winner.content:
            self.local.index.add(path, signature, content)
            return False
        if content == self.local.index.known(
            path
        ):  # as it was last restored or saved: older, not changed here
            return True
        self._keep(path)
        return False

    def _keep(self, path: bytes) -> None:
        self.result.kept.append(path.decode(errors="backslashreplace"))

    def _count(self, manifest: Manifest) -> None:
        self.result.files += manifest.files
        self.result.bytes += manifest.bytes

    # --- bringing ---

    def _bring(self, packages: Tree | None, shared: Sequence[_Shared], threads: int) -> None:
        jobs: list[Job] = []
        if packages is not None:
            jobs += self._jobs(packages, self.snapshot.packages)
            self.result.pulled.append("packages")
        for item in shared:
            jobs += self._jobs(item.tree, item.digest)
        if shared:
            self.result.pulled.append("shared")
        self.progress.stage("restoring", sum(job.frame.length for job in jobs))
        self.result.transferred_bytes = fetch(self.store, jobs, self.progress, threads=threads)
        if packages is not None:
            packages.finish()
        for item in shared:
            item.tree.finish(lambda target: os.path.join(os.fsencode(self.root.path), target))

    def _jobs(self, tree: Tree, digest: str) -> Iterator[Job]:
        placement = tags.get_placement(self.store, tree.manifest, digest)
        placed = placed_by(placement)
        for number in tree.prepare():
            frame = tree.manifest.frames[number]
            yield Job(tree, number, frame, placed[frame.digest])

    # --- publishing ---

    def _publish(self, item: _Shared) -> None:
        """Move what is wanted of a shared manifest to its place, each path by one rename."""
        base = os.fsencode(self.root.path)
        seen = time.time_ns()
        for entry in item.tree.entries:
            place = os.path.join(base, entry.path)
            if not self._own_parents(entry.path):
                self._keep(entry.path)
            elif isinstance(entry, Directory):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(place, 0o700)
                    os.chmod(place, entry.mode)
            elif self._wanted(entry.path, self.winners[entry.path]):  # it may have changed here meanwhile
                os.rename(item.tree.path(entry.path), place)
                if isinstance(entry, File):
                    signature = signature_of(os.lstat(place))
                    self.local.index.add(
                        entry.path, signature, content_of(entry, item.tree.manifest.frames), seen=seen
                    )
        for entry in reversed(item.tree.entries):
            if isinstance(entry, Directory):
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    os.utime(
                        os.path.join(base, entry.path), ns=(entry.mtime, entry.mtime), follow_symlinks=False
                    )

    def _own_parents(self, path: bytes) -> bool:
        """Whether the parents of a shared path are directories, not symbolic links that lead elsewhere."""
        parent = path.rpartition(b"/")[0]
        while parent:
            try:
                if not stat.S_ISDIR(os.lstat(os.path.join(os.fsencode(self.root.path), parent)).st_mode):
                    return False
            except FileNotFoundError:
                os.makedirs(os.path.join(os.fsencode(self.root.path), parent), 0o700)
            parent = parent.rpartition(b"/")[0]
        return True

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
        base, seen = os.fsencode(self.root.packages), time.time_ns()
        index, manifest = self.local.index, tree.manifest
        for entry in tree.entries:
            if isinstance(entry, File):
                kept = entry.path in tree.kept
                place = os.path.join(base, entry.path)
                signature = signature_of(os.lstat(place)) if kept else tree.signatures[entry.path]
                index.add(PACKAGES + entry.path, signature, content_of(entry, manifest.frames), seen=seen)
        index.keep_only(PACKAGES, {PACKAGES + entry.path for entry in manifest.entries})
        index.save()

    def _record(self) -> None:
        shared = tuple(digest for _, digest in self.snapshot.shared)
        self.local.index.save()
        self.local.keep_only([self.snapshot.packages or self.state.manifest, *shared])
        self.root.record(
            msgspec.structs.replace(
                self.state, state="complete", snapshot=self.result.snapshot, shared=shared
            )
        )


def _in_use(root: Root) -> PackhorseError:
    return PackhorseError(
        f"The packages of {root.path} are in use by a running command.",
        "Stop it, or pull into another root; what was fetched is kept for the next pull.",
    )
