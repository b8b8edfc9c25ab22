"""Trees on their way into place: what is there before a command may start, and what it need not wait for.

Promises that what is held back is held back before the command can start, and that nothing is written before there is a
place for it. Knows nothing of what the trees are for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from packhorse.progress import Progress
from packhorse.root import Root
from packhorse.snapshot.holes import is_program
from packhorse.snapshot.order import NEEDED
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.writer import Placed
from packhorse.transfer.arriving import Arriving
from packhorse.transfer.line import Job, Wanted
from packhorse.transfer.opening import Gate, Held, Opening


class Part(NamedTuple):
    """A tree that is brought; `prefix` makes its paths relative to the root."""

    prefix: bytes
    tree: Tree
    numbers: Sequence[int]
    """Its frames that come."""
    placed: Mapping[bytes, Placed]


class Bringing:
    """Parts that are brought together, of which some may come later than the rest.

    `may_hold` tells by its path whether a file may be published before its bytes are there. `fetch` is that of the module
    of this name, but for its first argument and the progress.
    """

    def __init__(
        self,
        root: Root,
        fetch: Callable[..., None],
        progress: Progress,
        opening: Opening | None,
        may_hold: Callable[[bytes], bool],
    ) -> None:
        self._root, self._fetch, self._progress = root, fetch, progress
        self._opening, self._may_hold = opening, may_hold
        self._gate: Gate | None = opening.gate if opening is not None else None
        self._wanted = self._gate.wanted if self._gate is not None else Wanted()
        self.hurry = threading.Event()
        """Until it is set, what is held back leaves the processors to what a command needs before it may start."""
        self.arriving: Arriving | None = None
        """The record of shared files that will be there without their bytes, if there are such files."""

    @contextlib.contextmanager
    def under_way(self, parts: Sequence[Part]) -> Iterator[None]:
        """Bring the parts. The block begins when all is there that a command needs before it may start, and what is held
        back comes meanwhile; after the block all is there."""
        ranks = self._ranks(parts)
        jobs: list[Job] = []
        for part in parts:
            tree = part.tree
            for number in part.numbers:
                frame = tree.manifest.frames[number]
                placed = part.placed[frame.digest]
                paths = [part.prefix + path for path in tree.paths(number)] if ranks else []
                if paths and all(path in ranks for path in paths):
                    jobs.append(Job(tree, number, frame, placed, min(ranks[path] for path in paths)))
                else:
                    jobs.append(Job(tree, number, frame, placed, NEEDED, tree.creates(number)))
        if all(job.rank == NEEDED for job in jobs):
            self.hurry.set()
        self._progress.stage("restoring", sum(job.frame.length for job in jobs))
        needed = _Needed()
        with ThreadPoolExecutor(1, thread_name_prefix="bringing") as pool:
            bringing = pool.submit(
                self._fetch,
                jobs,
                prepare=lambda: needed.expect(self._prepare(parts, ranks, jobs)),
                written=needed.written,
                wanted=self._wanted,
                hurry=self.hurry,
            )
            bringing.add_done_callback(lambda ended: needed.there.set())
            try:
                needed.there.wait()
                if bringing.done():
                    bringing.result()
                yield
            except BaseException:
                self._wanted.stop()
                raise
            finally:
                self.hurry.set()
            bringing.result()

    def close(self) -> None:
        """The record stays until somebody removes it."""
        if self.arriving is not None:
            self.arriving.close()

    def _ranks(self, parts: Sequence[Part]) -> Mapping[bytes, int]:
        """The files to hold back, the largest ones where they are too many, and the order of all of them."""
        if self._gate is None:
            return {}
        assert self._opening is not None
        sizes = {
            part.prefix + path: file.size
            for part in parts
            for path, file in part.tree.holdable.items()
            if self._may_hold(part.prefix + path)
        }
        largest = sorted(sizes, key=lambda path: -sizes[path])[: self._gate.most]
        return self._opening.ranks({path: sizes[path] for path in largest})

    def _prepare(self, parts: Sequence[Part], ranks: Collection[bytes], jobs: Sequence[Job]) -> list[Job]:
        """Create what the bytes go into, and hold back what has a rank; returns the jobs that are needed first."""
        needed = [job for job in jobs if job.rank == NEEDED]
        shared: list[Held] = []
        for part in parts:
            tree = part.tree
            tree.prepare({path for path in tree.holdable if part.prefix + path in ranks})
            tree.expect(part.numbers)
            if self._gate is not None:
                all_held = set(tree.late)
                held = self._hold(self._gate, part)
                shared += [] if part.prefix else held
                if refused := all_held - tree.late:
                    late = [job for job in jobs if job.tree is tree and job.rank != NEEDED]
                    needed += [job for job in late if not refused.isdisjoint(tree.paths(job.number))]
        if shared:
            self.arriving = Arriving(self._root, [(each.path, each.descriptor) for each in shared])
        for job in needed:
            if job.rank != NEEDED:
                self._wanted.add(job.tree, [job.number])
        return needed

    def _hold(self, gate: Gate, part: Part) -> list[Held]:
        """Hold back the held files of a tree; those that cannot be are brought like small ones."""
        tree = part.tree
        files = [
            Held(
                part.prefix + path,
                descriptor,
                is_program(tree.holdable[path]),
                partial(gate.wanted.add, tree, tree.numbers(path)),
            )
            for path, descriptor in tree.held.items()
        ]
        refused = gate.hold(files)
        for path in refused:
            tree.let_go(path.removeprefix(part.prefix))
        tree.on_arrival = partial(self._arrived, gate, part.prefix)
        return [each for each in files if each.path not in refused]

    def _arrived(self, gate: Gate, prefix: bytes, path: bytes, descriptor: int) -> None:
        if self.arriving is not None and not prefix:
            self.arriving.arrived(path)
        gate.arrived(prefix + path, descriptor)


class _Needed:
    """Waits for some jobs."""

    def __init__(self) -> None:
        self.there = threading.Event()
        """Set when all of them are written."""
        self._left: set[int] = set()
        self._lock = threading.Lock()

    def expect(self, jobs: Iterable[Job]) -> None:
        """These are needed. To be called before any of them is written."""
        self._left = {id(job) for job in jobs}
        if not self._left:
            self.there.set()

    def written(self, job: Job) -> None:
        """One more, needed or not."""
        with self._lock:
            self._left.discard(id(job))
            if not self._left:
                self.there.set()
