"""Files of a scanned tree → the bytes of a frame, as long as they are what was scanned.

Promises that what changed since is told and comes as zeros, and that no symbolic link is followed. Knows nothing of packs.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence

from packhorse.snapshot import frames
from packhorse.snapshot.contents import is_hole
from packhorse.snapshot.frames import Span
from packhorse.snapshot.scan import Found, signature_of

HOLE = bytes(frames.PIECE)


@contextlib.contextmanager
def opened(base: bytes, item: Found) -> Iterator[int]:
    """The file that was scanned, open for reading. Raises OSError."""
    descriptor = os.open(os.path.join(base, item.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(
    base: bytes, files: Sequence[Found], spans: Sequence[Span]
) -> tuple[frames.Bytes, list[frames.Bytes], set[int]]:
    """The bytes of a frame (HOLE for a whole piece that is a hole), those of each file, and which files are no
    longer those that were scanned."""
    if len(spans) == 1:
        [(file, offset, length)] = spans
        run = _read_run(base, files[file], offset, length)
        raw = run or bytes(length)
        return raw, [raw], set() if run else {file}
    # In one piece from the start: buffers of many sizes beside each other leave gaps between them.
    gathered = bytearray(sum(span.length for span in spans))
    view = memoryview(gathered)
    parts: list[frames.Bytes] = []
    torn: set[int] = set()
    start = 0
    for file, its in itertools.groupby(spans, key=lambda span: span.file):
        runs = [(span.offset, span.length) for span in its]
        first, whole = start, False
        start += sum(length for _, length in runs)
        with contextlib.suppress(OSError), opened(base, files[file]) as descriptor:
            whole = _fill(view[first:start], descriptor, runs)
            whole = whole and _is_as_found(os.fstat(descriptor), files[file])
        if not whole:
            torn.add(file)
            view[first:start] = bytes(start - first)
        parts.append(view[first:start])
    return gathered, parts, torn


def _read_run(base: bytes, item: Found, offset: int, length: int) -> bytes:
    """A run of a file; nothing where the file is no longer what was scanned."""
    with contextlib.suppress(OSError), opened(base, item) as descriptor:
        # Unlike a buffer to read into, what pread(2) returns was not cleared before, under the interpreter's lock.
        hole = is_hole(descriptor, [(offset, length)])
        raw = HOLE if hole else os.pread(descriptor, length, offset)
        if len(raw) == length and _is_as_found(os.fstat(descriptor), item):
            return raw
    return b""


def _is_as_found(status: os.stat_result, item: Found) -> bool:
    """Whether a file holds what it held; it may have got or lost a name."""
    signature = signature_of(status)
    linked = status.st_nlink != item.links and signature.written_as(item.signature)
    return linked or signature == item.signature


def _fill(view: memoryview, descriptor: int, runs: Sequence[tuple[int, int]]) -> bool:
    """Read runs (offset, length) of a file one after the other; tells whether all of them are there."""
    filled = 0
    for offset, length in runs:
        if os.preadv(descriptor, [view[filled : filled + length]], offset) != length:
            return False
        filled += length
    return True
