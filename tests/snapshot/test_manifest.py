"""The documents of a snapshot: what is written comes back, what cannot be is refused, and with one error only."""

from __future__ import annotations

import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.snapshot.trees import manifests

from packhorse.errors import IntegrityError, PackhorseError
from packhorse.snapshot import frames
from packhorse.snapshot import manifest as documents
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
)


def _stored(document: object, magic: bytes = documents.MANIFEST_MAGIC) -> tuple[bytes, str]:
    """The object and the digest of any document, sane or not."""
    raw = document if isinstance(document, bytes) else msgspec.msgpack.encode(document)
    return magic + frames.compress_document(raw), frames.digest_of(raw).hex()


def _read(stored: bytes, digest: str, kind: documents.Kind = "packages") -> Manifest:
    """A manifest from its object."""
    return documents.decode_manifest(documents.raw_manifest(stored, digest), kind)


def _refused(
    *entries: Entry, kind: documents.Kind = "packages", match: str | None = None, **others: object
) -> None:
    document = Manifest(kind=kind, entries=entries, **{"frames": (FRAME, FRAME2), **others})  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match=match) as refused:
        _read(*_stored(document), kind)
    assert refused.value.exit_code == 4
    assert refused.value.remedy


FRAME, FRAME2 = Frame(b"f" * 32, 100), Frame(b"g" * 32, frames.PIECE)


def _file(path: bytes = b"file", size: int = 10, *pieces: int, mode: int = 0o644, mtime: int = 0) -> File:
    digest = b"d" * 32 if size < frames.LARGE_FILE else b""
    return File(path, mode, mtime, size, digest, pieces or (0, 0, size))


@given(manifests())
def test_a_manifest_comes_back_as_it_was_under_a_digest_of_its_own(manifest: Manifest) -> None:
    encoded = documents.encode(manifest)
    assert _read(encoded.whole, encoded.digest, manifest.kind) == manifest  # type: ignore[arg-type]
    assert documents.encode(manifest) == encoded


@given(manifests())
def test_entries_that_are_encoded_one_by_one_give_the_same_bytes(manifest: Manifest) -> None:
    listing = documents.Listing(manifest.entries)
    without = msgspec.structs.replace(manifest, entries=())
    assert documents.encode(without, listing) == documents.encode(manifest)
    assert (listing.files, listing.bytes) == (manifest.files, manifest.bytes)


@pytest.mark.parametrize("count", [0, 15, 16, 65_535, 65_536])
def test_so_they_do_however_many_they_are(count: int) -> None:
    manifest = Manifest(
        kind="packages", entries=tuple(Directory(b"%d" % each, 0, 0) for each in range(count))
    )
    assert documents.encode(
        Manifest(kind="packages"), documents.Listing(manifest.entries)
    ) == documents.encode(manifest)


@given(manifests())
def test_the_pieces_of_every_frame_are_found_with_their_files(manifest: Manifest) -> None:
    inside = members(manifest.entries, len(manifest.frames))
    covered: dict[bytes, list[tuple[int, int]]] = {}
    for frame, held in zip(manifest.frames, inside):
        assert sum(member.length for member in held) == frame.length
        for number, member in enumerate(held):
            assert member.frame_offset == sum(before.length for before in held[:number])
            covered.setdefault(member.file.path, []).append((member.file_offset, member.length))
    sizes = {entry.path: entry.size for entry in manifest.entries if isinstance(entry, File) and entry.size}
    assert covered.keys() == sizes.keys()
    for path, runs in covered.items():
        runs.sort()
        assert [offset for offset, _ in runs] == [sum(n for _, n in runs[:i]) for i in range(len(runs))]
        assert sum(length for _, length in runs) == sizes[path]


@given(manifests(), st.data())
def test_a_placement_comes_back_for_its_own_manifest_only(manifest: Manifest, data: st.DataObject) -> None:
    digest = documents.encode(manifest).digest
    placement = Placement(
        manifest=bytes.fromhex(digest),
        packs=("a" * 64, "b" * 64),
        frames=manifest.frames,
        places=tuple(
            Place(data.draw(st.integers(0, 1)), number * 7, 1 + number, 0, frame.digest)
            for number, frame in enumerate(manifest.frames)
        ),
    )
    stored = documents.encode_placement(placement)
    assert documents.decode_placement(stored, manifest, digest) == placement
    with pytest.raises(IntegrityError):
        documents.decode_placement(stored, manifest, "0" * 64)
    other = msgspec.structs.replace(manifest, frames=(*manifest.frames, FRAME))
    with pytest.raises(IntegrityError):
        documents.decode_placement(stored, other, digest)


def test_an_unknown_version_is_refused_with_the_way_out() -> None:
    newer = {"format": 3, "kind": "packages", "something": {"new": True}}
    with pytest.raises(IntegrityError, match="format 3") as refused:
        _read(*_stored(newer))
    assert "newer packhorse" in refused.value.remedy
    with pytest.raises(IntegrityError, match="format 2"):
        documents.decode_any_placement(_stored({**newer, "format": 2}, documents.PLACEMENT_MAGIC)[0])


def test_a_manifest_of_another_kind_is_refused() -> None:
    stored, digest = _stored(Manifest(kind="packages"))
    with pytest.raises(IntegrityError):
        _read(stored, digest, "shared")


GOOD = Manifest(kind="packages", frames=(FRAME,), entries=(_file(),))


def test_a_document_that_is_not_whole_is_refused() -> None:
    stored, digest = _stored(GOOD)
    placed = Placement(
        manifest=b"", packs=("a" * 64,), frames=(FRAME,), places=(Place(0, 0, 1, 0, b"p" * 32),)
    )
    placement, _ = _stored(placed, documents.PLACEMENT_MAGIC)
    assert _read(stored, digest) == GOOD
    assert documents.decode_any_placement(placement) == placed
    for damaged in (stored[:-1], stored[:40], stored + b"x", stored[5:], b"", documents.MANIFEST_MAGIC):
        with pytest.raises(IntegrityError):
            _read(damaged, digest)
    for damaged in (placement[:-1], placement + b"x", placement[1:], stored, b""):
        with pytest.raises(IntegrityError):
            documents.decode_any_placement(damaged)
    with pytest.raises(IntegrityError, match="promises"):
        _read(stored, "0" * 64)


@pytest.mark.parametrize(
    "path",
    [b"/evil", b"//evil", b"/", b"..", b".", b"", b"../evil", b"a\0b", b"evil/", b"missing/file"],
)
def test_a_path_that_leads_outside_is_refused(path: bytes) -> None:
    _refused(Directory(path, 0o755, 0))
    _refused(_file(path))
    _refused(Symlink(path, 0, b"target"))


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a\0"])
def test_no_component_of_a_path_leads_elsewhere(name: bytes) -> None:
    _refused(Directory(b"a", 0o755, 0), Directory(b"a/" + name, 0o755, 0))
    _refused(Directory(b"a", 0o755, 0), _file(b"a/" + name + b"/file"))


def test_nothing_lies_below_what_is_no_directory() -> None:
    _refused(Symlink(b"a", 0, b"/etc"), _file(b"a/passwd"))
    _refused(_file(b"a"), _file(b"a/b"))
    _refused(_file(b"a"), Hardlink(b"b", b"a"), _file(b"b/c"))


def test_paths_are_in_order_and_unique() -> None:
    _refused(_file(b"b"), _file(b"a"), match="order")
    _refused(_file(b"a"), _file(b"a"), match="order")
    _refused(Symlink(b"a", 0, b"/etc"), Directory(b"a", 0o755, 0), match="order")


@pytest.mark.parametrize("path", [b"packages", b"tmp", b".packhorse", b"elsewhere", b"models\n", b"Models"])
def test_shared_paths_lie_in_the_shared_directories(path: bytes) -> None:
    _refused(Directory(path, 0o755, 0), kind="shared")
    _refused(Directory(path, 0o755, 0), _file(path + b"/file"), kind="shared")


def test_a_shared_directory_is_a_directory() -> None:
    _refused(Symlink(b"models", 0, b"/etc"), kind="shared")
    _refused(_file(b"models"), kind="shared")


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o1777, -1, 1 << 40])
def test_mode_bits_that_are_never_kept_are_refused(mode: int) -> None:
    _refused(_file(mode=mode))
    _refused(Directory(b"a", mode, 0))


@pytest.mark.parametrize(
    ("size", "pieces"),
    [
        (10, (2, 0, 10)),
        (10, (-1, 0, 10)),
        (10, (0, 91, 10)),
        (10, (0, -1, 10)),
        (101, (0, 0, 101)),
        (10, (0, 0, 9)),
        (10, (0, 0, 5, 0, 0, 6)),
        (0, (0, 0, 0)),
        (10, (0, 0, 20, 0, 0, -10)),
        (10, (0, 0)),
        (10, (0, 0, 10, 0)),
        (-1, (0, 0, 1)),
        (-10, (0, 0, -10)),
        (1 << 63, (0, 0, 100)),
        (10, (1 << 63, 0, 10)),
        (10, (0, 1 << 63, 10)),
        (10, (0, 0, 1 << 63)),
    ],
)
def test_pieces_lie_in_their_frames_and_add_up(size: int, pieces: tuple[int, ...]) -> None:
    _refused(_file(b"file", size, *pieces))


def test_a_file_without_pieces_is_empty() -> None:
    _refused(File(b"file", 0o644, 0, -1, b"d" * 32, ()))
    _refused(File(b"file", 0o644, 0, 1 << 60, b"", ()))


def test_small_files_have_a_digest_and_large_ones_have_those_of_their_frames() -> None:
    _refused(File(b"file", 0o644, 0, 10, b"", (0, 0, 10)))
    _refused(File(b"file", 0o644, 0, 10, b"d" * 31, (0, 0, 10)))
    _refused(File(b"file", 0o644, 0, frames.PIECE, b"d" * 32, (1, 0, frames.PIECE)))


@pytest.mark.parametrize("length", [0, -1, frames.LARGEST_FRAME + 1, 1 << 62])
def test_a_frame_of_impossible_length_is_refused(length: int) -> None:
    _refused(frames=(Frame(b"f" * 32, length),))
    _refused(frames=(Frame(b"short", 100),))


def test_a_hard_link_names_an_earlier_file() -> None:
    _refused(_file(b"a"), Hardlink(b"b", b"nothing"))
    _refused(Hardlink(b"a", b"b"), _file(b"b"))
    _refused(Hardlink(b"a", b"a"))
    _refused(Directory(b"a", 0o755, 0), Hardlink(b"b", b"a"))
    _refused(Symlink(b"a", 0, b"/etc/passwd"), Hardlink(b"b", b"a"))
    _refused(_file(b"a"), Hardlink(b"b", b"/etc/passwd"))


@pytest.mark.parametrize("target", [b"", b"a\0b"])
def test_an_impossible_target_of_a_symbolic_link_is_refused(target: bytes) -> None:
    _refused(Symlink(b"a", 0, target))


@pytest.mark.parametrize("mtime", [1 << 63, (1 << 64) - 1])
def test_a_time_out_of_range_is_refused(mtime: int) -> None:
    _refused(_file(mtime=mtime))
    _refused(Symlink(b"a", mtime, b"b"))
    _refused(Directory(b"a", 0o755, mtime))


@pytest.mark.parametrize(
    "others",
    [
        {"stamps": ("1" * 14,), "stamped": ()},
        {"stamps": ("1" * 14,), "stamped": (1,)},
        {"stamps": ("1" * 14,), "stamped": (-1,)},
        {"stamps": ("../1",), "stamped": (0,)},
        {"stamps": (), "stamped": (0,)},
        {"fingerprint": "../../tags"},
    ],
)
def test_a_fold_or_fingerprint_that_cannot_be_is_refused(others: dict[str, object]) -> None:
    _refused(_file(), **others)


@pytest.mark.parametrize(
    "place",
    [
        Place(1, 0, 1, 0, b"p" * 32),
        Place(-1, 0, 1, 0, b"p" * 32),
        Place(0, -1, 1, 0, b"p" * 32),
        Place(0, 1 << 63, 1, 0, b"p" * 32),
        Place(0, 0, 0, 0, b"p" * 32),
        Place(0, 0, -1, 0, b"p" * 32),
        Place(0, 0, frames.LARGEST_STORED + 1, 0, b"p" * 32),
        Place(0, 0, 1, 0, b"short"),
    ],
)
def test_a_place_that_cannot_be_is_refused(place: Place) -> None:
    document = Placement(manifest=b"m" * 32, packs=("a" * 64,), frames=(FRAME,), places=(place,))
    with pytest.raises(IntegrityError):
        documents.decode_any_placement(documents.encode_placement(document))


@pytest.mark.parametrize("pack", ["../../tags/main", "a" * 63, "A" * 64, "", "a" * 63 + "/"])
def test_a_pack_that_cannot_be_is_refused(pack: str) -> None:
    document = Placement(
        manifest=b"m" * 32, packs=(pack,), frames=(FRAME,), places=(Place(0, 0, 1, 0, b"p" * 32),)
    )
    with pytest.raises(IntegrityError):
        documents.decode_any_placement(documents.encode_placement(document))


def test_every_frame_has_one_place() -> None:
    document = Placement(manifest=b"m" * 32, packs=("a" * 64,), frames=(FRAME,), places=())
    with pytest.raises(IntegrityError):
        documents.decode_any_placement(documents.encode_placement(document))


SEED = Manifest(
    kind="packages",
    fingerprint="1" * 64,
    soabi="cpython-311-x86_64-linux-gnu",
    platform="linux-x86_64",
    frames=(FRAME, FRAME2),
    entries=(
        Directory(b"a", 0o755, 1),
        _file(b"a/b"),
        Symlink(b"a/c", 2, b"b"),
        Hardlink(b"a/d", b"a/b"),
        _file(b"e", frames.PIECE, 1, 0, frames.PIECE),
    ),
    stamps=("9" * 14,),
    stamped=(0,) * 5,
)
changes = st.lists(
    st.tuples(st.sampled_from(["set", "cut", "insert"]), st.integers(0, 1000), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=5,
)  # fmt: skip


def _changed(raw: bytes, mutations: list[tuple[str, int, bytes]]) -> bytes:
    changed = bytearray(raw)
    for how, at, new in mutations:
        where = at % (len(changed) + 1)
        end = {"set": where + len(new), "insert": where, "cut": where + 1}[how]
        changed[where:end] = b"" if how == "cut" else new
    return bytes(changed)


@settings(max_examples=400)
@given(changes)
def test_whatever_the_bytes_of_a_manifest_there_is_one_kind_of_error(
    mutations: list[tuple[str, int, bytes]],
) -> None:
    raw = msgspec.msgpack.encode(SEED)
    for stored, digest in (
        _stored(_changed(raw, mutations)),
        (_changed(_stored(raw)[0], mutations), frames.digest_of(raw).hex()),
    ):
        try:
            decoded = _read(stored, digest)
        except IntegrityError:
            continue
        members(decoded.entries, len(decoded.frames))  # what is let through can be worked with
        assert decoded.bytes >= 0


@settings(max_examples=400)
@given(changes)
def test_whatever_the_bytes_of_a_placement_there_is_one_kind_of_error(
    mutations: list[tuple[str, int, bytes]],
) -> None:
    placement = Placement(
        manifest=b"m" * 32,
        packs=("a" * 64, "b" * 64),
        frames=(FRAME, FRAME2),
        places=(Place(0, 0, 1, 0, b"p" * 32), Place(1, 5, 7, 1, b"q" * 32)),
    )
    raw = msgspec.msgpack.encode(placement)
    magic = documents.PLACEMENT_MAGIC
    for stored in (_stored(_changed(raw, mutations), magic)[0], _changed(_stored(raw, magic)[0], mutations)):
        try:
            decoded = documents.decode_any_placement(stored)
        except IntegrityError:
            continue
        assert all(0 <= place.pack < len(decoded.packs) for place in decoded.places)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x82\xa6format\x02\xa6frames\xdd\xff\xff\xff\xff",
        b"\x82\xa6format\x02\xa1x" + b"\x91" * 100_000 + b"\x90",
        b"\x82\xa6format\x02\xa4kind\xa2\xff\xfe",
        b"\x82\xa6format\x02\xa5packs\x91\xa2\xff\xfe",
        b"",
        b"\xc1",
    ],
    ids=["gigantic list", "deep nesting", "no UTF-8", "no UTF-8 in a list", "nothing", "reserved byte"],
)
def test_bytes_made_to_break_the_reader_are_refused(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        _read(*_stored(raw))
    with pytest.raises(IntegrityError):
        documents.decode_any_placement(
            _stored(raw.replace(b"\x02", b"\x01", 1), documents.PLACEMENT_MAGIC)[0]
        )


@pytest.mark.parametrize(
    ("field", "item"),
    [
        ("frames", b"\x92\xc4\x00\x00"),
        ("entries", b"\x94\xa1l\xc4\x00\x00\xc4\x00"),
        ("stamps", b"\xa0"),
        ("stamped", b"\x00"),
        ("packs", b"\xa0"),
        ("places", b"\x95\x00\x00\x00\x00\xc4\x00"),
    ],
)
def test_a_list_of_more_than_can_be_is_refused_before_it_takes_memory(field: str, item: bytes) -> None:
    count = 3 * documents.MOST
    listed = bytes((0xA0 + len(field),)) + field.encode() + b"\xdd" + count.to_bytes(4, "big") + item * count
    tracemalloc.start()
    try:
        with pytest.raises(IntegrityError, match="lists more than 1,048,576 things") as refused:
            if field in ("packs", "places"):
                raw = b"\x83\xa6format\x01\xa8manifest\xc4\x00" + listed
                documents.decode_any_placement(_stored(raw, documents.PLACEMENT_MAGIC)[0])
            else:
                _read(*_stored(b"\x83\xa6format\x02\xa4kind\xa8packages" + listed))
        assert refused.value.exit_code == 4
        # The document itself in its forms, and not much more.
        assert tracemalloc.get_traced_memory()[1] < 4 * len(listed) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_what_no_reader_would_take_is_not_written() -> None:
    with pytest.raises(PackhorseError, match="more than a snapshot can have"):
        documents.encode(Manifest(kind="packages", frames=(FRAME,) * (documents.MOST + 1)))
    listing = documents.Listing([_file()] * (documents.MOST + 1))
    with pytest.raises(PackhorseError, match="has 1,048,577 entries, more than a snapshot can have"):
        documents.encode(Manifest(kind="packages"), listing)


# --- stored by what differs ---


@given(manifests(), manifests())
def test_a_manifest_comes_back_from_what_differs_from_any_other(one: Manifest, other: Manifest) -> None:
    base, encoded = documents.encode(one), documents.encode(other)
    stored = encoded.beside(base)
    assert len(stored) <= len(encoded.whole)
    named = documents.base_of(stored)
    assert named in ("", base.digest)
    assert documents.raw_manifest(stored, encoded.digest, base if named else None) == encoded


MANY = msgspec.structs.replace(
    SEED,
    entries=tuple(
        msgspec.structs.replace(_file(b"module%04d.py" % number), digest=frames.digest_of(b"%d" % number))
        for number in range(500)
    ),
    stamps=(),
    stamped=(),
)
FEW_CHANGED = msgspec.structs.replace(MANY, entries=(_file(b"a new one.py"), *MANY.entries[:-2]))


def test_of_two_that_are_much_alike_little_is_stored() -> None:
    base, encoded = documents.encode(MANY), documents.encode(FEW_CHANGED)
    stored = encoded.beside(base)
    assert documents.base_of(stored) == base.digest
    assert len(stored) < len(encoded.whole) // 8
    with pytest.raises(IntegrityError):
        documents.raw_manifest(stored, encoded.digest)
    for wrong in (encoded, documents.encode(SEED), documents.Encoded(base.digest, base.raw[:-1])):
        with pytest.raises(IntegrityError):
            documents.raw_manifest(stored, encoded.digest, wrong)


@settings(max_examples=400)
@given(changes)
def test_whatever_the_bytes_of_a_difference_there_is_one_kind_of_error(
    mutations: list[tuple[str, int, bytes]],
) -> None:
    base, encoded = documents.encode(MANY), documents.encode(FEW_CHANGED)
    stored = _changed(encoded.beside(base), mutations)
    try:
        found = documents.raw_manifest(stored, encoded.digest, base if documents.base_of(stored) else None)
    except IntegrityError:
        return
    assert found == encoded


# --- the versions ---


def test_a_manifest_of_format_1_has_frames_without_labels() -> None:
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(GOOD))
    fields |= {"format": 1, "frames": [list(frame[:2]) for frame in fields["frames"]]}
    manifest = _read(*_stored(fields))
    assert (manifest.format, manifest.frames, manifest.entries) == (1, (FRAME,), GOOD.entries)
    placed = Placement(manifest=b"", packs=(), frames=(FRAME,), places=())
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(placed))
    assert plain["format"] == documents.PLACEMENT_FORMAT == 1


@pytest.mark.parametrize("label", ["90", "80-85,90-", "what nobody knows", "9" * 256])
def test_a_label_is_kept_as_it_is(label: str) -> None:
    manifest = msgspec.structs.replace(GOOD, frames=(Frame(b"f" * 32, 100, label),))
    assert _read(*_stored(manifest)) == manifest


def test_a_label_too_long_to_be_one_is_refused() -> None:
    _refused(_file(), frames=(Frame(b"f" * 32, 100, "9" * 257),), match="frame")
