"""Disks: what a directory holds, and how far an operation grew the root and the OS disk.

Knows paths and statvfs(2), nothing of what is being done.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import NamedTuple

_INTERVAL = 0.2


class Usage(NamedTuple):
    """What lies below a directory: the number of files and links, and the bytes allocated for everything."""

    files: int
    bytes: int


def usage(path: Path) -> Usage:
    """Count what is below `path`; files with several hard links once. What vanishes meanwhile, or may not
    be listed, is left out.
    """
    files = allocated = 0
    linked: set[tuple[int, int]] = set()
    pending = [os.fspath(path)]
    while pending:
        try:
            entries = os.scandir(pending.pop())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        with entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except (FileNotFoundError, PermissionError):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    files += 1
                    if status.st_nlink > 1:
                        if (status.st_dev, status.st_ino) in linked:
                            continue
                        linked.add((status.st_dev, status.st_ino))
                allocated += status.st_blocks * 512  # stat(2): the unit is 512 bytes everywhere
    return Usage(files, allocated)


class Watch:
    """Looks at the disks of a root and of the system while something runs: `with Watch(root) as watch: ...`.

    All sizes are bytes. `lowest_free` is the least that was free on the root's disk since `reset_lowest`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._apart = os.stat(root).st_dev != os.stat("/").st_dev
        self._usage_before = usage(root).bytes
        self._used_before, self.lowest_free = _used_and_free(root)
        self._os_used_before = _used_and_free(Path("/"))[0]
        self._growth = self._os_growth = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True, name="disk watch")

    def look(self) -> int:
        """Take one sample now; returns the bytes free on the root's disk."""
        used, free = _used_and_free(self._root)
        self.lowest_free = min(self.lowest_free, free)
        self._growth = max(self._growth, used - self._used_before)
        if self._apart:
            self._os_growth = max(self._os_growth, _used_and_free(Path("/"))[0] - self._os_used_before)
        return free

    def reset_lowest(self) -> None:
        """Forget the lowest free space seen so far."""
        self.lowest_free = _used_and_free(self._root)[1]

    def summary(self) -> tuple[int, int, int]:
        """Bytes: of the root now, of the root at its peak, and the growth of the OS disk outside the root.

        That growth is taken at its peak where the root lies on a disk of its own. On a shared disk it is what
        is left now of the disk's growth after the root's own; what other programs write counts in both cases.
        """
        self.look()
        now = usage(self._root).bytes
        outside = self._os_growth
        if not self._apart:
            outside = _used_and_free(Path("/"))[0] - self._os_used_before - (now - self._usage_before)
        return now, max(now, self._usage_before + self._growth), max(outside, 0)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(_INTERVAL):
            with contextlib.suppress(OSError):
                self.look()


def _used_and_free(path: Path) -> tuple[int, int]:
    """Bytes in use, and bytes that may still be written: none where no further file can be created."""
    disk = os.statvfs(path)
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    out_of_files = disk.f_files > 0 and disk.f_favail == 0
    return used, 0 if out_of_files else disk.f_bavail * disk.f_frsize
