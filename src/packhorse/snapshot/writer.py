"""Files → frames → packs: reads a scanned tree and hands what the store lacks to a sink, pack by pack.

Promises bounded memory whatever the size, entries in the order of their paths, and that a file which changed
while it was read, or was not read in time, is named and left out. Knows no network.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import threading
import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeAlias

from packhorse.errors import PackhorseError
from packhorse.progress import Progress
from packhorse.snapshot import frames, gpu, source
from packhorse.snapshot.contents import Before, content_of_runs, is_plain
from packhorse.snapshot.frames import LARGE_FILE, MEDIUM_FILE, Cut
from packhorse.snapshot.gpu import Gathered
from packhorse.snapshot.index import Index, Seen, now
from packhorse.snapshot.manifest import (
    Directory,
    Entry,
    File,
    Frame,
    Hardlink,
    Place,
    Placement,
    Symlink,
)
from packhorse.snapshot.scan import Found, readable
from packhorse.watch import processors
from packhorse.watch.memory import allowance, give_back, keep_freed

NONCE = 32
"""Random bytes at the end of a pack, a frame that no manifest uses, give it a name that no other has."""
PACK, PACK_MOST = 8 << 20, 10 << 20
"""A pack is closed when it holds this many bytes, and before a frame that would make more of it than the second number; two
are filled while others are on their way."""
HELD, HELD_DEEP = 56 << 20, 72 << 20
"""Bytes of frames that are read, compressed or wait to be packed, with what that takes, on two processors; at levels
where it is much. Each processor more adds a frame."""


Sink: TypeAlias = Callable[[str, Sequence[frames.Bytes]], None]
"""Takes a full pack: its name, and the stored frames that make its content one after the other."""


_NOTHING = Before()
_THREADS_MOST = 12
_READERS, _LET_IN_AFTER = 2, 0.25
"""Threads that read small files at a time: each system call lets the interpreter's lock go, and more only fight for it. And the
seconds after which one more is let in, since these must be waiting for a slow disk."""


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

    frames: list[Frame] = field(default_factory=list)
    placed: dict[bytes, Placed] = field(default_factory=dict)
    """For every frame, by its digest."""
    changed: list[bytes] = field(default_factory=list)
    """Paths of files and symbolic links that changed while they were read; not among the entries."""
    unfinished: list[bytes] = field(default_factory=list)
    """Paths of files that the deadline left out; not among the entries."""
    stored_bytes: int = 0
    """Bytes handed to the sink."""
    _each: Callable[[], Iterator[tuple[Found, Entry, bytes]]] = lambda: iter(())
    _prefix: bytes = b""
    _started: int = 0
    """When the tree was looked at, as the index counts time."""

    def entries(self) -> Iterator[Entry]:
        """One for each path that was read, in their order. Made anew each time, since they take a lot of memory."""
        for _, entry, _ in self._each():
            yield entry

    def seen(self) -> Iterator[Seen]:
        """The same for the index."""
        for item, _, content in self._each():
            yield Seen(self._prefix + item.path, item.signature, (content, item.mode), self._started)


class _Job(NamedTuple):
    digest: bytes
    length: int
    members: list[bytes]
    codec: int
    stored: frames.Bytes | None
    stored_digest: bytes
    changed: set[int]


class _Packer:
    """Gathers stored frames into packs and hands full packs to the sink."""

    def __init__(self, sink: Sink, written: Written, taken: Collection[str]) -> None:
        self._sink = sink
        self._written = written
        self._taken = taken
        self._begin()

    def _begin(self) -> None:
        self._waiting: list[tuple[bytes, int, frames.Bytes, bytes]] = []
        self._size = 0

    def add(self, digest: bytes, codec: int, stored: frames.Bytes, stored_digest: bytes) -> None:
        if self._size + len(stored) > PACK_MOST:
            self.flush()
        self._waiting.append((digest, codec, stored, stored_digest))
        self._size += len(stored)
        if self._size >= PACK:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        digests = [stored_digest for *_, stored_digest in self._waiting]
        content = [stored for _, _, stored, _ in self._waiting]
        name = frames.group_digest(digests).hex()
        if name in self._taken:
            content.append(nonce := secrets.token_bytes(NONCE))
            name = frames.group_digest([*digests, frames.digest_of(nonce)]).hex()
        offset = 0
        for digest, codec, stored, stored_digest in self._waiting:
            self._written.placed[digest] = Placed(name, offset, len(stored), codec, stored_digest)
            offset += len(stored)
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
    before: Before = _NOTHING,
    progress: Progress,
    level: int = frames.DEFAULT_LEVEL,
    threads: int | None = None,
    deadline: float | None = None,
    taken: Collection[str] = (),
    holes: Collection[bytes] = (),
) -> Written:
    """Read `found` below `base` and hand `sink` the packs (name, content) of frames not in `existing`.

    Files that the index vouches for, under paths with `index_prefix`, are not read when their frames are known, by what an
    earlier manifest tells (`before`). `threads` read and compress, by default as
    many as there are processors, at most 12, and no more than HELD has room for. After `deadline` (time.monotonic) no
    further frame is begun. No pack gets a name that is `taken`. Frames with the digests `holes` are not on this disk.
    Raises what `sink` raises, and PackhorseError where one of those has to be read.
    """
    started = now()  # what changed shortly before may change again while it is read
    files, links = _named_once(found)
    written = Written(_prefix=index_prefix, _started=started)
    # What comes first in a restore lies together, and does not bring along what comes later.
    small, others = _Packer(sink, written, taken), _Packer(sink, written, taken)
    trusted = [index.digests(index_prefix + item.path, item.signature) for item in files]
    writing = _Writing(base, files, trusted, existing, before, holes, level, progress, small, others, written)
    keep_freed()
    threads = threads or min(processors.usable(), _THREADS_MOST)
    with ThreadPoolExecutor(threads, thread_name_prefix="frames") as pool:
        jobs = _Jobs(writing)
        cuts = frames.cut([(item.path, item.signature.size) for item in files], writing.gathered)
        if deadline is not None:  # the many small files first, whatever becomes of the large ones
            cuts = iter(sorted(cuts, key=writing.is_large))
        for cut in cuts:
            if deadline is not None and time.monotonic() >= deadline:
                writing.late.update(span.file for span in cut.spans)
            elif ready := writing.vouched(cut):
                # In order behind the jobs before it: frames are numbered as the files come.
                jobs.collect_all()
                writing.account(cut, ready[0], cut.length, ready[1])
            else:
                jobs.make_room(frames.room(cut.length, level), threads)
                jobs.add(cut, pool.submit(writing.read, cut))
        jobs.collect_all()
    small.flush()
    others.flush()
    give_back()

    for frame in written.frames:
        if frame.digest not in written.placed:
            written.placed[frame.digest] = existing[frame.digest]
    targets = _targets(base, found)
    torn = {files[number].path for number in writing.changed}
    torn.update(item.path for item in found if item.kind == "symlink" and item.path not in targets)
    unfinished = {files[number].path for number in writing.late - writing.changed}
    for link, first in links.items():
        for left_out in (torn, unfinished):
            if first in left_out:
                left_out.add(link)
    written.changed, written.unfinished = sorted(torn), sorted(unfinished)
    written._each = partial(_entries, found, links, targets, writing)
    return written


def _targets(base: bytes, found: Sequence[Found]) -> dict[bytes, bytes]:
    """Where symbolic links point, by their paths, as far as they are still there. Read once, so that the entries and the
    index tell the same."""
    targets: dict[bytes, bytes] = {}
    for item in found:
        if item.kind == "symlink":
            with contextlib.suppress(OSError):
                targets[item.path] = os.readlink(os.path.join(base, item.path))
    return targets


def _named_once(found: Sequence[Found]) -> tuple[list[Found], dict[bytes, bytes]]:
    """The files, each by the first of its names, and for every further name the first one."""
    names: dict[tuple[int, int], bytes] = {}
    links: dict[bytes, bytes] = {}
    files = []
    for item in found:
        if item.kind != "file":
            continue
        if item.links > 1:
            first = names.setdefault(item.signature.identity, item.path)
            if first != item.path:
                links[item.path] = first
                continue
        files.append(item)
    return files, links


@dataclass
class _Writing:
    """Files on their way into frames; they are known by their number in `files`. Only `read` runs in other threads."""

    base: bytes
    files: Sequence[Found]
    trusted: Sequence[bytes | None]
    """What the index vouches for, of each file."""
    existing: Mapping[bytes, Placed]
    before: Before
    holes: Collection[bytes]
    level: int
    progress: Progress
    small: _Packer
    """Takes the frames of small files."""
    others: _Packer
    written: Written
    changed: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        # Of all small files in one piece of memory, since there may be many: the frame of each, where it lies in that,
        # and its digest.
        nothing = bytes(4 * len(self.files))
        self._frame, self._start = array("i", nothing), array("i", nothing)
        self._digests = bytearray(frames.digest_of(b"") * len(self.files))
        self._runs: defaultdict[int, list[tuple[int, int, int, int]]] = defaultdict(list)
        """Of large files: offset, frame, offset in it, length."""
        self._packed: set[bytes] = set()
        self._turn = threading.Semaphore(_READERS)
        self._vouched: Counter[int] = Counter()
        """How many frames of a large file."""

    def is_large(self, cut: Cut) -> bool:
        """Whether it is of a large file."""
        return self.files[cut.spans[0].file].signature.size >= LARGE_FILE

    def gathered(self, number: int) -> list[Gathered]:
        """How a large file is cut: as it was, if the index vouches that it did not change."""
        item, trusted = self.files[number], self.trusted[number]
        content, known = self.before.pieces.get(item.path, (b"", []))
        if known and content == trusted:
            return known
        extents = [gpu.Extent(0, item.signature.size, "")]
        if trusted is None or not is_plain(trusted):
            with contextlib.suppress(OSError), source.opened(self.base, item) as descriptor:
                extents = gpu.extents(descriptor, item.signature.size)
        return gpu.pieces(extents, frames.PIECE)

    def vouched(self, cut: Cut) -> tuple[bytes, list[bytes]] | None:
        """The frame's digest and its members', if the index and the store make reading needless."""
        first = cut.spans[0].file
        digest: bytes | None
        if self.is_large(cut):
            known = [self.trusted[first]]
            start = 32 * self._vouched[first]
            self._vouched[first] += 1
            digest = (known[0] or b"")[start : start + 32]
            members = [digest]
        else:
            known = [self.trusted[span.file] for span in cut.spans]
            members = [member or b"" for member in known]
            digest = self.before.groups.get(frames.group_digest(members))
        if digest in self.holes and digest not in self.existing:
            raise PackhorseError(
                f"{readable(self.files[first].path)} lacks code for other GPUs, and the store does not have it either.",
                "Run `packhorse pull` with the store that has it first.",
            )
        return (digest, members) if all(known) and digest and digest in self.existing else None

    def read(self, cut: Cut) -> _Job:
        """Read a frame, and compress it unless it is there already."""
        with self._reading() if len(cut.spans) > 1 else contextlib.nullcontext():
            raw, parts, torn = source.read(self.base, self.files, cut.spans)
            members = [] if len(parts) == 1 else [frames.digest_of(part) for part in parts]
        digest = frames.ZEROS if raw is source.HOLE else frames.digest_of(raw)
        members = members or [digest]
        if digest in self.existing or digest in self._packed:
            return _Job(digest, len(raw), members, 0, None, b"", torn)
        codec, stored = frames.compress(raw, self.level)
        stored_digest = digest if codec == frames.RAW else frames.digest_of(stored)
        return _Job(digest, len(raw), members, codec, stored, stored_digest, torn)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """A turn among the readers of small files."""
        in_turn = self._turn.acquire(timeout=_LET_IN_AFTER)
        try:
            yield
        finally:
            if in_turn:
                self._turn.release()

    def collect(self, cut: Cut, future: Future[_Job]) -> None:
        """Pack what was read."""
        job = future.result()
        self.changed.update(job.changed)
        if job.stored is not None and job.digest not in self._packed:
            self._packed.add(job.digest)
            small = self.files[cut.spans[0].file].signature.size < MEDIUM_FILE
            packer = self.small if small else self.others
            packer.add(job.digest, job.codec, job.stored, job.stored_digest)
        self.account(cut, job.digest, job.length, job.members)

    def account(self, cut: Cut, digest: bytes, length: int, members: Sequence[bytes]) -> None:
        """Note where the bytes of a cut are: in the frame `digest`; `members` are those of its files."""
        number = self._numbers.setdefault(digest, len(self._numbers))
        known = self.written.frames
        if number == len(known):
            known.append(Frame(digest, length, cut.gpus))
        elif known[number].gpus != cut.gpus:  # equal bytes that different GPUs need: all do
            known[number] = Frame(digest, length)
        offset = 0
        if self.is_large(cut):
            for span in cut.spans:
                self._runs[span.file].append((span.offset, number, offset, span.length))
                offset += span.length
        else:
            for span, member in zip(cut.spans, members):
                self._frame[span.file], self._start[span.file] = number, offset
                self._digests[32 * span.file : 32 * span.file + 32] = member
                offset += span.length
        self.progress.advance(length)

    def entry(self, number: int) -> tuple[File, bytes]:
        """The entry for a file of which all is read, and what it contains."""
        item = self.files[number]
        mtime, size = item.signature.mtime, item.signature.size
        if size < LARGE_FILE:
            digest = bytes(self._digests[32 * number : 32 * number + 32])
            piece = (self._frame[number], self._start[number], size) if size else ()
            return File(item.path, item.mode, mtime, size, digest, piece), digest
        runs = [piece for _, *piece in sorted(self._runs[number])]
        pieces = tuple(part for piece in runs for part in piece)
        content = content_of_runs([(self.written.frames[frame], at, length) for frame, at, length in runs])
        return File(item.path, item.mode, mtime, size, b"", pieces), content


class _Jobs:
    """Frames that are read and compressed in other threads, and collected in their order."""

    def __init__(self, writing: _Writing) -> None:
        self._writing = writing
        frame = frames.room(frames.PIECE, writing.level)
        least = HELD if writing.level < frames.DEEP else HELD_DEEP
        self._most = allowance(least, frame, _THREADS_MOST * frame)
        self._jobs: deque[tuple[Cut, Future[_Job]]] = deque()

    def add(self, cut: Cut, future: Future[_Job]) -> None:
        """One more, the last."""
        self._jobs.append((cut, future))

    def make_room(self, size: int, most: int) -> None:
        """Wait until there are at most `most` unfinished ones, and room for `size` bytes more."""
        while self._jobs and (self._unfinished() > most or self._held() + size > self._most):
            if not self._jobs[0][1].done():
                wait([future for _, future in self._jobs if not future.done()], return_when=FIRST_COMPLETED)
            self._collect_ready()

    def collect_all(self) -> None:
        """Wait for all."""
        while self._jobs:
            self._writing.collect(*self._jobs.popleft())

    def _collect_ready(self) -> None:
        while self._jobs and self._jobs[0][1].done():
            self._writing.collect(*self._jobs.popleft())

    def _unfinished(self) -> int:
        """How many are read and compressed, or wait for that. One that takes long does not keep those behind it from it."""
        return sum(not future.done() for _, future in self._jobs)

    def _held(self) -> int:
        """Bytes that they take now."""
        return sum(
            len(future.result().stored or b"")
            if future.done()
            else frames.room(cut.length, self._writing.level)
            for cut, future in self._jobs
        )


def _entries(
    found: Sequence[Found], links: Mapping[bytes, bytes], targets: Mapping[bytes, bytes], writing: _Writing
) -> Iterator[tuple[Found, Entry, bytes]]:
    """The entry of each path, with what it contains as the index keeps it; none for what was left out or is gone."""
    left_out = writing.changed | writing.late
    several = set(links.values())
    contents: dict[bytes, bytes] = {}
    numbers = itertools.count()  # of files in the order of `found`
    for item in found:
        if item.kind == "directory":
            yield item, Directory(item.path, item.mode, item.signature.mtime), b""
        elif item.kind == "symlink":
            if target := targets.get(item.path):
                yield item, Symlink(item.path, item.signature.mtime, target), target
        elif first := links.get(item.path):
            if first in contents:
                yield item, Hardlink(item.path, first), contents[first]
        elif (number := next(numbers)) not in left_out:
            entry, content = writing.entry(number)
            if item.path in several:
                contents[item.path] = content
            yield item, entry, content


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
