"""Trees on their way into place: what is there before a command may start, and what it need not wait for.

Promises that what is held back is held back before the command can start, and that nothing is written before there is a
place for it. Knows nothing of what the trees are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from packhorse.progress import Progress
from packhorse.root import Root
from packhorse.snapshot.holes import is_program
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.writer import Placed
from packhorse.transfer.arriving import Arriving
from packhorse.transfer.line import Job
from packhorse.transfer.opening import Gate, Held, Opening


class Part(NamedTuple):
    """A tree that is brought; `prefix` makes its paths relative to the root."""

    prefix: bytes
    tree: Tree
    numbers: Sequence[int]
    """Its frames that come."""
    placed: Mapping[bytes, Placed]


class Bringing:
    """Parts that are brought together, first with `early`, then with what that returned beside the rest of the work.

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
        self.arriving: Arriving | None = None
        """The record of shared files that will be there without their bytes, if there are such files."""

    def early(self, parts: Sequence[Part]) -> list[Job]:
        """Bring what is needed before a command may start; returns what it need not wait for."""
        ranks = self._ranks(parts)
        early: list[Job] = []
        late: list[tuple[Tree, Job]] = []
        for part in parts:
            tree = part.tree
            for number in part.numbers:
                frame = tree.manifest.frames[number]
                placed = part.placed[frame.digest]
                paths = [part.prefix + path for path in tree.paths(number)] if ranks else []
                if paths and all(path in ranks for path in paths):
                    rank = min(ranks[path] for path in paths)
                    late.append((tree, Job(tree, number, frame, placed, rank)))
                else:
                    early.append(Job(tree, number, frame, placed))
        total = sum(job.frame.length for job in (*early, *(job for _, job in late)))
        self._progress.stage("restoring", total)
        self._fetch(early, prepare=partial(self._prepare, parts, ranks))
        held: list[Job] = []
        refused: list[Job] = []
        for tree, job in late:
            (held if tree.paths(job.number) <= tree.late else refused).append(job)
        self._fetch([replace(job, rank=0) for job in refused])
        return held

    @contextlib.contextmanager
    def beside(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Bring `jobs` while the block runs, and wait for them after it."""
        if not jobs:
            yield
            return
        assert self._gate is not None
        with ThreadPoolExecutor(1, thread_name_prefix="held") as pool:
            bringing = pool.submit(self._fetch, jobs, wanted=self._gate.wanted)
            try:
                yield
            except BaseException:
                self._gate.wanted.stop()
                raise
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

    def _prepare(self, parts: Sequence[Part], ranks: Collection[bytes]) -> None:
        """Create what the bytes go into, and hold back what has a rank."""
        shared: list[Held] = []
        for part in parts:
            part.tree.prepare({path for path in part.tree.holdable if part.prefix + path in ranks})
            part.tree.expect(part.numbers)
            if self._gate is not None:
                held = self._hold(self._gate, part)
                shared += [] if part.prefix else held
        if shared:
            self.arriving = Arriving(self._root, [(each.path, each.descriptor) for each in shared])

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
