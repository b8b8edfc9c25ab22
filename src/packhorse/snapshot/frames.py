"""Frames: how bytes are cut, digested, compressed and proven. The unit of verification, dedup and range reads.

Where to cut depends on paths, sizes and bytes alone, so that the same files give the same frames everywhere.
"""

from __future__ import annotations

import itertools
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from blake3 import blake3

from packhorse.errors import MEND, IntegrityError, PackhorseError
from packhorse.snapshot import gpu

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MEBIBYTE = 1 << 20
LARGE_FILE = MEBIBYTE
"""Files of this size and more are cut into pieces."""
MEDIUM_FILE = 64 << 10
"""Files of this size and more share no frame with smaller ones, so that they can come later."""
PIECE = 8 * MEBIBYTE
"""Large files are cut into pieces of this size."""
GROUP_LEAST, GROUP_MOST = MEBIBYTE, 4 * MEBIBYTE
"""Files that are not large share frames of about this size."""
LARGEST_FRAME = 16 * MEBIBYTE
LARGEST_STORED = LARGEST_FRAME + MEBIBYTE
"""What a reader accepts: bounds its memory whatever a store sends."""
LARGEST_DOCUMENT = 64 * MEBIBYTE
"""Enough for half a million files."""
DEFAULT_LEVEL = 3
_LEVEL = int(zstd.CompressionParameter.compression_level)
_WIDE = {int(zstd.CompressionParameter.window_log): 23}
"""Level 3 alone looks back 2 MiB. A whole frame saves a little at no cost."""
DEEP = 9
"""From this level on compressing takes much memory and long."""
_LEAN = {
    int(zstd.CompressionParameter.chain_log): 22,
    int(zstd.CompressionParameter.hash_log): 20,
}
"""20 MiB of tables for a whole frame from level 13 on, for which zstd by itself takes 32 to 80 MiB: docs/design/005.
Between 9 and 13 that would make frames larger than level 9 does."""
_TOGETHER = 4096
"""Names that are joined at a time."""
_SAMPLES, _SAMPLE = 12, 256 << 10
"""A frame is not compressed where none of this many samples of this many bytes shrinks."""
_WINDOW = {int(zstd.DecompressionParameter.window_log_max): 25}
"""A reader gives no more memory than 32 MiB to a window, whatever a frame asks for (RFC 8878, 3.1.1.1.2)."""

_PART = 1 << 20
"""The bytes in which a frame is decompressed, digested and written."""

_DELTA_WINDOW = {int(zstd.DecompressionParameter.window_log_max): 27}
_DELTA = {
    int(zstd.CompressionParameter.compression_level): 6,
    int(zstd.CompressionParameter.enable_long_distance_matching): 1,
    int(zstd.CompressionParameter.window_log): 27,
}
"""What differs between two documents: the window reaches over both."""

RAW, ZSTD = 0, 1
"""Codecs: stored as it is; one zstd frame (RFC 8878)."""

Bytes: TypeAlias = bytes | bytearray | memoryview


class Span(NamedTuple):
    """A run of one file: the file's number in the caller's list, offset and length in bytes."""

    file: int
    offset: int
    length: int


class Cut(NamedTuple):
    """What goes into one frame: spans of several files that are not large, or of one large one, in order."""

    spans: list[Span]
    gpus: str = ""
    """Which GPUs need it (see `gpu.needed`); empty where every worker does."""

    @property
    def length(self) -> int:
        """In bytes."""
        return sum(span.length for span in self.spans)


def cut(
    files: Sequence[tuple[bytes, int]], pieces: Callable[[int], Iterable[gpu.Gathered]] | None = None
) -> Iterator[Cut]:
    """The frames of `files` (path, size), which are in the order of their paths.

    `pieces` tells for the number of a large file what of it is gathered into each frame; without it, or where the file
    has no code for GPUs, it is cut into pieces of PIECE bytes.

    Small files and medium ones form groups beside each other. A group ends at the edge of a top-level directory (there a
    distribution ends) or where the path says so (about one file in 64), so that one file more or less moves only the cuts
    beside it.
    """
    small, medium = _Group(), _Group()
    for number, (path, length) in enumerate(files):
        if length >= LARGE_FILE:
            for gathered in pieces(number) if pieces else gpu.pieces([gpu.Extent(0, length, "")], PIECE):
                yield Cut([Span(number, *run) for run in gathered.runs], gathered.gpus)
            continue
        if length:
            yield from (medium if length >= MEDIUM_FILE else small).add(number, path, length)
    yield from small.close()
    yield from medium.close()


class _Group:
    """Files that are to share a frame."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._size = 0
        self._top = b""

    def add(self, number: int, path: bytes, length: int) -> Iterator[Cut]:
        """A file more; before it the group as it was, where that ends there."""
        top = path.partition(b"/")[0]
        full = self._size + length > GROUP_MOST
        if full or (self._size >= GROUP_LEAST and (top != self._top or zlib.crc32(path) % 64 == 0)):
            yield from self.close()
        self._spans.append(Span(number, 0, length))
        self._size += length
        self._top = top

    def close(self) -> Iterator[Cut]:
        """What is in the group, if anything is."""
        if self._spans:
            yield Cut(self._spans)
        self._spans, self._size = [], 0


def digest_of(content: Bytes) -> bytes:
    """The BLAKE3 digest (32 bytes) of `content`."""
    return blake3(content).digest()


ZEROS = digest_of(bytes(PIECE))
"""The digest of a piece that is a hole of its file: it is neither compressed again nor fetched nor written."""


def group_digest(digests: Iterable[bytes]) -> bytes:
    """One digest for a sequence of digests."""
    return digest_of(b"".join(digests))


def names_digest(names: Iterable[bytes]) -> bytes:
    """One digest for a sequence of names without null bytes, which need not all be joined in memory."""
    every, hasher = iter(names), blake3()
    while some := list(itertools.islice(every, _TOGETHER)):
        hasher.update(b"\0".join([*some, b""]))
    return hasher.digest()


def compress(raw: Bytes, level: int) -> tuple[int, Bytes]:
    """The codec and the stored bytes of a frame; what zstd cannot shrink is stored as it is."""
    if _seems_random(raw):
        return RAW, raw
    options = {**_WIDE, _LEVEL: level, **(_LEAN if level > 12 else {})}
    squeezed: bytes = zstd.compress(raw, options=options)
    if len(squeezed) >= len(raw):
        return RAW, raw
    return ZSTD, squeezed


def room(length: int, level: int) -> int:
    """The most bytes of memory that it takes to read and compress a frame of `length` bytes: as it was read, as it is
    stored, and zstd's tables."""
    tables = 2 if level < DEEP else 48 if DEEP < level <= 12 else 20
    return 2 * length + tables * MEBIBYTE


def _seems_random(raw: Bytes) -> bool:
    """Whether no sample of a whole piece can be shrunk, as with code that is compressed already.

    Of 1.5 GB of CUDA libraries this spares 0.41 GB from being compressed in vain, and misses 5 MB that would shrink.
    """
    if len(raw) < PIECE:
        return False
    view, step = memoryview(raw), len(raw) // _SAMPLES
    return all(
        len(zstd.compress(view[start : start + _SAMPLE], DEFAULT_LEVEL)) >= _SAMPLE
        for start in range((step - _SAMPLE) // 2, len(raw) - _SAMPLE, step)
    )


def decompress(
    stored: Bytes, codec: int, stored_digest: bytes, digest: bytes, length: int
) -> Iterator[Bytes]:
    """The raw bytes of a frame in parts that stay in the processor's cache, proven by both digests.

    Nothing unproven reaches the decompressor. What comes out of it is proven when the last part has been taken.
    Raises IntegrityError.
    """
    if digest_of(stored) != stored_digest:
        raise IntegrityError(
            f"A frame of the snapshot is corrupt: its stored bytes do not have the digest {stored_digest.hex()[:12]}.",
            MEND,
        )
    if codec == RAW:
        if len(stored) != length or stored_digest != digest:
            raise _wrong(digest)
        yield stored
    elif codec == ZSTD:
        yield from _parts(stored, digest, length)
    else:
        raise IntegrityError(
            f"A frame is stored with the unknown codec {codec}.", "Install a newer packhorse."
        )


def _parts(stored: Bytes, digest: bytes, length: int) -> Iterator[bytes]:
    decompressor = zstd.ZstdDecompressor(options=_WINDOW)
    hasher, given, left = blake3(), memoryview(stored), length
    try:
        while not decompressor.eof and (given or not decompressor.needs_input):
            taken = given[:_PART] if decompressor.needs_input else given[:0]
            given = given[len(taken) :]
            part = decompressor.decompress(taken, max_length=min(_PART, left + 1))
            left -= len(part)
            if left < 0:
                break
            hasher.update(part)
            yield part
    except zstd.ZstdError as error:
        raise _wrong(digest) from error
    if left or given or not decompressor.eof or decompressor.unused_data or hasher.digest() != digest:
        raise _wrong(digest)


def _decompressed(stored: Bytes, most: int, window: dict[int, int], prefix: Any = None) -> bytes:
    """What one whole zstd frame of at most `most` raw bytes holds. Raises ZstdError for anything else."""
    decompressor = zstd.ZstdDecompressor(zstd_dict=prefix, options=window)
    raw: bytes = decompressor.decompress(stored, max_length=most + 1)
    if not decompressor.eof or decompressor.unused_data or len(raw) > most:
        raise zstd.ZstdError("not one whole frame of the size allowed")
    return raw


def _wrong(digest: bytes) -> IntegrityError:
    return IntegrityError(
        f"A frame of the snapshot is corrupt: its content does not have the digest {digest.hex()[:12]}.",
        MEND,
    )


def compress_document(raw: bytes, base: bytes = b"") -> bytes:
    """A manifest or placement as one zstd frame, of what differs from `base` where there is one.

    Raises PackhorseError where no reader would take it.
    """
    if len(raw) > LARGEST_DOCUMENT:
        raise PackhorseError(
            f"The list of files is {len(raw) / 1e6:,.0f} MB long, more than a snapshot can have.",
            "Keep fewer files in the root: archives of small files are restored faster, too.",
        )
    if not base:
        squeezed: bytes = zstd.compress(raw, 6)
        return squeezed
    compressor = zstd.ZstdCompressor(options=_DELTA, zstd_dict=zstd.ZstdDict(base, is_raw=True).as_prefix)
    return bytes(compressor.compress(raw, compressor.FLUSH_FRAME))


def decompress_document(stored: bytes, base: bytes = b"") -> bytes:
    """Back from `compress_document`; at most LARGEST_DOCUMENT bytes. Raises IntegrityError."""
    try:
        if not base:
            return _decompressed(stored, LARGEST_DOCUMENT, _WINDOW)
        return _decompressed(
            stored, LARGEST_DOCUMENT, _DELTA_WINDOW, zstd.ZstdDict(base, is_raw=True).as_prefix
        )
    except zstd.ZstdError as error:
        raise IntegrityError(
            "A document of the snapshot cannot be decompressed: the store's copy is corrupt.", MEND
        ) from error
