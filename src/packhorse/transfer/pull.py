"""Pull: a snapshot of the store becomes the persistent directories of a root.

Promises that `packages/` is exchanged whole or left alone, that shared files arrive one by one and whole, never
over one that changed here, and that a killed pull goes on where it was. With an `Opening` a command may start before
everything is there: then the root's state says partial or sparse until it is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import Any, NamedTuple

import msgspec

from packhorse import atomic
from packhorse.errors import ConfigError, NoSuchSnapshotError, PackhorseError, is_full
from packhorse.install.interpreter import Interpreter
from packhorse.progress import Progress
from packhorse.root import Root, State
from packhorse.snapshot.contents import content_of
from packhorse.snapshot.index import Seen, known_at
from packhorse.snapshot.manifest import Directory, File, Manifest, decode_manifest, decode_placement
from packhorse.snapshot.order import UNCALLED
from packhorse.snapshot.reader import Tree, own_space
from packhorse.snapshot.scan import look, readable, signature_of
from packhorse.snapshot.writer import Placed, placed_by
from packhorse.store import condemned, tags
from packhorse.store.objects import Store, side_by_side
from packhorse.store.tags import SnapshotFacts
from packhorse.transfer import arriving
from packhorse.transfer.bringing import Bringing, Part
from packhorse.transfer.fetch import fetch
from packhorse.transfer.gpu_code import GpuCode
from packhorse.transfer.line import Job
from packhorse.transfer.local import PACKAGES, Local, Synced, source_of
from packhorse.transfer.merge import Plan, Standing, plan
from packhorse.transfer.opening import Opening, PullResult
from packhorse.transfer.publication import Publication, target_here
from packhorse.transfer.union import Winner, union
from packhorse.watch.memory import peak, uncollected

MARGIN = 64 << 20
"""Bytes of the root's disk that a pull leaves free beside what it writes."""


class Target(NamedTuple):
    """What is to be restored."""

    snapshot: SnapshotFacts
    tag: str
    time: float
    """When its newest entry was written (seconds since the epoch); 0 for a snapshot named by its id."""


def find(
    store: Store,
    tag: str,
    interpreter: Callable[[], Interpreter],
    fingerprint: Callable[[], str],
    snapshot: str = "",
) -> Target:
    """What a pull of `tag` (or of `snapshot`, by id) restores for this worker.

    With a `fingerprint` the newest packages made of the same requirements, Python and platform; with an empty one the
    newest that any worker pushed. Raises NoSuchSnapshotError (3) with the reason.
    """
    if snapshot:
        return Target(tags.read_snapshot(store, snapshot), "", 0.0)
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(fingerprint)  # may start the worker's Python
        entries = tags.read_tag(store, tag)
        wanted = asked.result()
    if not entries:
        raise NoSuchSnapshotError(
            f"The tag {tag} has no snapshot in {store.url}.",
            "`packhorse install` and `packhorse push` make one.",
        )
    packages = [entry for entry in entries if entry.part == "packages"]
    own = [entry for entry in packages if entry.fingerprint == wanted] if wanted else packages
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
    gpus: tuple[int, ...] = (),
    only: bool = False,
    opening: Opening | None = None,
) -> PullResult:
    """Make the root hold `target`.

    With `gpus` (compute capabilities) the code in `packages/` that none of them needs comes last, or with `only` not at
    all. Raises IntegrityError, NoSpaceError (before anything is written), StorageError, and PackhorseError where the
    packages are for another Python or platform, or are in use by a running command. `connections` and `threads` are
    those of `fetch`.
    """
    started, began = time.monotonic(), condemned.clock()
    with root.writing(waiting):
        arriving.remove(root)
        line = partial(fetch, store, progress=progress, connections=connections, threads=threads, began=began)
        restore = _Restore(root, store, target, interpreter, progress, line, gpus, only, opening)
        result = restore.run()
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
        line: Callable[..., int],
        gpus: tuple[int, ...],
        only: bool,
        opening: Opening | None,
    ) -> None:
        self.root, self.store, self.snapshot = root, store, target.snapshot
        self.interpreter, self.progress, self.line = interpreter, progress, line
        self.gpus, self.only, self.opening = gpus if only or opening else (), only, opening
        self.local = Local(root)
        self.state = root.state()
        self.result = PullResult(snapshot=target.snapshot.id, tag=target.tag)
        self.winners: dict[bytes, Winner] = {}
        self.plan = Plan({}, set(), [])
        self.code: GpuCode | None = None
        """Of the packages."""
        self._placement: Future[bytes] | None = None
        """Theirs, where it was asked for ahead."""
        self._brought: tuple[Tree | None, Publication] | None = None
        """What is there and not yet in the index."""
        self._settled = False

    def run(self) -> PullResult:
        with uncollected():
            packages = self._plan_packages()
            shared = self._plan_shared()
        if packages is None and not self.plan.wanted:
            self._fill_needed()
            self._start()
        else:
            self._restore(packages, shared)
        del packages, shared
        if self.code is not None and self.code.late and not self.only:
            try:
                self._fill_late(self.code)
            finally:
                self._settle()
            self._record()
            self._told()
        else:
            self._settle()
        return self.result

    def _restore(self, packages: Tree | None, shared: Mapping[str, Tree]) -> None:
        """Bring what is missing, but for what comes last."""
        trees = [*([packages] if packages else []), *shared.values()]
        if packages is not None:
            with self.root.packages_unused() as free:
                if not free:
                    raise _in_use(self.root)
        self._require_one_disk(packages)
        self._require_space(trees)
        self.root.record(msgspec.structs.replace(self.state, state="partial"))
        publication = Publication(self.local, self.winners, shared, self.plan, self._keep)
        bringing = Bringing(self.root, self._fetch, self.progress, self.opening, self._may_hold)
        try:
            with bringing.under_way(self._parts(packages, shared)):
                for tree in trees:
                    tree.finish()
                if packages is not None:
                    self._exchange(packages)
                if bringing.arriving is not None:
                    self.state = msgspec.structs.replace(self.state, state="partial")
                publication.publish()
                self._fill_needed()
                self._start()
                bringing.hurry.set()
                if packages is not None:
                    self.root.remove_retired()
        except BaseException as error:
            if is_full(error):
                # Of what was staged. Without that there is room to record, and to use, what was there before.
                atomic.remove_tree(self.root.staging)
            # Until the exchange, or the first shared file that is there without its bytes, what was there before is as
            # whole as it was.
            self.root.record(self.state)
            raise
        finally:
            bringing.close()
            for tree in trees:
                tree.close()
        self._brought = packages, publication

    def _settle(self) -> None:
        """Record what was brought, once, and free the memory of it: some 80 MB for 50,000 files."""
        if self._settled:
            return
        self._settled = True
        if self._brought is not None:
            packages, publication = self._brought
            self._brought = None
            if packages is not None:
                self.local.index.replace(PACKAGES, self._seen(packages))
            publication.remember()
            arriving.remove(self.root)
        self._record()
        if self.result.pulled:
            self._told()
        del self.local.index

    def _require_one_disk(self, packages: Tree | None) -> None:
        """Raise ConfigError where something would go to another disk than that of the root: all comes to its place by a
        rename."""
        disk = os.stat(self.root.path).st_dev
        tops = {path.partition(b"/")[0] for path in self.plan.wanted}
        for top in sorted(tops | ({b"packages"} if packages is not None else set())):
            found = look(self.local.base, top)
            if found is not None and found.kind == "directory" and found.signature.identity[0] != disk:
                raise ConfigError(
                    f"{self.root.path}/{readable(top)} lies on another disk than the root.",
                    "Mount that disk at the root itself, or name a root on it with --root.",
                )

    def _require_space(self, trees: Sequence[Tree]) -> None:
        """Raise NoSpaceError where the trees find no place; what a killed pull staged of them counts as there."""
        staging = self.root.staging
        staged = {name for tree in trees for name in tree.names}
        for name in os.listdir(staging) if staging.is_dir() else ():
            if name not in staged:
                atomic.remove_tree(staging / name)
        staged_space = own_space(staging)
        needed, inodes = -staged_space.bytes, -staged_space.inodes
        block = self.root.block
        for tree in trees:
            never = (
                self.code.cold
                if self.code is not None and self.only and tree.manifest is self.code.manifest
                else ()
            )
            space = tree.new_space(block, never)
            needed, inodes = needed + space.bytes, inodes + space.inodes
        self.root.require_space(max(needed, 0), "the snapshot needs", inodes, margin=MARGIN)

    # --- planning ---

    def _plan_packages(self) -> Tree | None:
        digest = self.snapshot.packages
        if not digest:
            return None
        with ThreadPoolExecutor(2) as beside:
            asked = beside.submit(self.interpreter)  # may start it
            encoded = self.local.encoded(digest)
            if encoded is None:  # so there is something to bring
                self._placement = beside.submit(tags.get_stored_placement, self.store, digest)
                encoded = self.local.bytes_of(self.store, digest)
            manifest = decode_manifest(encoded, "packages")
            _refuse_foreign(manifest, asked.result())
        del encoded  # 5 MB for 40,000 files
        self._count(manifest)
        self.code = GpuCode(
            self.local,
            manifest,
            self.gpus,
            placed=lambda: self._packages_placed,
            fetch=self._fetch,
            progress=self.progress,
        )
        found = self.local.packages()
        if self.state.manifest == digest and self.local.equals(found, manifest):
            self.code.keep({entry.path for entry in manifest.entries})
            return None
        here = {item.path: item for item in found if item.kind == "file"}
        base = os.fsencode(self.root.packages) + b"/"
        kept = {}
        for entry in manifest.entries if here else ():
            item = here.get(entry.path)
            if (
                isinstance(entry, File)
                and item is not None
                and self.local.holds(item, entry, manifest.frames)
            ):
                kept[entry.path] = base + entry.path
        self.code.keep(kept.keys())
        return Tree(self.root.staging / "packages", manifest, digest, kept=kept)

    def _plan_shared(self) -> dict[str, Tree]:
        """What has to be brought of the shared manifests, by their digests."""
        digests = list(dict.fromkeys(digest for _, digest in self.snapshot.shared))
        found = side_by_side(lambda digest: self.local.manifest(self.store, digest, "shared"), digests)
        manifests = dict(zip(digests, found))
        winners = self.winners = union(
            (stamp, digest, manifests[digest]) for stamp, digest in self.snapshot.shared
        )
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
                or target_here(path, winners, self.plan)
            ):
                wanted.setdefault(winners[path].digest, set()).add(path)
        return {
            digest: Tree(self.root.staging / digest[:16], manifest, digest, wanted=wanted[digest])
            for digest, manifest in manifests.items()
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

    @cached_property
    def _packages_placed(self) -> Mapping[bytes, Placed]:
        """Where the frames of the packages lie."""
        assert self.code is not None
        digest = self.snapshot.packages
        stored = (
            self._placement.result() if self._placement else tags.get_stored_placement(self.store, digest)
        )
        return placed_by(decode_placement(stored, self.code.manifest, digest))

    def _may_hold(self, path: bytes) -> bool:
        """None that replaces a shared one: should the restore fail, that is still there."""
        return path.startswith(PACKAGES) or self.plan.wanted.get(path, Standing.OLDER) is None

    def _parts(self, packages: Tree | None, shared: Mapping[str, Tree]) -> list[Part]:
        """What is to be brought, but for what comes last."""
        parts = []
        if packages is not None:
            self.result.pulled.append("packages")
            assert self.code is not None
            missing = packages.missing
            self.code.late |= self.code.cold.intersection(missing)
            numbers = [number for number in missing if number not in self.code.late]
            parts.append(Part(PACKAGES, packages, numbers, self._packages_placed))
        if self.plan.wanted:
            self.result.pulled.append("shared")
        placements = side_by_side(
            lambda digest: tags.get_placement(self.store, shared[digest].manifest, digest), list(shared)
        )
        for tree, placement in zip(shared.values(), placements):
            parts.append(Part(b"", tree, tree.missing, placed_by(placement)))
        return parts

    def _fetch(self, jobs: Sequence[Job], **options: Any) -> None:
        brought = self.line(jobs, **options)  # before the sum is read: another one may end meanwhile
        self.result.transferred_bytes += brought

    def _start(self) -> None:
        if self.opening is not None:
            self.opening.start(self.result)

    def _told(self) -> None:
        if self.opening is not None:
            self.opening.arrived()

    # --- code for other GPUs ---

    @property
    def _late(self) -> Collection[int]:
        """Frames of the packages that come last, or never."""
        return self.code.late if self.code is not None else ()

    def _fill_needed(self) -> None:
        if self.code is not None:
            self.code.fill_needed()
            self._count_cold(self.code)
        self.state = msgspec.structs.replace(self.state, gpus=self.gpus if self._late else ())

    def _fill_late(self, code: GpuCode) -> None:
        """When all else is there. It is recorded while the first bytes of the rest are on their way."""
        # What is left of the disk belongs to the command.
        self.root.require_space(code.late_bytes, "code for other GPUs needs", margin=MARGIN)
        code.fill_late(UNCALLED if self.opening is not None else 0, self._settle)
        self._count_cold(code)
        if not code.late:
            self.state = msgspec.structs.replace(self.state, gpus=())

    def _count_cold(self, code: GpuCode) -> None:
        brought = "packages" in self.result.pulled  # so it is known where its frames lie
        self.result.cold_bytes = code.late_bytes
        self.result.cold_stored_bytes = code.late_stored_bytes if brought else 0

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
                gpus=self.gpus,
            )
            self.root.record(self.state)

    def _seen(self, tree: Tree) -> Iterator[Seen]:
        """For the index, which is to be brought up to date: the links of the retired generation are gone, which changed the
        ctime of what was kept of it."""
        base = os.fsencode(self.root.packages) + b"/"
        for entry in tree.entries:
            if isinstance(entry, File):
                signature = tree.signatures.get(entry.path)
                if signature is None:
                    try:
                        signature = signature_of(os.lstat(base + entry.path))
                    except (FileNotFoundError, NotADirectoryError):  # removed by a command that runs already
                        continue
                if (signature.size, signature.mtime) == (entry.size, entry.mtime):
                    content = content_of(entry, tree.manifest.frames)
                    yield Seen(PACKAGES + entry.path, signature, (content, entry.mode), known_at(signature))

    def _record(self) -> None:
        shared = tuple(digest for _, digest in self.snapshot.shared)
        self.local.index.save()
        with self.root.recording() as record:
            self.local.record_synced(
                Synced(source_of(self.store, self.result.tag), tuple(self.snapshot.shared))
            )
            self.local.keep_only([self.snapshot.packages or self.state.manifest, *shared])
            record(
                msgspec.structs.replace(
                    self.state,
                    state="sparse" if self._late else "complete",
                    snapshot=self.result.snapshot,
                    shared=shared,
                )
            )
        atomic.remove_tree(self.root.staging)


def _refuse_foreign(manifest: Manifest, worker: Interpreter) -> None:
    if manifest.soabi and (manifest.soabi, manifest.platform) != (worker.soabi, worker.platform):
        raise PackhorseError(
            f"The snapshot was made for {manifest.soabi} on {manifest.platform}, this worker's Python is "
            f"{worker.soabi} on {worker.platform}.",
            "Use the Python it was made for (environment.python), or install and push with this one.",
        )


def _in_use(root: Root) -> PackhorseError:
    return PackhorseError(
        f"The packages of {root.path} are in use by a running command.",
        "Stop it, or pull into another root; what was fetched is kept for the next pull.",
    )
