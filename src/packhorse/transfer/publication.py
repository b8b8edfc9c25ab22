"""Publication: what a pull brought for the shared directories goes to its place, each path by one rename.

Promises never to replace what changed here meanwhile, and that a killed pull leaves nothing that looks changed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from packhorse import atomic
from packhorse.snapshot.manifest import PERMISSIONS, Directory, Hardlink
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.scan import Found, look, signature_of
from packhorse.transfer.local import Local
from packhorse.transfer.merge import Plan, Standing, standing
from packhorse.transfer.union import Winner

_OPEN = 0o700
"""The mode of directories while something comes into them."""


class Publication:
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
            above = self.winners.get(path.rpartition(b"/")[0])
            if isinstance(self.winners[path].entry, Directory):
                index.coming(path, (b"", _OPEN))
            if above is not None and not above.mode & 0o200:
                index.coming(above.entry.path, (b"", _OPEN))
        index.save()  # a pull killed from here on leaves nothing that looks changed here
        brought: dict[bytes, tuple[int, int]] = {}
        late = {
            name for tree in self.trees.values() for path in list(tree.held) for name in tree.names_of(path)
        }
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
                if stands is not Standing.SAME:
                    made.append(entry)
            elif stands is Standing.OLDER_MODE:
                os.chmod(self._at(path), self.winners[path].mode)
                brought[path] = _size_and_time(self._at(path))
            elif stands is not Standing.SAME:
                staged = self._staged(path)
                if staged is None:
                    self.keep(path)
                    continue
                if path not in late:
                    brought[path] = _size_and_time(staged)
                self._writable(path, partial(self._put, path, staged, item))
        for path, mode in self.opened.items():
            os.chmod(self._at(path), mode)
            if path in self.winners and mode == self.winners[path].mode:  # else it was changed here
                index.add(path, signature_of(os.lstat(self._at(path))), (b"", mode), seen=0)
        for entry in reversed(made):
            os.chmod(self._at(entry.path), entry.mode)
            os.utime(self._at(entry.path), ns=(entry.mtime, entry.mtime))
            index.add(entry.path, signature_of(os.lstat(self._at(entry.path))), (b"", entry.mode), seen=0)
        for path, expected in brought.items():  # last: links and renames of other names change the ctime
            signature = signature_of(os.lstat(self._at(path)))
            if (signature.size, signature.mtime) == expected:
                index.restored(path, signature, self._content(path))

    def remember(self) -> None:
        """Let the index know the files that arrived after they were published, as far as they are still there."""
        for tree in self.trees.values():
            for held in tree.late:
                for path in tree.names_of(held):
                    item = look(self.local.base, path)
                    if item is not None and item.signature == tree.signatures.get(held):
                        self.local.index.restored(path, item.signature, self._content(path))
        self.local.index.save()

    def _content(self, path: bytes) -> tuple[bytes, int]:
        return self.winners[path].content, self.winners[path].mode

    def _at(self, path: bytes) -> bytes:
        return os.path.join(self.local.base, path)

    def _staged(self, path: bytes) -> bytes | None:
        """Where the new content of `path` lies; None where the file that it is a name of changed meanwhile."""
        target = target_here(path, self.winners, self.plan)
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
        os.mkdir(self._at(path), _OPEN)

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
            os.chmod(self._at(parent), _OPEN)
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


def target_here(path: bytes, winners: Mapping[bytes, Winner], plan: Plan) -> bytes | None:
    """The target of a hard link, if it is here as the link's own manifest has it."""
    entry = winners[path].entry
    if not isinstance(entry, Hardlink) or entry.target not in plan.same:
        return None
    return entry.target if winners[entry.target].digest == winners[path].digest else None


def _size_and_time(path: bytes) -> tuple[int, int]:
    signature = signature_of(os.lstat(path))
    return signature.size, signature.mtime
