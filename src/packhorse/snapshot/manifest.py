"""The two documents of a snapshot: the manifest (what) and the placement (where), as bytes and back.

Promises that a decoded manifest is safe to restore: relative paths, each below a directory of its own, pieces
that cover their file and lie inside their frames. `docs/reference/format.md` describes both byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec

from packhorse.errors import MEND, UNREADABLE, IntegrityError, PackhorseError
from packhorse.root import SHARED
from packhorse.snapshot.frames import (
    LARGE_FILE,
    LARGEST_FRAME,
    LARGEST_STORED,
    compress_document,
    decompress_document,
    digest_of,
)

FORMAT = 2
"""Of manifests. Format 1 knew no frames for some GPUs only."""
PLACEMENT_FORMAT = 1
MANIFEST_MAGIC = b"packhorse-manifest\n"
DELTA_MAGIC = b"packhorse-manifest-delta\n"
PLACEMENT_MAGIC = b"packhorse-placement\n"
_LARGEST_PACK = 1 << 40
MOST = 1 << 20
"""How many entries, frames, places and so on a document may list: more than fit into one of the largest size if they say
anything. Empty ones would take a hundred times their bytes in memory."""
_LABEL = 256
_LONGEST_HEAD = 5
"""Bytes before the elements of an array in msgpack."""
_WORTH = 8
"""A delta is stored where it is this much shorter than the raw bytes; a whole object is about half as long as those."""
_SHARED = {name.encode() for name in SHARED}
_NO_NAMES = frozenset((b"", b".", b".."))
_D = TypeVar("_D", "Manifest", "Placement")
_T = TypeVar("_T")
_Many: TypeAlias = Annotated[tuple[_T, ...], msgspec.Meta(max_length=MOST)]

PERMISSIONS = 0o777
"""The mode bits that snapshots keep; setuid, setgid and sticky are dropped."""
_Mode: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=PERMISSIONS)]
_Time: TypeAlias = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Directory(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="d"):
    """A directory: path relative to the manifest's base, permission bits, mtime in nanoseconds."""

    path: bytes
    mode: _Mode
    mtime: _Time


class File(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="f"):
    """A regular file.

    `digest` is the BLAKE3 of the content of a small file, and empty for a large one, whose frames hold
    nothing else. `pieces` are triples (frame number, offset in the frame, length) in the order of the file. A frame of
    a large file may hold several of its runs; the first of them lies at the beginning of the frame.
    """

    path: bytes
    mode: _Mode
    mtime: _Time
    size: int
    digest: bytes
    pieces: tuple[int, ...]


class Symlink(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="l"):
    """A symbolic link; its target is kept as it is and never followed."""

    path: bytes
    mtime: _Time
    target: bytes


class Hardlink(msgspec.Struct, frozen=True, array_like=True, gc=False, tag="h"):
    """Another name of the file entry `target`."""

    path: bytes
    target: bytes


Kind: TypeAlias = Literal["packages", "shared"]
Entry: TypeAlias = Directory | File | Symlink | Hardlink


class Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A run of bytes: the BLAKE3 of the raw bytes, their number, and which GPUs need them (see `gpu.needed`)."""

    digest: bytes
    length: int
    gpus: str = ""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot's `packages/` (kind "packages") or a part of its shared directories ("shared") hold.

    Paths are relative to `packages/` or to the root. `soabi`, `platform` and `fingerprint` tell what made the
    packages. A fold keeps for each entry the stamp of the manifest it came from: `stamps[stamped[i]]`.
    """

    format: int = FORMAT
    kind: str
    fingerprint: str = ""
    soabi: str = ""
    platform: str = ""
    frames: _Many[Frame] = ()
    entries: _Many[Entry] = ()
    stamps: _Many[str] = ()
    stamped: _Many[int] = ()

    @property
    def bytes(self) -> int:
        """The sum of the file sizes."""
        return sum(entry.size for entry in self.entries if isinstance(entry, File))

    @property
    def files(self) -> int:
        """The number of entries that are no directories."""
        return sum(not isinstance(entry, Directory) for entry in self.entries)


class _Listed(Manifest, frozen=True, kw_only=True):
    """A manifest with its entries as they are encoded."""

    entries: msgspec.Raw  # type: ignore[assignment]


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a frame lies: number of the pack, offset and stored length there, codec, BLAKE3 of the stored bytes."""

    pack: int
    offset: int
    length: int
    codec: int
    digest: bytes


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where each frame of one manifest lies; `frames` and `places` run in the manifest's order."""

    format: int = PLACEMENT_FORMAT
    manifest: bytes
    packs: _Many[str]
    frames: _Many[Frame]
    places: _Many[Place]


class _Version(msgspec.Struct):
    format: int


# Made when this is imported, by one thread: msgspec (0.22) prepares a type when it first decodes it, and where two threads do
# that at once the process crashes.
_VERSION = msgspec.msgpack.Decoder(_Version)
_MANIFEST = msgspec.msgpack.Decoder(Manifest)
_PLACEMENT = msgspec.msgpack.Decoder(Placement)


class Encoded(NamedTuple):
    """A manifest ready to be stored: its digest in hex and the raw bytes that this is of."""

    digest: str
    raw: bytes

    @property
    def whole(self) -> bytes:
        """The object that stores it by itself."""
        return MANIFEST_MAGIC + compress_document(self.raw)

    def beside(self, base: Encoded) -> bytes:
        """The object that stores what differs from `base`, or the whole where that is not much longer."""
        delta = DELTA_MAGIC + bytes.fromhex(base.digest) + compress_document(self.raw, base.raw)
        return delta if len(delta) < len(self.raw) // _WORTH else self.whole


class Listing:
    """The entries of a manifest as they are encoded, one by one, which takes a third of the memory: `encode` puts them in."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        encoder, self._bytes = msgspec.msgpack.Encoder(), bytearray(_LONGEST_HEAD)
        self.count = self.files = self.bytes = 0
        """How many there are, how many of them are no directories, and the sum of the file sizes."""
        for entry in entries:
            encoder.encode_into(entry, self._bytes, -1)
            self.count += 1
            self.files += not isinstance(entry, Directory)
            self.bytes += entry.size if isinstance(entry, File) else 0

    @property
    def raw(self) -> msgspec.Raw:
        """The array of them."""
        head = msgspec.msgpack.encode([None] * self.count)[: -self.count or None]
        start = _LONGEST_HEAD - len(head)
        self._bytes[start:_LONGEST_HEAD] = head
        return msgspec.Raw(memoryview(self._bytes)[start:])


def encode(manifest: Manifest, entries: Listing | None = None) -> Encoded:
    """A manifest as bytes, with `entries` where they are apart. Raises PackhorseError where no reader would take it."""
    count = len(manifest.entries) if entries is None else entries.count
    if max(count, len(manifest.frames)) > MOST:
        raise PackhorseError(
            f"The list of files has {count:,} entries, more than a snapshot can have.",
            "Keep fewer files in the root: archives of small files are restored faster, too.",
        )
    if entries is not None:
        manifest = _Listed(**{**msgspec.structs.asdict(manifest), "entries": entries.raw})
    raw = msgspec.msgpack.encode(manifest)
    return Encoded(digest_of(raw).hex(), raw)


def base_of(stored: bytes) -> str:
    """The digest of the manifest that this object of another one cannot be read without, or nothing."""
    if not stored.startswith(DELTA_MAGIC):
        return ""
    return stored[len(DELTA_MAGIC) : len(DELTA_MAGIC) + 32].hex()


def raw_manifest(stored: bytes, digest: str, base: Encoded | None = None) -> Encoded:
    """The raw bytes of the manifest `digest`; `base` is what `base_of` names. Raises IntegrityError."""
    if base is None:
        raw = _raw(stored, MANIFEST_MAGIC)
    else:
        raw = decompress_document(stored[len(DELTA_MAGIC) + 32 :], base.raw)
    if digest_of(raw).hex() != digest:
        raise IntegrityError(
            f"The manifest {digest[:12]} does not have the content that its name promises.",
            MEND,
        )
    return Encoded(digest, raw)


def decode_manifest(encoded: Encoded, kind: Kind) -> Manifest:
    """A manifest of `kind` from its proven bytes. Raises IntegrityError where they are not sane."""
    manifest = _decoded(encoded.raw, _MANIFEST, (1, FORMAT))
    if manifest.kind != kind:
        raise _malformed(f"a manifest of {kind} is needed, and this one is of another kind")
    _check(manifest)
    return manifest


def encode_placement(placement: Placement) -> bytes:
    """The object that stores a placement: a magic line and the zstd of its msgpack."""
    return PLACEMENT_MAGIC + compress_document(msgspec.msgpack.encode(placement))


def decode_placement(stored: bytes, manifest: Manifest, digest: str) -> Placement:
    """The placement of the manifest `digest`. Raises IntegrityError where it does not fit."""
    placement = decode_any_placement(stored)
    if placement.manifest.hex() != digest or placement.frames != manifest.frames:
        raise IntegrityError(
            f"A placement of manifest {digest[:12]} belongs to another one.",
            MEND,
        )
    return placement


def decode_any_placement(stored: bytes) -> Placement:
    """A placement by itself, checked for sane numbers only."""
    placement = _decoded(_raw(stored, PLACEMENT_MAGIC), _PLACEMENT, (PLACEMENT_FORMAT,))
    count = len(placement.packs)
    if len(placement.places) != len(placement.frames):
        raise _malformed("a placement has not one place for each frame")
    for place in placement.places:
        if not (
            0 <= place.pack < count
            and 0 <= place.offset < _LARGEST_PACK
            and 0 < place.length <= LARGEST_STORED
            and len(place.digest) == 32
        ):
            raise _malformed("a placement names a place that cannot be")
    for name in placement.packs:
        if not is_digest(name):
            raise _malformed("a placement names a pack that cannot be")
    return placement


def _raw(stored: bytes, magic: bytes) -> bytes:
    if not stored.startswith(magic):
        raise _malformed("a document does not begin with its magic line")
    return decompress_document(stored[len(magic) :])


def _decoded(raw: bytes, decoder: msgspec.msgpack.Decoder[_D], formats: tuple[int, ...]) -> _D:
    try:
        version = _VERSION.decode(raw).format
        if version not in formats:
            raise IntegrityError(
                f"The snapshot is written in format {version}, which this packhorse does not know.",
                "Install a newer packhorse.",
            )
        return decoder.decode(raw)
    except UNREADABLE as error:
        if "of length <=" in str(error):
            raise _malformed(f"a document lists more than {MOST:,} things of a kind") from error
        raise _malformed(f"a document cannot be read ({error})") from error


def _malformed(why: str) -> IntegrityError:
    return IntegrityError(f"The snapshot is malformed: {why}.", MEND)


def _check(manifest: Manifest) -> None:
    """Refuse what a well-meaning writer never writes; a manifest may come from a hostile store."""
    lengths = [frame.length for frame in manifest.frames]
    for frame in manifest.frames:
        if not 0 < frame.length <= LARGEST_FRAME or len(frame.digest) != 32 or len(frame.gpus) > _LABEL:
            raise _malformed("a frame cannot be")
    if manifest.fingerprint and not is_digest(manifest.fingerprint):
        raise _malformed("a fingerprint cannot be")
    if (manifest.stamps or manifest.stamped) and (
        len(manifest.stamped) != len(manifest.entries)
        or any(not 0 <= number < len(manifest.stamps) for number in manifest.stamped)
        or not all(is_stamp(stamp) for stamp in manifest.stamps)
    ):
        raise _malformed("a fold does not say where its entries come from")
    shared = manifest.kind == "shared"
    directories = {b""}
    files: set[bytes] = set()
    previous = b""
    for entry in manifest.entries:
        path = entry.path
        if path <= previous:
            raise _malformed("the paths are not in order")
        previous = path
        parent, below, name = path.rpartition(b"/")
        if parent not in directories or (below and not parent) or name in _NO_NAMES or b"\0" in path:
            raise _malformed("a path leads outside or through something that is no directory")
        if isinstance(entry, File):
            files.add(path)
            _check_pieces(entry, lengths)
        elif isinstance(entry, Directory):
            directories.add(path)
        elif isinstance(entry, Hardlink):
            if entry.target not in files:
                raise _malformed("a hard link points to no earlier file")
        elif b"\0" in entry.target or not entry.target:
            raise _malformed("a symbolic link has an impossible target")
        if not parent and shared and not (isinstance(entry, Directory) and path in _SHARED):
            raise _malformed("a path lies in none of the shared directories")


def _check_pieces(file: File, lengths: Sequence[int]) -> None:
    pieces, size, covered = file.pieces, file.size, 0
    if len(pieces) % 3 or len(file.digest) != (32 if size < LARGE_FILE else 0):
        raise _malformed("a file's pieces or digest cannot be")
    for frame, offset, length in (pieces,) if len(pieces) == 3 else triples(pieces):
        if not (0 <= frame < len(lengths) and offset >= 0 and 0 < length <= lengths[frame] - offset):
            raise _malformed("a piece lies outside its frame")
        covered += length
    if covered != size:
        raise _malformed("the pieces of a file are not as long as the file")


def is_digest(text: str) -> bool:
    """Whether this is a digest in hex."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def is_stamp(text: str) -> bool:
    """Whether this is the inverted time of an entry of a tag."""
    return len(text) == 14 and text.isascii() and text.isdecimal()


def triples(pieces: tuple[int, ...]) -> zip[tuple[int, int, int]]:
    """`pieces` three by three: frame number, offset in the frame, length."""
    numbers = iter(pieces)
    return zip(numbers, numbers, numbers)


class Member(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A piece seen from its frame: which file, where in the file, where in the frame, how long."""

    file: File
    file_offset: int
    frame_offset: int
    length: int


def members(entries: Iterable[Entry], count: int) -> list[list[Member]]:
    """For each of `count` frames the pieces of `entries` that lie in it, in the order of the entries."""
    result: list[list[Member]] = [[] for _ in range(count)]
    for entry in entries:
        if isinstance(entry, File):
            start = 0
            for frame, offset, length in triples(entry.pieces):
                result[frame].append(Member(entry, start, offset, length))
                start += length
    return result
