"""A new, empty place to write to for each run, so that no run meets what another one deleted or left.

ext4 does not use an inode again for five minutes after it was freed: files that are made after a big removal cost
twenty times as much. So each run has a file system of its own, in a file (loop) or in memory (tmpfs); where neither
can be mounted it has a directory that is removed at the very end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from tests import small_os_disk

KINDS = ("loop", "tmpfs", "directory")
_INSIDE = "PACKHORSE_BENCH_INSIDE"
_MUCH = 4 << 30
"""Bytes: the kernel works on for a second or two when a file system in memory has gone that held so many."""


def enter() -> None:
    """Go on in a mount namespace of its own: whatever ends this program then ends its mounts as well."""
    if os.geteuid() == 0 and _INSIDE not in os.environ and not small_os_disk.refusal():
        os.environ[_INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])


class Disks:
    """Where runs write: `kind` of KINDS, inside `work`."""

    def __init__(self, kind: str, work: Path) -> None:
        self.kind = kind
        self.work = work
        self._count = 0

    @contextlib.contextmanager
    def fresh(self, size: int) -> Iterator[Path]:
        """An empty directory with room for `size` bytes. What it held is gone afterwards, or at the end."""
        self._count += 1
        point = self.work / f"disk-{self._count}"
        point.mkdir(parents=True)
        if self.kind == "directory":
            if shutil.disk_usage(self.work).free < size:
                raise SystemExit(
                    f"{self.work} has less than {size / 1e9:.0f} GB left. Without root each run needs a directory "
                    "that stays until the end: run this as root, with fewer --rounds, or elsewhere (--directory)."
                )
            yield point
            return
        with contextlib.ExitStack() as stack:
            if self.kind == "loop":
                self._mount_loop(point, size, stack)
            else:
                _command("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(point))
            if size > _MUCH:
                stack.callback(_settle)
            stack.callback(_unmount, point)
            yield point

    def _mount_loop(self, point: Path, size: int, stack: contextlib.ExitStack) -> None:
        image = point.with_suffix(".img")
        with image.open("wb") as file:
            file.truncate(size)
        stack.callback(image.unlink)
        _command(
            "mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1", str(image)
        )
        # Without direct I/O every page would be kept twice, once for the file and once for what lies in it.
        device = _command("losetup", "--find", "--show", "--direct-io=on", str(image)).strip()
        try:
            _command("mount", "-o", "noinit_itable", device, str(point))
        finally:
            _command("losetup", "--detach", device)  # at once, or when it is no longer mounted
        (point / "lost+found").rmdir()


def best_kind() -> str:
    """The first of KINDS that works here, for this user."""
    if os.geteuid() == 0 and shutil.which("mkfs.ext4") and shutil.which("losetup"):
        return "loop"
    return "directory"


def bytes_of(tree: Path) -> int:
    """Bytes of disk that a tree takes up."""
    total = 0
    for folder, _, names in os.walk(tree):
        total += os.lstat(folder).st_blocks * 512
        total += sum(os.lstat(os.path.join(folder, name)).st_blocks * 512 for name in names)
    return total


def read_all(paths: Iterator[Path], *, alone: bool = False) -> None:
    """Bring files into the page cache, so that each run finds them there. `alone`: as root, drop all else from it first.

    Where memory is full of what earlier runs read, the kernel takes processor time to make room for what is written, and
    on a virtual machine it takes some to touch memory that had become free.
    """
    if alone:
        os.sync()
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(8 << 20):
                pass


def _unmount(point: Path) -> None:
    """A program that was killed may hold its last files a moment longer than it can be waited for."""
    deadline = time.monotonic() + 10
    while subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            _command("umount", "--lazy", str(point))
            return
        time.sleep(0.1)


def _settle() -> None:
    """Wait until the processors have been nearly idle for half a second, for at most ten."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and psutil.cpu_percent(0.5) > 10:
        pass


def _command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout
