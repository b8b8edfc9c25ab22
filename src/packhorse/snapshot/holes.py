"""Holes: the code for other GPUs that the large files of a sparse root lack, and how it is filled in.

A hole is a frame of the packages manifest that none of the root's GPUs needs. Promises never to write into a file that is
no longer the one which the manifest tells of. Knows no network.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Collection, Iterable

from packhorse.snapshot import frames
from packhorse.snapshot.gpu import needed
from packhorse.snapshot.manifest import PERMISSIONS, File, Manifest, members
from packhorse.snapshot.reader import write_at
from packhorse.snapshot.scan import Signature, signature_of


def cold(manifest: Manifest, gpus: Collection[int]) -> set[int]:
    """The numbers of the frames that no GPU of these compute capabilities needs; none where `gpus` is empty.

    What a program may execute is never cold: a file that runs cannot be written to.
    """
    if not gpus:
        return set()
    chosen = {
        number
        for number, frame in enumerate(manifest.frames)
        if frame.gpus and not any(needed(frame.gpus, each) for each in gpus)
    }
    if chosen:
        for entry in manifest.entries:
            if isinstance(entry, File) and is_program(entry):
                chosen.difference_update(entry.pieces[::3])
    return chosen


def is_program(file: File) -> bool:
    """Whether somebody may execute it: not a shared library, which often may be and never is."""
    name = file.path.rpartition(b"/")[2]
    return bool(file.mode & 0o111) and not name.endswith(b".so") and b".so." not in name


def lacking(manifest: Manifest, numbers: Collection[int]) -> dict[bytes, int]:
    """The files that these frames belong to, and how many bytes of each they are."""
    files: dict[bytes, int] = {}
    for entry in manifest.entries:
        if isinstance(entry, File) and entry.size >= frames.LARGE_FILE:
            missing = sum(
                length for number, length in zip(entry.pieces[::3], entry.pieces[2::3]) if number in numbers
            )
            if missing:
                files[entry.path] = missing
    return files


def numbers_of(manifest: Manifest, paths: Collection[bytes]) -> set[int]:
    """The frames that the files `paths` need."""
    return {
        number
        for entry in manifest.entries
        if isinstance(entry, File) and entry.path in paths
        for number in entry.pieces[::3]
    }


def has_holes(path: bytes) -> bool:
    """Whether there is a file at `path` that takes less room than it has bytes."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_blocks * 512 < status.st_size


class Patch:
    """Frames on their way into files that lie in `base` and lack nothing else.

    A file that somebody changed or replaced meanwhile is left alone and named in `skipped`.
    """

    def __init__(
        self,
        base: bytes,
        manifest: Manifest,
        numbers: Collection[int],
        paths: Collection[bytes] | None = None,
    ) -> None:
        """For the files `paths` only, if they are given."""
        self.skipped: set[bytes] = set()
        self.signatures: dict[bytes, Signature] = {}
        """Of the files written to, as they are now."""
        self._base = base
        self._lock = threading.Lock()
        concerned = lacking(manifest, numbers)
        self.files = {
            entry.path: entry
            for entry in manifest.entries
            if isinstance(entry, File) and entry.path in concerned and (paths is None or entry.path in paths)
        }
        """The files that the frames belong to."""
        self._members = members(self.files.values(), len(manifest.frames))

    def put(self, number: int, parts: Iterable[frames.Bytes]) -> None:
        """Write what the frame `number` holds, when all of it is proven. Callable from several threads."""
        view = memoryview(b"".join(parts))
        with self._lock:  # times are set back before the next one looks at them
            for member in self._members[number]:
                file = member.file
                if file.path not in self.skipped:
                    part = view[member.frame_offset : member.frame_offset + member.length]
                    self._put(file, part, member.file_offset)

    def _put(self, file: File, part: memoryview, offset: int) -> None:
        path = os.path.join(self._base, file.path)
        try:
            descriptor = _open(path)
        except OSError:
            self.skipped.add(file.path)
            return
        try:
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime):
                self.skipped.add(file.path)
                return
            write_at(descriptor, part, offset)
            os.utime(descriptor, ns=(file.mtime, file.mtime))
            self.signatures[file.path] = signature_of(os.fstat(descriptor))
        finally:
            os.close(descriptor)


def _open(path: bytes) -> int:
    """A descriptor to write through, also to a file of ours that we may not write to."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:
        mode = os.lstat(path).st_mode & PERMISSIONS
        os.chmod(path, mode | 0o200)
        try:
            return os.open(path, flags)
        finally:
            os.chmod(path, mode)
