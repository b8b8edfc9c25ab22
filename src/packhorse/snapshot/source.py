"""Files of a scanned tree → the bytes of a frame, as long as they are what was scanned.

Promises that what changed since is told and comes as zeros, that no symbolic link is followed and no FIFO waited for.
Knows nothing of packs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from packhorse.snapshot import frames
from packhorse.snapshot.contents import is_hole, open_scanned
from packhorse.snapshot.frames import Span
from packhorse.snapshot.scan import Found, signature_of

HOLE = bytes(frames.PIECE)


@contextlib.contextmanager
def opened(base: bytes, item: Found) -> Iterator[int]:
    """The file that was scanned, open for reading. Raises OSError."""
    descriptor = open_scanned(os.path.join(base, item.path))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read(
    base: bytes, files: Sequence[Found], spans: Sequence[Span]
) -> tuple[frames.Bytes, list[frames.Bytes], set[int]]:
    """The bytes of a frame (HOLE for a whole piece that is a hole), those of each file, and which files are no
    longer those that were scanned. Several spans are whole files, or runs of one large file."""
    if len(spans) == 1:
        [(file, offset, length)] = spans
        run = _read_run(base, files[file], offset, length)
        raw = run or bytes(length)
        return raw, [raw], set() if run else {file}
    # In one piece from the start: buffers of many sizes beside each other leave gaps between them.
    gathered = bytearray(sum(span.length for span in spans))
    view = memoryview(gathered)
    if (file := spans[0].file) == spans[-1].file:
        whole = _fill(view, base, files[file], [(offset, length) for _, offset, length in spans])
        return gathered, [view], set() if whole else {file}
    parts: list[frames.Bytes] = []
    torn: set[int] = set()
    start = 0
    for file, offset, length in spans:
        part = view[start : start + length]
        start += length
        if not _fill(part, base, files[file], [(offset, length)]):
            torn.add(file)
        parts.append(part)
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


def _fill(view: memoryview, base: bytes, item: Found, runs: Sequence[tuple[int, int]]) -> bool:
    """Read runs (offset, length) of a file one after the other; zeros, and False, where it is no longer what was scanned.

    Called for every small file, most often from several threads: what it does besides system calls is what they wait for.
    """
    try:
        descriptor = open_scanned(base + b"/" + item.path)
        try:
            filled = 0
            for offset, length in runs:
                if os.preadv(descriptor, [view[filled : filled + length]], offset) != length:
                    break
                filled += length
            if filled == len(view) and _is_as_found(os.fstat(descriptor), item):
                return True
        finally:
            os.close(descriptor)
    except OSError:
        pass
    view[:] = bytes(len(view))
    return False
