"""Code in `packages/` that only some GPUs need: what of it comes last or never, and how it is filled in afterwards.

Promises that a library which is filled in is the one that was pushed, and that one which changed here is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping

from packhorse.progress import Progress
from packhorse.snapshot.contents import content_of
from packhorse.snapshot.holes import Patch, cold, has_holes, lacking, numbers_of
from packhorse.snapshot.manifest import Manifest
from packhorse.snapshot.writer import Placed
from packhorse.transfer.line import Job
from packhorse.transfer.local import PACKAGES, Local


class GpuCode:
    """The frames of one manifest of packages that none of `gpus` (compute capabilities) needs; none without GPUs.

    `placed` tells where its frames lie. `fetch` is that of the module of this name, but for its first argument and the
    progress.
    """

    def __init__(
        self,
        local: Local,
        manifest: Manifest,
        gpus: tuple[int, ...],
        *,
        placed: Callable[[], Mapping[bytes, Placed]],
        fetch: Callable[..., None],
        progress: Progress,
    ) -> None:
        self.manifest = manifest
        self._placed, self._fetch, self._progress = placed, fetch, progress
        self.cold = cold(manifest, gpus)
        self.late: set[int] = set()
        """Frames that come last, or never."""
        self._local = local
        self._kept: Collection[bytes] = ()
        self._needed: set[int] = set()

    def keep(self, paths: Collection[bytes]) -> None:
        """These files stay as they are on the disk. Find out what they lack, and which of that is needed at the start."""
        known = self._local.holes
        lacking = {number for number, frame in enumerate(self.manifest.frames) if frame.digest in known}
        lacking = numbers_of(self.manifest, paths).intersection(lacking) if lacking else lacking
        self._kept = set(paths)
        self.late |= lacking & self.cold
        self._needed |= lacking - self.late

    @property
    def late_bytes(self) -> int:
        """What comes last, or never, on disk."""
        return sum(lacking(self.manifest, self.late).values()) if self.late else 0

    @property
    def late_stored_bytes(self) -> int:
        """The same in the store."""
        placed = self._placed()
        return sum(placed[self.manifest.frames[number].digest].length for number in self.late)

    def fill_needed(self) -> None:
        """Fill in what another GPU did not need and these do."""
        self._fill(self._needed, self._kept, 0)  # what is new has, or gets, it from its own tree

    def fill_late(self, rank: int, prepare: Callable[[], None]) -> None:
        """Fill in the rest; where a file that changed here still lacks some, it stays late. `prepare` is that of `fetch`."""
        if self._fill(self.late, None, rank, prepare):
            self.late = set()

    def _fill(
        self,
        numbers: Collection[int],
        paths: Collection[bytes] | None,
        rank: int,
        prepare: Callable[[], None] = lambda: None,
    ) -> bool:
        """Fill in frames, in the files `paths` only if they are given. False where a file that changed here still lacks
        some."""
        if not numbers:
            return True
        frames, placed = self.manifest.frames, self._placed()
        base = os.fsencode(self._local.root.packages)
        patch = Patch(base, self.manifest, numbers, paths)

        def begin() -> None:
            prepare()
            self._progress.stage(
                "restoring code for other GPUs", sum(frames[number].length for number in numbers)
            )

        self._fetch(
            [Job(patch, number, frames[number], placed[frames[number].digest], rank) for number in numbers],
            prepare=begin,
        )
        for path, signature in patch.signatures.items():
            if path not in patch.skipped:
                entry = patch.files[path]
                content = content_of(entry, frames), entry.mode
                self._local.index.restored(PACKAGES + path, signature, content)
        return not any(has_holes(os.path.join(base, path)) for path in patch.skipped)
