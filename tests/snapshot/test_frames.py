"""Frames: where they are cut, and that nothing unproven or unbounded comes out of them."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packhorse.errors import IntegrityError
from packhorse.snapshot import frames, gpu
from packhorse.snapshot.frames import LARGE_FILE, MEDIUM_FILE, PIECE, RAW, ZSTD, Cut, Span, zstd

paths = st.lists(
    st.binary(min_size=1, max_size=12).filter(lambda name: b"/" not in name and b"\0" not in name),
    min_size=1,
    max_size=3,
).map(b"/".join)
sizes = st.one_of(
    st.integers(0, 3000),
    st.integers(0, LARGE_FILE),
    st.integers(MEDIUM_FILE - 2, MEDIUM_FILE + 2),
    st.integers(LARGE_FILE - 2, LARGE_FILE + 2),
    st.integers(LARGE_FILE, 3 * PIECE),
)
trees = st.dictionaries(paths, sizes, max_size=40).map(lambda tree: sorted(tree.items()))


def _groups(files: list[tuple[bytes, int]]) -> list[tuple[tuple[bytes, int, int], ...]]:
    """The frames as (path, offset, length), so that those of two lists of files can be compared."""
    return [
        tuple((files[span.file][0], span.offset, span.length) for span in spans)
        for spans, _ in frames.cut(files)
    ]


@given(trees)
def test_every_byte_of_every_file_lies_in_exactly_one_frame(files: list[tuple[bytes, int]]) -> None:
    covered: dict[int, int] = {}
    for spans, _ in frames.cut(files):
        for span in spans:
            assert span.offset == covered.get(span.file, 0)
            covered[span.file] = span.offset + span.length
    assert covered == {number: size for number, (_, size) in enumerate(files) if size}


@given(trees, st.data())
def test_every_byte_of_a_gathered_file_lies_in_exactly_one_frame_too(
    files: list[tuple[bytes, int]], data: st.DataObject
) -> None:
    def gathered(number: int) -> list[gpu.Gathered]:
        size, labels = files[number][1], ["", "80-89", "90-"]
        edges = sorted(data.draw(st.lists(st.integers(1, size - 1), max_size=6, unique=True)))
        extents = [
            gpu.Extent(start, end - start, labels[place % 3])
            for place, (start, end) in enumerate(zip([0, *edges], [*edges, size]))
        ]
        return gpu.pieces(extents, PIECE)

    covered: dict[int, list[tuple[int, int]]] = {}
    for each in frames.cut(files, gathered):
        assert each.length <= PIECE
        for span in each.spans:
            covered.setdefault(span.file, []).append((span.offset, span.length))
    assert covered.keys() == {number for number, (_, size) in enumerate(files) if size}
    for number, runs in covered.items():
        position = 0
        for offset, length in sorted(runs):
            assert offset == position
            position += length
        assert position == files[number][1]


@given(trees)
def test_no_frame_is_larger_than_a_reader_accepts_and_none_mixes_files_of_several_kinds(
    files: list[tuple[bytes, int]],
) -> None:
    for spans, _ in frames.cut(files):
        total = sum(span.length for span in spans)
        sizes = [files[span.file][1] for span in spans]
        large = max(sizes) >= LARGE_FILE
        assert 0 < total <= (PIECE if large else frames.GROUP_MOST)
        assert not large or len(spans) == 1
        assert max(sizes) < MEDIUM_FILE or min(sizes) >= MEDIUM_FILE


def test_a_large_file_is_cut_into_pieces_of_eight_mebibytes() -> None:
    assert list(frames.cut([(b"model", 2 * PIECE + 5)])) == [
        Cut([Span(0, 0, PIECE)]),
        Cut([Span(0, PIECE, PIECE)]),
        Cut([Span(0, 2 * PIECE, 5)]),
    ]


def test_small_files_of_two_distributions_share_no_frame_once_it_is_full_enough() -> None:
    files = [(b"a/%d" % number, 60_000) for number in range(20)] + [(b"b/0", 10)]
    assert [len(spans) for spans, _ in frames.cut(files)] == [20, 1]


@given(seed=st.integers(0, 10_000), at=st.floats(0, 1), size=st.integers(1, 60_000))
def test_one_file_more_moves_only_the_cuts_beside_it(seed: int, at: float, size: int) -> None:
    chance = random.Random(seed)
    files = sorted(
        (f"pkg{chance.randrange(30):02}/{chance.randrange(10**9)}.py".encode(), chance.randrange(1, 60_000))
        for _ in range(1500)
    )
    place = int(at * len(files))
    more = sorted([*files, (files[min(place, len(files) - 1)][0] + b"x", size)])
    before, after = _groups(files), _groups(more)
    assert len(set(after) - set(before)) <= 4, f"of {len(after)}"


@given(st.binary(max_size=5000), st.integers(1, 19))
def test_a_frame_comes_back_as_it_was(raw: bytes, level: int) -> None:
    codec, stored = frames.compress(raw, level)
    assert len(stored) <= len(raw)
    proof = frames.digest_of(stored), frames.digest_of(raw)
    assert b"".join(frames.decompress(stored, codec, *proof, len(raw))) == raw


@pytest.mark.parametrize("size", [10_000, PIECE])
def test_what_does_not_shrink_is_stored_as_it_is(size: int) -> None:
    noise = random.Random(1).randbytes(size)
    assert frames.compress(noise, 3) == (RAW, noise)
    assert frames.compress(bytes(size), 3)[0] == ZSTD


@pytest.mark.parametrize("part", range(12))
def test_a_piece_of_which_a_part_shrinks_is_compressed(part: int) -> None:
    """Samples are taken all over it."""
    piece = bytearray(random.Random(1).randbytes(PIECE))
    length = PIECE // 12
    piece[part * length : (part + 1) * length] = bytes(length)
    codec, stored = frames.compress(piece, 3)
    assert codec == ZSTD
    assert len(stored) < PIECE - length * 9 // 10


def _refused(stored: bytes, codec: int, raw: bytes, *, digest: bytes = b"", length: int = -1) -> None:
    with pytest.raises(IntegrityError):
        for _ in frames.decompress(
            stored,
            codec,
            frames.digest_of(stored),
            digest or frames.digest_of(raw),
            len(raw) if length < 0 else length,
        ):
            pass


RAW_BYTES = b"packhorse " * 1000
SQUEEZED: bytes = zstd.compress(RAW_BYTES, 3)


def test_stored_bytes_are_proven_before_they_are_decompressed() -> None:
    damaged = bytearray(SQUEEZED)
    damaged[len(damaged) // 2] ^= 1
    with pytest.raises(IntegrityError, match="stored bytes"):
        next(
            frames.decompress(
                damaged, ZSTD, frames.digest_of(SQUEEZED), frames.digest_of(RAW_BYTES), len(RAW_BYTES)
            )
        )


@pytest.mark.parametrize(
    ("stored", "codec"),
    [
        (SQUEEZED[:-1], ZSTD),
        (SQUEEZED + b"x", ZSTD),
        (SQUEEZED + SQUEEZED, ZSTD),
        (b"not zstd", ZSTD),
        (b"", ZSTD),
        (RAW_BYTES[:-1], RAW),
        (RAW_BYTES + b"x", RAW),
        (RAW_BYTES, 2),
        (RAW_BYTES, -1),
    ],
    ids=["cut short", "garbage behind it", "two frames", "noise", "nothing", "short", "long", "codec", "negative"],
)  # fmt: skip
def test_a_frame_that_is_not_exactly_what_was_pushed_is_refused(stored: bytes, codec: int) -> None:
    _refused(stored, codec, RAW_BYTES)


def test_a_frame_of_another_content_or_length_is_refused() -> None:
    _refused(SQUEEZED, ZSTD, RAW_BYTES, digest=b"\1" * 32)
    _refused(RAW_BYTES, RAW, RAW_BYTES, digest=b"\1" * 32)
    _refused(SQUEEZED, ZSTD, RAW_BYTES, length=len(RAW_BYTES) - 1)
    _refused(SQUEEZED, ZSTD, RAW_BYTES, length=len(RAW_BYTES) + 1)


_MEMORY = """
import resource, sys
from packhorse.errors import IntegrityError
from packhorse.snapshot import frames
from packhorse.snapshot.frames import zstd
squeezer = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: WINDOW})
bomb = b"".join(squeezer.compress(bytes(1 << 20)) for _ in range(1000)) + squeezer.flush()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    CALL
except IntegrityError:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("window", [20, 27])
@pytest.mark.parametrize(
    ("call", "megabytes"),
    [
        ("list(frames.decompress(bomb, frames.ZSTD, frames.digest_of(bomb), b'', 8 << 20))", 64),
        ("frames.decompress_document(bomb)", 150),
        ("frames.decompress_document(bomb, b'base' * 1000)", 280),
    ],
    ids=["frame", "document", "difference"],
)
def test_a_zip_bomb_is_refused_in_bounded_memory(call: str, megabytes: int, window: int) -> None:
    program = _MEMORY.replace("CALL", call).replace("WINDOW", str(window))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < megabytes
