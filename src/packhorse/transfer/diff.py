"""Diff: what changed between two snapshots, or between one and the root, and what the change costs to fetch.

Promises to change nothing. Compares manifests; of the content it reads only the RECORD files (PyPA, "Recording
installed projects") of the distributions that changed, to tell which file belongs to which.
"""

from __future__ import annotations

import contextlib
import csv
import os
import posixpath
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from packaging.utils import canonicalize_name

from packhorse.config import TAG
from packhorse.errors import MEND, IntegrityError, NoSuchSnapshotError
from packhorse.progress import Progress
from packhorse.root import SHARED
from packhorse.snapshot import frames
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.contents import open_scanned
from packhorse.snapshot.holes import cold
from packhorse.snapshot.manifest import Directory, File, Hardlink, Manifest, triples
from packhorse.snapshot.scan import Found, readable, scan
from packhorse.snapshot.writer import Placed, placed_by
from packhorse.store import tags
from packhorse.store.objects import NotFoundError, Store, side_by_side
from packhorse.store.tags import SnapshotFacts
from packhorse.transfer.local import PACKAGES, Local
from packhorse.transfer.setup import Setup
from packhorse.transfer.union import Winner, union

_INFO = re.compile(rb"(?P<name>[^/]+?)-(?P<version>[^/-]+)\.dist-info")
_BYTECODE = re.compile(rb"((?:.*/)?)__pycache__/([^/]+?)\.[^/.]+(?:\.opt-[^/.]+)?\.pyc")


class Side(msgspec.Struct):
    """One of the two that are compared. `bytes` are file sizes."""

    name: str
    """As it was asked for: a snapshot's id, a tag, or the path of the root."""
    snapshot: str
    """Its id; "" for the root."""
    soabi: str = ""
    platform: str = ""
    files: int = 0
    bytes: int = 0


class Change(msgspec.Struct):
    """Files that differ between A and B: numbers of those added, removed and changed in content or mode."""

    added: int = 0
    removed: int = 0
    changed: int = 0
    bytes: int = 0
    """The sizes in B of what was added or changed."""
    disk_bytes: int = 0
    """By how much the sizes grew from A to B; negative where they shrank."""


class DistributionChange(Change, kw_only=True):
    """The same for a distribution in `packages/`; a version is "" on the side that has none."""

    name: str
    old: str = ""
    new: str = ""


class PathChange(Change, kw_only=True):
    """The same for all that lies below `path`, which belongs to no distribution."""

    path: str


class Difference(msgspec.Struct):
    """All that differs from A to B."""

    a: Side
    b: Side
    distributions: list[DistributionChange]
    paths: list[PathChange]
    disk_bytes: int
    fetch_bytes: int | None
    """Stored bytes that a pull of B fetches where A was restored; None where B is the root."""
    whole_bytes: int | None
    """The same where nothing was restored."""
    transferred_bytes: int
    """What was fetched of packs to tell files apart."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.distributions or self.paths)


@dataclass(frozen=True)
class _Item:
    """A file or symbolic link as it is compared."""

    content: bytes
    mode: int
    size: int
    mtime: int


@dataclass
class _Content:
    """What one side holds: paths relative to the root."""

    side: Side
    items: dict[bytes, _Item]
    read: Callable[[Sequence[bytes]], dict[bytes, bytes]]
    """The bytes of files, by path, of those that can be read."""
    fetched: int = 0
    needs: Callable[[Mapping[bytes, _Item]], int] | None = None
    """The stored bytes that a root which holds other items has to fetch."""
    distributions: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    """Name and version by the path of their .dist-info directory."""

    def count(self) -> _Content:
        """Fill in what follows from the items."""
        self.side.files = len(self.items)
        self.side.bytes = sum(item.size for item in self.items.values())
        for path in self.items:
            info = path.split(b"/")[1] if path.startswith(PACKAGES) else b""
            if match := _INFO.fullmatch(info):
                name, version = readable(match["name"]), readable(match["version"])
                self.distributions[PACKAGES + info] = str(canonicalize_name(name)), version
        return self


def diff(setup: Setup, first: str, second: str, progress: Progress) -> Difference:
    """What changed from `first` to `second`: snapshots (an id or at least eight digits of it) or tags; "" as the
    second is what the root holds now.

    A tag means its newest packages, whatever they were made of, and its shared directories. Raises
    NoSuchSnapshotError, IntegrityError, StorageError.
    """
    a = _stored(setup.store, first)
    b = _stored(setup.store, second) if second else _root(setup, progress)
    changed = {
        path
        for path in a.items.keys() | b.items.keys()
        if (one := a.items.get(path)) is None
        or (other := b.items.get(path)) is None
        or (one.content, one.mode) != (other.content, other.mode)
    }
    distributions, paths = _grouped(a, b, changed)
    return Difference(
        a=a.side,
        b=b.side,
        distributions=distributions,
        paths=paths,
        disk_bytes=b.side.bytes - a.side.bytes,
        fetch_bytes=b.needs(a.items) if b.needs else None,
        whole_bytes=b.needs({}) if b.needs else None,
        transferred_bytes=a.fetched + b.fetched,
    )


# --- the two sides ---


def _named(store: Store, name: str) -> SnapshotFacts:
    """A tag's snapshot, or the one with this id. A tag comes first: its name was chosen, an id's digits were not."""
    if re.fullmatch(TAG, name):
        entries = tags.read_tag(store, name)
        if entries:
            packages = next((entry for entry in entries if entry.part == "packages"), None)
            return tags.snapshot_of(packages, tags.shared_of(entries))
    if re.fullmatch(r"[0-9A-Fa-f]{8,64}", name):
        return tags.read_snapshot(store, name)
    raise NoSuchSnapshotError(
        f"There is no tag `{name}` in {store.url}, and a snapshot's id has 8 to 64 hexadecimal digits.",
        "`packhorse snapshots` lists both.",
    )


def _stored(store: Store, name: str) -> _Content:
    snapshot = _named(store, name)
    side = Side(name, snapshot.id)
    manifests: dict[str, Manifest] = {}
    winners: dict[bytes, Winner] = {}
    if snapshot.packages:
        manifest = manifests[snapshot.packages] = documents.decode_manifest(
            tags.get_manifest(store, snapshot.packages), "packages"
        )
        side.soabi, side.platform = manifest.soabi, manifest.platform
        for path, winner in union([("", snapshot.packages, manifest)]).items():
            winners[PACKAGES + path] = winner
    for _, digest in snapshot.shared:
        manifests[digest] = documents.decode_manifest(tags.get_manifest(store, digest), "shared")
    winners |= union((stamp, digest, manifests[digest]) for stamp, digest in snapshot.shared)
    sizes = {
        (digest, entry.path): entry.size
        for digest, manifest in manifests.items()
        for entry in manifest.entries
        if isinstance(entry, File)
    }
    items = {
        path: _Item(
            winner.content,
            winner.mode,
            sizes.get((winner.digest, _file_of(winner)), 0),
            winner.mtime,
        )
        for path, winner in winners.items()
        if not isinstance(winner.entry, Directory)
    }
    placed: dict[bytes, Placed] = {}

    def places() -> dict[bytes, Placed]:
        if not placed:
            for digest, manifest in manifests.items():
                placed.update(placed_by(tags.get_placement(store, manifest, digest)))
        return placed

    def read(paths: Sequence[bytes]) -> dict[bytes, bytes]:
        chosen = {path: winners[path] for path in paths}
        content, fetched = _read(store, manifests, chosen, places())
        found.fetched += fetched
        return content

    def needs(there: Mapping[bytes, _Item]) -> int:
        return _needed(manifests, winners, items, there, places())

    found = _Content(side, items, read, needs=needs)
    return found.count()


def _file_of(winner: Winner) -> bytes:
    """The path, in its manifest, of the file that a winner is, or is a name of."""
    return winner.entry.target if isinstance(winner.entry, Hardlink) else winner.entry.path


def _at_root(path: bytes, winner: Winner) -> bytes:
    """The path, relative to the root, of the file that the winner for `path` is, or is a name of."""
    return (PACKAGES if path.startswith(PACKAGES) else b"") + _file_of(winner)


def _root(setup: Setup, progress: Progress) -> _Content:
    root = setup.root
    state = root.state()
    local = Local(root)
    side = Side(str(root.path), "", state.soabi, state.platform)

    # What packages/ lacks is taken for what the manifest has there.
    manifest = local.cached(state.manifest, "packages") if local.holes else None
    sparse = union([("", state.manifest, manifest)]) if manifest else {}
    holes = (
        {number: manifest.frames[number].digest for number in cold(manifest, state.gpus)} if manifest else {}
    )

    def item_of(found: Found, prefix: bytes) -> _Item:
        winner = sparse.get(found.path) if prefix else None
        # What cannot be read, or changes while it is, differs from everything.
        content = (
            local.content(found, prefix, expected=winner.content, like=winner.file, holes=holes)
            if winner
            else local.content(found, prefix)
        )
        size = found.signature.size if found.kind == "file" else 0
        progress.advance(found.signature.size)
        return _Item(b"unreadable" if content is None else content, found.mode, size, found.signature.mtime)

    shared = scan(local.base, [name.encode() for name in SHARED], exclude=setup.config.run.exclude)
    files = [
        (prefix, found)
        for prefix, listing in ((PACKAGES, local.packages()), (b"", shared))
        for found in listing
        if found.kind != "directory"
    ]
    progress.stage("comparing the root", sum(found.signature.size for _, found in files))
    items = {prefix + found.path: item_of(found, prefix) for prefix, found in files}

    def read(paths: Sequence[bytes]) -> dict[bytes, bytes]:
        content = {}
        for path in paths:
            # One that cannot be read, or is gone by now, tells nothing.
            with (
                contextlib.suppress(OSError),
                open(open_scanned(os.path.join(local.base, path)), "rb") as file,
            ):
                content[path] = file.read()
        return content

    return _Content(side, items, read).count()


# --- what belongs together ---


def _grouped(
    a: _Content, b: _Content, changed: set[bytes]
) -> tuple[list[DistributionChange], list[PathChange]]:
    owners = _owners(a, b, changed)
    by_name: dict[str, DistributionChange] = {}
    by_path: dict[str, PathChange] = {}
    versions = [dict(content.distributions.values()) for content in (a, b)]
    for name in versions[0].keys() | versions[1].keys():
        old, new = (each.get(name, "") for each in versions)
        if old != new:
            by_name[name] = DistributionChange(name=name, old=old, new=new)
    for path in changed:
        owner = owners.get(path)
        change: Change
        if owner is not None:
            old, new = (each.get(owner, "") for each in versions)
            change = by_name.setdefault(owner, DistributionChange(name=owner, old=old, new=new))
        else:
            top = readable(b"/".join(path.split(b"/")[:2]))
            change = by_path.setdefault(top, PathChange(path=top))
        one, other = a.items.get(path), b.items.get(path)
        change.added += one is None
        change.removed += other is None
        change.changed += one is not None and other is not None
        change.bytes += other.size if other is not None else 0
        change.disk_bytes += (other.size if other else 0) - (one.size if one else 0)
    return (
        sorted(by_name.values(), key=lambda each: each.name),
        sorted(by_path.values(), key=lambda each: each.path),
    )


def _owners(a: _Content, b: _Content, changed: Collection[bytes]) -> dict[bytes, str]:
    """The distribution that each changed path of `packages/` belongs to, as far as a RECORD names it.

    Read first are the RECORDs that differ; the others only where a path is named in none of those, since one
    costs the frame of 1 to 4 MiB that it shares with its neighbours. Of these come first the ones of distributions
    that are called as the directories in which such paths lie.
    """
    missing = {path for path in changed if path.startswith(PACKAGES)}
    owners: dict[bytes, str] = {}

    def settle(content: _Content, records: Mapping[bytes, str]) -> None:
        named = {
            path: records[record]
            for record, text in content.read(sorted(records)).items()
            for path in _recorded(text)
        }
        for path in list(missing):
            info = content.distributions.get(b"/".join(path.split(b"/")[:2]))
            owner = info[0] if info else named.get(path) or named.get(_source(path))
            if owner is not None:
                owners[path] = owner
                missing.discard(path)

    for content, differing, likely in ((b, True, None), (a, True, None), (b, False, True), (b, False, False)):
        if missing:
            tops = {readable(_source(path).split(b"/")[1]) for path in missing}
            called = {str(canonicalize_name(top.removesuffix(".py"))) for top in tops}
            records = {
                record: name
                for info, (name, _) in content.distributions.items()
                if (record := info + b"/RECORD") in content.items
                and (record in changed) == differing
                and likely in (None, name in called)
            }
            settle(content, records)
    return owners


def _recorded(text: bytes) -> list[bytes]:
    """The paths in a RECORD, as they lie in the root; none where it is no such file.

    pip writes those outside of site-packages, such as commands, as relative to where it would have put that, and moves
    them to the top.
    """
    paths = []
    try:
        for row in csv.reader(text.decode(errors="surrogateescape").splitlines()):
            if row and not row[0].startswith("/"):
                path = posixpath.normpath(row[0])
                while path.startswith("../"):
                    path = path[3:]
                paths.append(PACKAGES + path.encode(errors="surrogateescape"))
    except csv.Error:  # a field longer than any path, or a NUL
        return []
    return paths


def _source(path: bytes) -> bytes:
    """The source file that bytecode was compiled from (PEP 3147); the path itself for anything else."""
    match = _BYTECODE.fullmatch(path)
    return match[1] + match[2] + b".py" if match else path


# --- frames ---


def _needed(
    manifests: Mapping[str, Manifest],
    winners: Mapping[bytes, Winner],
    items: Mapping[bytes, _Item],
    there: Mapping[bytes, _Item],
    placed: Mapping[bytes, Placed],
) -> int:
    """The stored bytes of all frames that hold something of a file which is not `there`, as a pull decides it:
    files of packages also by their time, the others by content."""
    wanted: set[bytes] = set()
    files = {
        (digest, entry.path): entry
        for digest, manifest in manifests.items()
        for entry in manifest.entries
        if isinstance(entry, File)
    }
    for path, item in items.items():
        other, winner = there.get(path), winners[path]
        if other is not None and other.content == item.content:
            timed = path.startswith(PACKAGES) and (other.mode, other.mtime) != (item.mode, item.mtime)
            if not timed:
                continue
        if isinstance(winner.entry, Hardlink):
            target = winners.get(_at_root(path, winner))
            if target is not None and target.digest == winner.digest:
                continue  # linked to its file, which is looked at by itself
        file = files.get((winner.digest, _file_of(winner)))
        if file is not None:
            manifest = manifests[winner.digest]
            wanted |= {
                frame.digest
                for number, _, _ in triples(file.pieces)
                if (frame := manifest.frames[number]).digest != frames.ZEROS or file.size < frames.LARGE_FILE
            }
    return sum(placed[digest].length for digest in wanted)


def _read(
    store: Store,
    manifests: Mapping[str, Manifest],
    chosen: Mapping[bytes, Winner],
    placed: Mapping[bytes, Placed],
) -> tuple[dict[bytes, bytes], int]:
    """The bytes of stored files, and how many bytes were fetched for them. Each frame is fetched once and proven.

    Of a frame is kept what these files have there: in memory are their bytes, and a whole frame for each thread.
    """
    lengths: dict[bytes, int] = {}
    wanted: dict[bytes, list[tuple[bytes, int, int, int]]] = {}
    """By frame: the file's path, where in it, where in the frame, and how many bytes."""
    content: dict[bytes, bytearray] = {}
    for path, winner in chosen.items():
        if isinstance(winner.entry, File):
            position = 0
            for number, offset, length in triples(winner.entry.pieces):
                frame = manifests[winner.digest].frames[number]
                lengths[frame.digest] = frame.length
                wanted.setdefault(frame.digest, []).append((path, position, offset, length))
                position += length
            content[path] = bytearray(position)

    def bring(digest: bytes) -> None:
        at = placed[digest]
        try:
            [stored] = store.ranges(f"packs/{at.pack}", [(at.offset, at.length)])
        except NotFoundError as error:
            raise IntegrityError(f"The pack {at.pack[:12]} is missing from the store.", MEND) from error
        raw = b"".join(frames.decompress(stored, at.codec, at.digest, digest, lengths[digest]))
        for path, position, offset, length in wanted[digest]:
            content[path][position : position + length] = raw[offset : offset + length]

    side_by_side(bring, list(wanted))
    return {path: bytes(each) for path, each in content.items()}, sum(
        placed[digest].length for digest in wanted
    )
