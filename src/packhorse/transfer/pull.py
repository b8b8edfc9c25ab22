"""Pull: a snapshot of the store becomes the persistent directories of a root.

Promises that `packages/` is exchanged whole or left alone, that shared files arrive one by one and whole, never
over one that changed here, and that a killed pull goes on where it was. With an `Opening` a command may start before
everything is there: then the root's state says partial or sparse until it is.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import msgspec

from packhorse import atomic
from packhorse.errors import NoSuchSnapshotError, PackhorseError
from packhorse.install.interpreter import Interpreter
from packhorse.progress import Progress
from packhorse.root import Root, State
from packhorse.snapshot.contents import content_of
from packhorse.snapshot.holes import Patch, cold, has_holes, numbers_of
from packhorse.snapshot.manifest import Directory, File, Manifest
from packhorse.snapshot.order import UNCALLED
from packhorse.snapshot.reader import Tree, own_bytes
from packhorse.snapshot.scan import readable, signature_of
from packhorse.snapshot.writer import Placed, placed_by
from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.store.tags import SnapshotFacts
from packhorse.transfer import arriving
from packhorse.transfer.fetch import Job, Wanted, fetch
from packhorse.transfer.local import PACKAGES, Local, Synced, source_of
from packhorse.transfer.merge import Plan, Standing, plan
from packhorse.transfer.opening import Gate, Held, Opening, PullResult
from packhorse.transfer.publication import Publication, target_here
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
    started = time.monotonic()
    with root.writing(waiting):
        arriving.remove(root)
        line = partial(fetch, store, progress=progress, connections=connections, threads=threads)
        restore = _Restore(root, store, target, interpreter, progress, line, gpus, only, opening)
        result = restore.run()
    result.seconds = time.monotonic() - started
    result.peak_rss_bytes = peak()
    return result


class _Part(NamedTuple):
    """A tree that is brought; `prefix` makes its paths relative to the root."""

    prefix: bytes
    tree: Tree
    numbers: Sequence[int]
    """Its frames that come, but for what comes last."""
    placed: Mapping[bytes, Placed]


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
        self.interpreter, self.progress, self.fetch = interpreter, progress, line
        self.gpus, self.only, self.opening = gpus if only or opening else (), only, opening
        self.local = Local(root)
        self.state = root.state()
        self.result = PullResult(snapshot=target.snapshot.id, tag=target.tag)
        self.winners: dict[bytes, Winner] = {}
        self.plan = Plan({}, set(), [])
        self.manifest: Manifest | None = None
        """Of the packages."""
        self.kept: set[bytes] = set()
        """Files of packages/ that stay as they are."""
        self.needed: set[int] = set()
        """Frames of it that files which are kept lack, and that must be there before a command starts."""
        self.late: set[int] = set()
        """Frames of it that come last, or never."""
        self.placed: Mapping[bytes, Placed] = {}
        """Where its frames lie, once that is known."""
        self.arriving: arriving.Arriving | None = None

    def run(self) -> PullResult:
        packages = self._plan_packages()
        shared = self._plan_shared()
        if packages is None and not self.plan.wanted:
            self._fill_needed()
            self._start()
        else:
            self._restore(packages, shared)
        self._record()
        # With the index some 80 MB for 50,000 files, and the buffers for frames come on top.
        del packages, shared
        if self.late and not self.only:
            self._fill_late()
            self._told()
            self._record()
        return self.result

    def _restore(self, packages: Tree | None, shared: Mapping[str, Tree]) -> None:
        """Bring what is missing, but for what comes last."""
        trees = [*([packages] if packages else []), *shared.values()]
        if packages is not None:
            with self.root.packages_unused() as free:
                if not free:
                    raise _in_use(self.root)
        self._require_space(trees)
        self.root.record(msgspec.structs.replace(self.state, state="partial"))
        publication = Publication(self.local, self.winners, shared, self.plan, self._keep)
        try:
            held = self._bring_early(self._parts(packages, shared))
            with self._beside(held):
                for tree in trees:
                    tree.finish()
                if packages is not None:
                    self._exchange(packages)
                if self.arriving is not None:
                    self.state = msgspec.structs.replace(self.state, state="partial")
                publication.publish()
                self._fill_needed()
                self._start()
                if packages is not None:
                    self.root.remove_retired()
        except BaseException:
            # Until the exchange, or the first shared file that is there without its bytes, what was there before is as
            # whole as it was.
            self.root.record(self.state)
            raise
        finally:
            if self.arriving is not None:
                self.arriving.close()
        if packages is not None:
            self._remember_packages(packages)
        publication.remember()
        arriving.remove(self.root)
        self._told()

    def _require_space(self, trees: Sequence[Tree]) -> None:
        """Raise NoSpaceError where the trees find no place; what a killed pull staged of them counts as there."""
        staging = self.root.staging
        staged = {name for tree in trees for name in tree.names}
        for name in os.listdir(staging) if staging.is_dir() else ():
            if name not in staged:
                atomic.remove_tree(staging / name)
        needed = -own_bytes(staging)
        for tree in trees:
            never = self._cold(tree.manifest) if self.only and tree.manifest is self.manifest else ()
            needed += tree.new_bytes(never)
        self.root.require_space(max(needed, 0) + MARGIN, "the snapshot")

    # --- planning ---

    def _plan_packages(self) -> Tree | None:
        digest = self.snapshot.packages
        if not digest:
            return None
        manifest = self.local.manifest(self.store, digest, "packages")
        self._refuse_foreign(manifest)
        self._count(manifest)
        self.manifest = manifest
        found = self.local.packages()
        if self.state.manifest == digest and self.local.equals(found, manifest):
            self._plan_holes(manifest, {entry.path for entry in manifest.entries})
            return None
        here = {item.path: item for item in found if item.kind == "file"}
        base = os.fsencode(self.root.packages) + b"/"
        kept = {}
        for entry in manifest.entries:
            item = here.get(entry.path)
            if (
                isinstance(entry, File)
                and item is not None
                and self.local.holds(item, entry, manifest.frames)
            ):
                kept[entry.path] = base + entry.path
        self._plan_holes(manifest, kept.keys())
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
                or target_here(path, winners, self.plan)
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

    def _parts(self, packages: Tree | None, shared: Mapping[str, Tree]) -> list[_Part]:
        """What is to be brought, but for what comes last."""
        trees = [(digest, b"", tree) for digest, tree in shared.items()]
        if packages is not None:
            trees.insert(0, (self.snapshot.packages, PACKAGES, packages))
            self.result.pulled.append("packages")
        if self.plan.wanted:
            self.result.pulled.append("shared")
        parts = []
        for digest, prefix, tree in trees:
            placed = placed_by(tags.get_placement(self.store, tree.manifest, digest))
            numbers = tree.missing
            if tree is packages:
                self.placed = placed
                self.late |= self._cold(tree.manifest).intersection(numbers)
                numbers = [number for number in numbers if number not in self.late]
            parts.append(_Part(prefix, tree, numbers, placed))
        return parts

    def _bring_early(self, parts: Sequence[_Part]) -> list[Job]:
        """Bring what is needed before a command may start; returns what it need not wait for."""
        ranks = self._ranks(parts)
        early: list[Job] = []
        late: list[tuple[Tree, Job]] = []
        for prefix, tree, numbers, placed in parts:
            for number in numbers:
                paths = {prefix + path for path in tree.paths(number)}
                waits = paths <= ranks.keys()
                frame = tree.manifest.frames[number]
                rank = min(ranks[path] for path in paths) if waits else 0
                job = Job(tree, number, frame, placed[frame.digest], rank)
                if waits:
                    late.append((tree, job))
                else:
                    early.append(job)
        total = sum(job.frame.length for job in (*early, *(job for _, job in late)))
        self.progress.stage("restoring", total)
        self._bring(early, prepare=partial(self._prepare, parts, ranks))
        held: list[Job] = []
        refused: list[Job] = []
        for tree, job in late:
            (held if tree.paths(job.number) <= tree.late else refused).append(job)
        self._bring(refused)
        return held

    def _prepare(self, parts: Sequence[_Part], ranks: Collection[bytes]) -> None:
        """Create what the bytes go into, and hold back what has a rank."""
        held: list[Held] = []
        for prefix, tree, numbers, _ in parts:
            tree.prepare({path for path in tree.holdable if prefix + path in ranks})
            tree.expect(numbers)
            if self.opening is not None and self.opening.gate is not None:
                held += self._hold(self.opening.gate, prefix, tree)
        shared = [each for each in held if not each.path.startswith(PACKAGES)]
        if shared:
            self.arriving = arriving.Arriving(self.root, [(each.path, each.descriptor) for each in shared])

    def _ranks(self, parts: Sequence[_Part]) -> Mapping[bytes, int]:
        """The files to hold back, the largest ones where they are too many, and the order of all of them.

        None that replaces a shared one: should the restore fail, that is still there.
        """
        if self.opening is None or self.opening.gate is None:
            return {}
        sizes = {
            prefix + path: file.size
            for prefix, tree, *_ in parts
            for path, file in tree.holdable.items()
            if prefix or self.plan.wanted.get(path, Standing.OLDER) is None
        }
        largest = sorted(sizes, key=lambda path: -sizes[path])[: self.opening.gate.most]
        return self.opening.ranks({path: sizes[path] for path in largest})

    def _hold(self, gate: Gate, prefix: bytes, tree: Tree) -> list[Held]:
        """Hold back the held files of a tree; those that cannot be are brought like small ones."""
        files = [
            Held(
                prefix + path,
                descriptor,
                bool(tree.holdable[path].mode & 0o111),
                partial(gate.wanted.add, tree, tree.numbers(path)),
            )
            for path, descriptor in tree.held.items()
        ]
        refused = gate.hold(files)
        for path in refused:
            tree.let_go(path.removeprefix(prefix))
        tree.on_arrival = partial(self._arrived, gate, prefix)
        return [each for each in files if each.path not in refused]

    def _arrived(self, gate: Gate, prefix: bytes, path: bytes, descriptor: int) -> None:
        if self.arriving is not None and not prefix:
            self.arriving.arrived(path)
        gate.arrived(prefix + path, descriptor)

    def _bring(
        self,
        jobs: Sequence[Job],
        *,
        wanted: Wanted | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.result.transferred_bytes += self.fetch(jobs, wanted=wanted, prepare=prepare)

    @contextlib.contextmanager
    def _beside(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Bring `jobs` while the block runs, and wait for them after it."""
        if not jobs:
            yield
            return
        assert self.opening is not None and self.opening.gate is not None
        with ThreadPoolExecutor(1, thread_name_prefix="held") as pool:
            bringing = pool.submit(self._bring, jobs, wanted=self.opening.gate.wanted)
            try:
                yield
            except BaseException:
                self.opening.gate.wanted.stop()
                raise
            bringing.result()

    def _start(self) -> None:
        if self.opening is not None:
            self.opening.start(self.result)

    def _told(self) -> None:
        if self.opening is not None:
            self.opening.arrived()

    # --- code for other GPUs ---

    def _cold(self, manifest: Manifest) -> set[int]:
        return cold(manifest, self.gpus)

    def _plan_holes(self, manifest: Manifest, kept: Collection[bytes]) -> None:
        """Find out what the files that are kept lack, and which of that is needed at the start."""
        lacking = {number for number, frame in enumerate(manifest.frames) if frame.digest in self.local.holes}
        lacking = numbers_of(manifest, kept).intersection(lacking) if lacking else lacking
        self.kept = set(kept)
        self.late |= lacking & self._cold(manifest)
        self.needed |= lacking - self.late

    def _fill_needed(self) -> None:
        """Before the start: what another GPU did not need and this one does."""
        self._fill(self.needed, self.kept)  # what is new has, or gets, it from its own tree
        self.state = msgspec.structs.replace(self.state, gpus=self.gpus if self.late else ())

    def _fill_late(self) -> None:
        """When all else is there, and recorded: the code for other GPUs."""
        del self.local.index  # as above
        assert self.manifest is not None
        missing = sum(self.manifest.frames[number].length for number in self.late)
        # What is left of the disk belongs to the command.
        self.root.require_space(missing + MARGIN, "code for other GPUs")
        if self._fill(self.late, rank=UNCALLED if self.opening is not None else 0):
            self.late = set()
            self.state = msgspec.structs.replace(self.state, gpus=())

    def _fill(
        self, numbers: Collection[int], paths: Collection[bytes] | None = None, *, rank: int = 0
    ) -> bool:
        """Fill in frames of `packages/`, in the files `paths` only if they are given. False where a file that changed
        here still lacks some."""
        if not numbers:
            return True
        assert self.manifest is not None
        manifest = self.manifest
        if not self.placed:
            self.placed = placed_by(tags.get_placement(self.store, manifest, self.snapshot.packages))
        base = os.fsencode(self.root.packages)
        patch = Patch(base, manifest, numbers, paths)
        self.progress.stage(
            "restoring code for other GPUs", sum(manifest.frames[number].length for number in numbers)
        )
        self.result.transferred_bytes += self.fetch(
            [
                Job(patch, number, frame, self.placed[frame.digest], rank)
                for number in numbers
                for frame in [manifest.frames[number]]
            ]
        )
        for path, signature in patch.signatures.items():
            if path not in patch.skipped:
                entry = patch.files[path]
                self.local.index.restored(
                    PACKAGES + path, signature, (content_of(entry, manifest.frames), entry.mode)
                )
        return not any(has_holes(os.path.join(base, path)) for path in patch.skipped)

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

    def _remember_packages(self, tree: Tree) -> None:
        """Bring the index up to date: the links of the retired generation are gone, which changed the ctime
        of what was kept of it."""
        base, index = os.fsencode(self.root.packages) + b"/", self.local.index
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
                self.state,
                state="sparse" if self.late else "complete",
                snapshot=self.result.snapshot,
                shared=shared,
            )
        )
        atomic.remove_tree(self.root.staging)


def _in_use(root: Root) -> PackhorseError:
    return PackhorseError(
        f"The packages of {root.path} are in use by a running command.",
        "Stop it, or pull into another root; what was fetched is kept for the next pull.",
    )
