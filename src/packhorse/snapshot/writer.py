"""Files → frames → packs: reads a scanned tree and hands what the store lacks to a sink, pack by pack.

Promises bounded memory whatever the size, entries in the order of their paths, and that a file which changed
while it was read, or was not read in time, is named and left out. Knows no network.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from packhorse.errors import PackhorseError
from packhorse.progress import Progress
from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import LARGE_FILE, Cut, Span
from packhorse.snapshot.gpu import Gathered
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
from packhorse.snapshot.scan import Found, readable, signature_of
from packhorse.watch import processors
from packhorse.watch.memory import keep_freed

NONCE = 32
"""Random bytes at the end of a pack, a frame that no manifest uses, give it a name that no other has."""
PACK = 8 << 20
"""A pack is closed when it holds this many bytes; one is filled while another is on its way."""


Sink: TypeAlias = Callable[[str, Sequence[frames.Bytes]], None]
"""Takes a full pack: its name, and the stored frames that make its content one after the other."""


_HOLE = bytes(frames.PIECE)
_LAYOUT = b"+"
"""Stands in what a large file contains before the digest that tells how it is cut; a plain cut has none."""
_THREADS_MOST = 6
"""Each holds a frame as it was read and as it is stored."""


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


_NOTHING = Before()


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
    stored: frames.Bytes | None
    stored_digest: bytes
    changed: set[int]


def content_of(file: File, manifest_frames: Sequence[Frame]) -> bytes:
    """What a file contains, as the index keeps it: its digest, or the digests of its frames if it is large.

    Two large files can be told to be equal by this only if they are cut alike, see `cut_alike`.
    """
    if file.size < LARGE_FILE:
        return file.digest
    return _content(
        [(manifest_frames[frame], offset, length) for frame, offset, length in triples(file.pieces)]
    )


def _content(runs: Sequence[tuple[Frame, int, int]]) -> bytes:
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
        (_is_plain(content) and _is_plain(other)) or content[-32:] == other[-32:]
    )


def _is_plain(content: bytes) -> bool:
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


def content_on_disk(
    path: bytes, size: int, like: File | None = None, holes: Mapping[int, bytes] | None = None
) -> bytes:
    """The same for a file on disk that should have `size` bytes, cut as `like` is: by default as a writer cuts it.

    Frames of `like` that are `holes` (number → digest) are not read. Raises OSError where it cannot be read.
    """
    if size < LARGE_FILE:
        with open(path, "rb") as file:
            return frames.digest_of(file.read(LARGE_FILE))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        cut = (
            [(-1, gathered) for gathered in gpu.pieces(gpu.extents(descriptor, size), frames.PIECE)]
            if like is None
            else _gathered(like)
        )
        runs: list[tuple[int, Frame, int, int]] = []
        for number, gathered in cut:
            if holes and number in holes:
                digest = holes[number]
            elif _is_hole(descriptor, gathered.runs):
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
        return _content([(frame, offset, length) for _, frame, offset, length in runs])
    finally:
        os.close(descriptor)


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

    Files that the index vouches for are not read when their frames are known, by what an earlier manifest tells
    (`before`). Content digests go into the index under `index_prefix`. `threads` read and compress, by default as
    many as there are processors. After `deadline` (time.monotonic) no further frame is begun. No pack gets a name that is
    `taken`. Frames with the digests `holes` are not on this disk. Raises what `sink` raises, and PackhorseError where one
    of those has to be read.
    """
    started = now()  # what changed shortly before may change again while it is read
    written = Written()
    packer = _Packer(sink, written, taken)
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
    pieces: list[list[tuple[int, int, int, int]]] = [[] for _ in files]  # offset, frame, offset in it, length
    digests = [frames.digest_of(b"")] * len(files)  # of small files
    trusted = [index.digests(index_prefix + item.path, item.signature) for item in files]
    changed: set[int] = set()
    packed: set[bytes] = set()

    def gathered(number: int) -> list[Gathered]:
        """How a large file is cut: as it was, if the index vouches that it did not change."""
        item = files[number]
        content, known = before.pieces.get(item.path, (b"", []))
        if known and content == trusted[number]:
            return known
        if trusted[number] is not None and _is_plain(trusted[number] or b""):
            return gpu.pieces([gpu.Extent(0, item.signature.size, "")], frames.PIECE)
        try:
            with _opened(base, item) as descriptor:
                return gpu.pieces(gpu.extents(descriptor, item.signature.size), frames.PIECE)
        except OSError:
            return gpu.pieces([gpu.Extent(0, item.signature.size, "")], frames.PIECE)

    def account(cut: Cut, digest: bytes, length: int, member_digests: Sequence[bytes]) -> None:
        number = numbers.setdefault(digest, len(numbers))
        if number == len(written.frames):
            written.frames.append(Frame(digest, length, cut.gpus))
        elif written.frames[number].gpus != cut.gpus:  # equal bytes that different GPUs need: all do
            written.frames[number] = Frame(digest, length)
        offset = 0
        for span in cut.spans:
            pieces[span.file].append((span.offset, number, offset, span.length))
            offset += span.length
        for file, member in zip(dict.fromkeys(span.file for span in cut.spans), member_digests):
            digests[file] = member
        progress.advance(length)

    def collect(cut: Cut, job: _Job) -> None:
        changed.update(job.changed)
        if job.stored is not None and job.digest not in packed:
            packed.add(job.digest)
            packer.add(job.digest, job.codec, job.stored, job.stored_digest)
        account(cut, job.digest, job.length, job.members)

    def vouched(cut: Cut) -> tuple[bytes, list[bytes]] | None:
        """The frame's digest and its members', if the index and the store make reading needless."""
        if files[cut.spans[0].file].signature.size >= LARGE_FILE:
            file = cut.spans[0].file
            known = [trusted[file]]
            nth[file] = nth.get(file, -1) + 1
            digest: bytes | None = (known[0] or b"")[32 * nth[file] : 32 * nth[file] + 32]
            members_known = [digest or b""]
        else:
            known = [trusted[span.file] for span in cut.spans]
            members_known = [member or b"" for member in known]
            digest = before.groups.get(frames.group_digest(members_known))
        if digest in holes and digest not in existing:
            raise PackhorseError(
                f"{readable(files[cut.spans[0].file].path)} lacks code for other GPUs, and the store does not have it either.",
                "Run `packhorse pull` with the store that has it first.",
            )
        return (digest, members_known) if all(known) and digest and digest in existing else None

    def read(cut: Cut) -> _Job:
        raw, parts, torn = _read(base, files, cut.spans)
        digest = frames.ZEROS if raw is _HOLE else frames.digest_of(raw)
        member_digests = [digest] if len(parts) == 1 else [frames.digest_of(part) for part in parts]
        if digest in existing or digest in packed:
            return _Job(digest, len(raw), member_digests, 0, None, b"", torn)
        codec, stored = frames.compress(raw, level)
        stored_digest = digest if codec == frames.RAW else frames.digest_of(stored)
        return _Job(digest, len(raw), member_digests, codec, stored, stored_digest, torn)

    nth: dict[int, int] = {}
    late: set[int] = set()
    keep_freed()
    threads = threads or min(processors.usable(), _THREADS_MOST)
    with ThreadPoolExecutor(threads, thread_name_prefix="frames") as pool:
        jobs: deque[tuple[Cut, Future[_Job]]] = deque()
        cuts = frames.cut([(item.path, item.signature.size) for item in files], gathered)
        if deadline is not None:  # the many small files first, whatever becomes of the large ones
            cuts = iter(sorted(cuts, key=lambda cut: files[cut.spans[0].file].signature.size >= LARGE_FILE))
        for cut in cuts:
            if deadline is not None and time.monotonic() >= deadline:
                late.update(span.file for span in cut.spans)
                continue
            ready = vouched(cut)
            if ready is not None:
                # In order behind the jobs before it: frames are numbered as the files come.
                _drain(jobs, collect)
                account(cut, ready[0], cut.length, ready[1])
                continue
            jobs.append((cut, pool.submit(read, cut)))
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
            runs = sorted(pieces[number])
            content = (
                _content([(written.frames[frame], offset, length) for _, frame, offset, length in runs])
                if large
                else digests[number]
            )
            entry = File(
                item.path, item.mode, item.signature.mtime, item.signature.size,
                b"" if large else content, tuple(part for _, *piece in runs for part in piece),
            )  # fmt: skip
            contents[item.path] = entry, content
    for item in found:
        for made, content in _entry(item, base, contents, links):
            written.entries.append(made)
            if index.digests(index_prefix + item.path, item.signature) is None:
                index.add(index_prefix + item.path, item.signature, (content, item.mode), seen=started)
    return written


def _done(job: tuple[Cut, Future[_Job]]) -> tuple[Cut, _Job]:
    return job[0], job[1].result()


def _drain(jobs: deque[tuple[Cut, Future[_Job]]], collect: Callable[[Cut, _Job], None]) -> None:
    while jobs:
        collect(*_done(jobs.popleft()))


@contextlib.contextmanager
def _opened(base: bytes, item: Found) -> Iterator[int]:
    """The file that was scanned, open for reading."""
    descriptor = os.open(os.path.join(base, item.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read(
    base: bytes, files: Sequence[Found], spans: Sequence[Span]
) -> tuple[frames.Bytes, list[frames.Bytes], set[int]]:
    """The bytes of a frame (_HOLE for a whole piece that is a hole), those of each file, and which files are no
    longer those that were scanned."""
    parts: list[frames.Bytes] = []
    torn: set[int] = set()
    for file, its in itertools.groupby(spans, key=lambda span: span.file):
        runs = [(span.offset, span.length) for span in its]
        part: frames.Bytes = b""
        with contextlib.suppress(OSError), _opened(base, files[file]) as descriptor:
            if _is_hole(descriptor, runs):
                part = _HOLE
            elif len(runs) == 1:
                part = os.pread(descriptor, runs[0][1], runs[0][0])
            else:
                part = b"".join(os.pread(descriptor, length, offset) for offset, length in runs)
            if signature_of(os.fstat(descriptor)) != files[file].signature:
                part = b""
        length = sum(length for _, length in runs)
        if len(part) != length:
            torn.add(file)
            part = bytes(part).ljust(length, b"\0")[:length]
        parts.append(part)
    return (parts[0] if len(parts) == 1 else b"".join(parts)), parts, torn


def _is_hole(descriptor: int, runs: Sequence[tuple[int, int]]) -> bool:
    """Whether this is one whole piece, and nothing was ever written there (lseek(2), SEEK_DATA)."""
    [offset, length], more = runs[0], runs[1:]
    if more or length != frames.PIECE:
        return False
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA) >= offset + length
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
