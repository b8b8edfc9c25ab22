"""Files → frames → packs: reads a scanned tree and hands what the store lacks to a sink, pack by pack.

Promises bounded memory whatever the size, entries in the order of their paths, and that a file which changed
while it was read, or was not read in time, is named and left out. Knows no network.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from packhorse.progress import Progress
from packhorse.snapshot import frames
from packhorse.snapshot.frames import LARGE_FILE, Span
from packhorse.snapshot.index import Index, now
from packhorse.snapshot.manifest import (
    Directory,
    Entry,
    File,
    Frame,
    Hardlink,
    Manifest,
    Place,
    Placement,
    Symlink,
    members,
    triples,
)
from packhorse.snapshot.scan import Found, signature_of

PACK = 16 << 20
"""A pack is closed when it holds this many bytes; one is filled while another is on its way."""


Sink: TypeAlias = Callable[[str, memoryview], None]
"""Takes a full pack: its name and content."""


_HOLE = bytes(frames.PIECE)


class Placed(NamedTuple):
    """Where a frame lies in the store."""

    pack: str
    offset: int
    length: int
    codec: int
    digest: bytes


@dataclass
class Written:
    """What became of a tree."""

    entries: list[Entry] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    placed: dict[bytes, Placed] = field(default_factory=dict)
    """For every frame, by its digest."""
    changed: list[bytes] = field(default_factory=list)
    """Paths of files that changed while they were read; not among the entries."""
    unfinished: list[bytes] = field(default_factory=list)
    """Paths of files that the deadline left out; not among the entries."""
    stored_bytes: int = 0
    """Bytes handed to the sink."""


class _Job(NamedTuple):
    digest: bytes
    length: int
    members: list[bytes]
    codec: int
    stored: bytes | None
    stored_digest: bytes
    changed: set[int]


def content_of(file: File, manifest_frames: Sequence[Frame]) -> bytes:
    """What a file contains, as the index keeps it: its digest, or the digests of its frames if it is large."""
    if file.size < LARGE_FILE:
        return file.digest
    return b"".join(manifest_frames[frame].digest for frame, _, _ in triples(file.pieces))


def content_on_disk(path: bytes, size: int) -> bytes:
    """The same for a file on disk that should have `size` bytes. Raises OSError where it cannot be read."""
    if size < LARGE_FILE:
        with open(path, "rb") as file:
            return frames.digest_of(file.read(LARGE_FILE))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(
            frames.ZEROS
            if span.length == frames.PIECE and _is_hole(descriptor, span)
            else frames.digest_of(os.pread(descriptor, span.length, span.offset))
            for [span] in frames.cut([(path, size)])
        )
    finally:
        os.close(descriptor)


def groups_of(manifest: Manifest) -> dict[bytes, bytes]:
    """For the frames of small files: the digest over the members' digests → the frame's digest."""
    return {
        frames.group_digest(member.file.digest for member in inside): frame.digest
        for frame, inside in zip(manifest.frames, members(manifest.entries, len(manifest.frames)))
        if inside and inside[0].file.digest
    }


class _Packer:
    """Gathers stored frames into packs and hands full packs to the sink."""

    def __init__(self, sink: Sink, written: Written) -> None:
        self._sink = sink
        self._written = written
        self._begin()

    def _begin(self) -> None:
        self._waiting: list[tuple[bytes, int, int, bytes]] = []
        self._buffer = mmap.mmap(-1, PACK + frames.LARGEST_STORED)  # untouched pages cost nothing
        self._size = 0

    def add(self, digest: bytes, codec: int, stored: bytes, stored_digest: bytes) -> None:
        self._waiting.append((digest, codec, len(stored), stored_digest))
        self._buffer[self._size : self._size + len(stored)] = stored
        self._size += len(stored)
        if self._size >= PACK:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        name = frames.group_digest(stored_digest for *_, stored_digest in self._waiting).hex()
        offset = 0
        for digest, codec, length, stored_digest in self._waiting:
            self._written.placed[digest] = Placed(name, offset, length, codec, stored_digest)
            offset += length
        content = memoryview(self._buffer)[: self._size]
        self._written.stored_bytes += self._size
        self._begin()
        self._sink(name, content)


def write(
    base: bytes,
    found: Sequence[Found],
    sink: Sink,
    *,
    index: Index,
    index_prefix: bytes,
    existing: Mapping[bytes, Placed],
    groups: Mapping[bytes, bytes],
    progress: Progress,
    level: int = frames.DEFAULT_LEVEL,
    threads: int = 2,
    deadline: float | None = None,
) -> Written:
    """Read `found` below `base` and hand `sink` the packs (name, content) of frames not in `existing`.

    Files that the index vouches for are not read when their frames are known: `groups` tells the frame of a
    group of small files (`groups_of` an earlier manifest). Content digests go into the index under
    `index_prefix`. After `deadline` (time.monotonic) no further frame is begun. Raises what `sink` raises.
    """
    started = now()  # what changed shortly before may change again while it is read
    written = Written()
    packer = _Packer(sink, written)
    names: dict[tuple[int, int], bytes] = {}
    links: dict[bytes, bytes] = {}
    files: list[Found] = []
    for item in found:
        if item.kind != "file":
            continue
        if item.links > 1:
            first = names.setdefault((item.signature.device, item.signature.inode), item.path)
            if first != item.path:
                links[item.path] = first
                continue
        files.append(item)

    numbers: dict[bytes, int] = {}
    pieces: list[list[int]] = [[] for _ in files]
    digests: list[list[bytes]] = [[] for _ in files]
    trusted = [index.digests(index_prefix + item.path, item.signature) for item in files]
    changed: set[int] = set()
    packed: set[bytes] = set()

    def account(spans: Sequence[Span], digest: bytes, length: int, member_digests: Sequence[bytes]) -> None:
        number = numbers.setdefault(digest, len(numbers))
        if number == len(written.frames):
            written.frames.append(Frame(digest, length))
        offset = 0
        for span, member in zip(spans, member_digests):
            pieces[span.file].extend((number, offset, span.length))
            digests[span.file].append(member)
            offset += span.length
        progress.advance(length)

    def collect(spans: Sequence[Span], job: _Job) -> None:
        changed.update(job.changed)
        if job.stored is not None and job.digest not in packed:
            packed.add(job.digest)
            packer.add(job.digest, job.codec, job.stored, job.stored_digest)
        account(spans, job.digest, job.length, job.members)

    def vouched(spans: Sequence[Span]) -> tuple[bytes, list[bytes]] | None:
        """The frame's digest and its members', if the index and the store make reading needless."""
        known = [trusted[span.file] for span in spans]
        if not all(known):
            return None
        if files[spans[0].file].signature.size >= LARGE_FILE:
            [whole], number = known, spans[0].offset // frames.PIECE
            assert whole is not None
            digest: bytes | None = whole[32 * number : 32 * number + 32]
            members_known = [digest or b""]
        else:
            members_known = [member for member in known if member]
            digest = groups.get(frames.group_digest(members_known))
        return (digest, members_known) if digest in existing and digest else None

    def read(spans: Sequence[Span]) -> _Job:
        parts: list[bytes] = []
        torn: set[int] = set()
        for span in spans:
            part = b""
            with contextlib.suppress(OSError):
                part = _read_span(base, files[span.file], span)
            if len(part) != span.length:
                torn.add(span.file)
                part = part.ljust(span.length, b"\0")[: span.length]
            parts.append(part)
        raw = parts[0] if len(parts) == 1 else b"".join(parts)
        digest = frames.ZEROS if raw is _HOLE else frames.digest_of(raw)
        member_digests = [digest] if len(spans) == 1 else [frames.digest_of(part) for part in parts]
        if digest in existing or digest in packed:
            return _Job(digest, len(raw), member_digests, 0, None, b"", torn)
        codec, stored = frames.compress(raw, level)
        stored_digest = digest if codec == frames.RAW else frames.digest_of(stored)
        return _Job(digest, len(raw), member_digests, codec, stored, stored_digest, torn)

    late: set[int] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix="frames") as pool:
        jobs: deque[tuple[list[Span], Future[_Job]]] = deque()
        cut = frames.cut([(item.path, item.signature.size) for item in files])
        if deadline is not None:  # the many small files first, whatever becomes of the large ones
            cut = iter(sorted(cut, key=lambda spans: files[spans[0].file].signature.size >= LARGE_FILE))
        for spans in cut:
            if deadline is not None and time.monotonic() >= deadline:
                late.update(span.file for span in spans)
                continue
            ready = vouched(spans)
            if ready is not None:
                # In order behind the jobs before it: frames are numbered as the files come.
                _drain(jobs, collect)
                account(spans, ready[0], sum(span.length for span in spans), ready[1])
                continue
            jobs.append((spans, pool.submit(read, spans)))
            if len(jobs) > threads:
                collect(*_done(jobs.popleft()))
        _drain(jobs, collect)
    packer.flush()

    for frame in written.frames:
        if frame.digest not in written.placed:
            written.placed[frame.digest] = existing[frame.digest]
    torn = {files[number].path for number in changed}
    unfinished = {files[number].path for number in late - changed}
    for link, first in links.items():
        for left_out in (torn, unfinished):
            if first in left_out:
                left_out.add(link)
    written.changed, written.unfinished = sorted(torn), sorted(unfinished)
    contents: dict[bytes, tuple[File, bytes]] = {}
    for number, item in enumerate(files):
        if item.path not in torn and item.path not in unfinished:
            large = item.signature.size >= LARGE_FILE
            content = b"".join(digests[number]) or frames.digest_of(b"")
            entry = File(
                item.path, item.mode, item.signature.mtime, item.signature.size,
                b"" if large else content, tuple(pieces[number]),
            )  # fmt: skip
            contents[item.path] = entry, content
    for item in found:
        for made, content in _entry(item, base, contents, links):
            written.entries.append(made)
            if index.digests(index_prefix + item.path, item.signature) is None:
                index.add(index_prefix + item.path, item.signature, (content, item.mode), seen=started)
    return written


def _done(job: tuple[list[Span], Future[_Job]]) -> tuple[list[Span], _Job]:
    return job[0], job[1].result()


def _drain(jobs: deque[tuple[list[Span], Future[_Job]]], collect: Callable[[list[Span], _Job], None]) -> None:
    while jobs:
        collect(*_done(jobs.popleft()))


def _read_span(base: bytes, item: Found, span: Span) -> bytes:
    """The bytes of a span (_HOLE for a piece that is one), or fewer where the file is no longer the one that was scanned."""
    descriptor = os.open(os.path.join(base, item.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        is_hole = span.length == frames.PIECE and _is_hole(descriptor, span)
        part = _HOLE if is_hole else os.pread(descriptor, span.length, span.offset)
        return part if signature_of(os.fstat(descriptor)) == item.signature else b""
    finally:
        os.close(descriptor)


def _is_hole(descriptor: int, span: Span) -> bool:
    """Whether nothing was ever written there (lseek(2), SEEK_DATA)."""
    try:
        return os.lseek(descriptor, span.offset, os.SEEK_DATA) >= span.offset + span.length
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing from there to the end


def _entry(
    item: Found,
    base: bytes,
    contents: Mapping[bytes, tuple[File, bytes]],
    links: Mapping[bytes, bytes],
) -> Iterator[tuple[Entry, bytes]]:
    """The entry for a path with what it contains, as the index keeps it; none for what was left out or is gone."""
    if item.kind == "directory":
        yield Directory(item.path, item.mode, item.signature.mtime), b""
    elif item.kind == "symlink":
        with contextlib.suppress(OSError):
            target = os.readlink(os.path.join(base, item.path))
            yield Symlink(item.path, item.signature.mtime, target), target
    elif item.path in contents:
        yield contents[item.path]
    elif links.get(item.path) in contents:
        yield Hardlink(item.path, links[item.path]), contents[links[item.path]][1]


def placement_of(
    manifest_digest: str, manifest_frames: Sequence[Frame], placed: Mapping[bytes, Placed]
) -> Placement:
    """The placement of a manifest's frames."""
    packs: dict[str, int] = {}
    places = []
    for frame in manifest_frames:
        at = placed[frame.digest]
        number = packs.setdefault(at.pack, len(packs))
        places.append(Place(number, at.offset, at.length, at.codec, at.digest))
    return Placement(
        manifest=bytes.fromhex(manifest_digest),
        packs=tuple(packs),
        frames=tuple(manifest_frames),
        places=tuple(places),
    )


def placed_by(placement: Placement) -> dict[bytes, Placed]:
    """The frames of a placement by their digests."""
    return {
        frame.digest: Placed(
            placement.packs[place.pack], place.offset, place.length, place.codec, place.digest
        )
        for frame, place in zip(placement.frames, placement.places)
    }
