"""What a file contains, told by a manifest or read from the disk: the same answer for the same bytes, cut alike.

Promises that this can be compared without reading a file twice, and tells what an earlier manifest knew of files that did
not change since. Knows no packs.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import LARGE_FILE
from packhorse.snapshot.gpu import Gathered
from packhorse.snapshot.manifest import File, Frame, Manifest, members, triples

_LAYOUT = b"+"
"""Stands in what a large file contains before the digest that tells how it is cut; a plain cut has none."""


def content_of(file: File, manifest_frames: Sequence[Frame]) -> bytes:
    """What a file contains, as the index keeps it: its digest, or the digests of its frames if it is large.

    Two large files can be told to be equal by this only if they are cut alike, see `cut_alike`.
    """
    if file.size < LARGE_FILE:
        return file.digest
    return content_of_runs(
        [(manifest_frames[frame], offset, length) for frame, offset, length in triples(file.pieces)]
    )


def content_of_runs(runs: Sequence[tuple[Frame, int, int]]) -> bytes:
    """What a large file contains, by its runs in their order: the frame, offset in it, length in bytes.

    The digests of the frames. Where it is not simply cut into pieces, also what tells how it is cut.
    """
    digests = b"".join(frame.digest for frame, offset, _ in runs if not offset)
    if all(not offset and length == frame.length for frame, offset, length in runs) and all(
        length == frames.PIECE for *_, length in runs[:-1]
    ):
        return digests
    numbers: dict[bytes, int] = {}
    layout = [(numbers.setdefault(frame.digest, len(numbers)), *run) for frame, *run in runs]
    return digests + _LAYOUT + frames.digest_of(repr(layout).encode())


def cut_alike(content: bytes, other: bytes) -> bool:
    """Whether two large files of the same size with these contents are cut at the same places."""
    return len(content) == len(other) and (
        (is_plain(content) and is_plain(other)) or content[-32:] == other[-32:]
    )


def is_plain(content: bytes) -> bool:
    """Whether a large file with this content is simply cut into pieces."""
    return len(content) % 32 == 0


def _gathered(file: File) -> list[tuple[int, Gathered]]:
    """How a large file was cut: the number of the frame and what of the file is in it, for each. Without labels."""
    cut: list[tuple[int, Gathered]] = []
    ending: dict[tuple[int, int], list[Gathered]] = {}
    position = 0
    for frame, offset, length in triples(file.pieces):
        before = ending.get((frame, offset))
        if before and offset:
            gathered = before.pop()
        else:
            gathered = Gathered("", [])
            cut.append((frame, gathered))
        gathered.runs.append((position, length))
        ending.setdefault((frame, offset + length), []).append(gathered)
        position += length
    return cut


_HOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_AT_ONCE = _HOW | os.O_NONBLOCK


def open_scanned(path: bytes) -> int:
    """A descriptor to read what was scanned as a file. No symbolic link is followed, and no FIFO that has taken the file's
    place is waited for: reading it gives nothing, or an error. Raises OSError."""
    try:
        return os.open(path, _AT_ONCE)
    except BlockingIOError:  # held back by a lease, until the file is there
        return os.open(path, _HOW)


class OutOfTime(Exception):  # noqa: N818 - no error: what there was time for counts
    """Reading a file would take longer than allowed."""


def content_on_disk(
    path: bytes,
    size: int,
    like: File | None = None,
    holes: Mapping[int, bytes] | None = None,
    until: float | None = None,
) -> bytes:
    """The same for a file on disk that should have `size` bytes, cut as `like` is: by default as a writer cuts it.

    Frames of `like` that are `holes` (number → digest) are not read. Raises OSError where it cannot be read, OutOfTime
    where a large one has not been read by `until` (time.monotonic).
    """
    if size < LARGE_FILE:
        with open(open_scanned(path), "rb") as file:
            return frames.digest_of(file.read(LARGE_FILE))
    descriptor = open_scanned(path)
    try:
        cut = (
            [(-1, gathered) for gathered in gpu.pieces(gpu.extents(descriptor, size), frames.PIECE)]
            if like is None
            else _gathered(like)
        )
        runs: list[tuple[int, Frame, int, int]] = []
        for number, gathered in cut:
            _require_time(until)
            if holes and number in holes:
                digest = holes[number]
            elif is_hole(descriptor, gathered.runs):
                digest = frames.ZEROS
            else:
                digest = frames.digest_of(
                    b"".join(os.pread(descriptor, length, start) for start, length in gathered.runs)
                )
            frame, offset = Frame(digest, gathered.length), 0
            for start, length in gathered.runs:
                runs.append((start, frame, offset, length))
                offset += length
        runs.sort(key=lambda run: run[0])
        return content_of_runs([(frame, offset, length) for _, frame, offset, length in runs])
    finally:
        os.close(descriptor)


def _require_time(until: float | None) -> None:
    if until is not None and time.monotonic() > until:
        raise OutOfTime


def is_hole(descriptor: int, runs: Sequence[tuple[int, int]]) -> bool:
    """Whether this is one whole piece, and nothing was ever written there (lseek(2), SEEK_DATA)."""
    [offset, length], more = runs[0], runs[1:]
    if more or length != frames.PIECE:
        return False
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + length
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing from there to the end


class Before(NamedTuple):
    """What an earlier manifest tells of files that did not change since."""

    groups: Mapping[bytes, bytes] = {}
    """For the frames of small files: the digest over the members' digests → the frame's digest."""
    pieces: Mapping[bytes, tuple[bytes, list[Gathered]]] = {}
    """For large files with code for GPUs, by path: what they contain, and how they are cut."""

    @classmethod
    def of(cls, manifest: Manifest | None) -> Before:
        """What `manifest` tells, if there is one."""
        if manifest is None:
            return cls()
        groups = {
            frames.group_digest(member.file.digest for member in inside): frame.digest
            for frame, inside in zip(manifest.frames, members(manifest.entries, len(manifest.frames)))
            if inside and inside[0].file.digest
        }
        pieces = {}
        for entry in manifest.entries:
            if isinstance(entry, File) and any(manifest.frames[number].gpus for number in entry.pieces[::3]):
                cut = _gathered(entry)
                if all(gathered.length == manifest.frames[number].length for number, gathered in cut):
                    labelled = [each._replace(gpus=manifest.frames[number].gpus) for number, each in cut]
                    pieces[entry.path] = content_of(entry, manifest.frames), labelled
        return cls(groups, pieces)
