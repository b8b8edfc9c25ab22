"""Scanning and writing: what goes into packs, what is left out, and that it says so."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.snapshot.trees import listing

from packhorse.progress import Silent
from packhorse.snapshot import frames, source
from packhorse.snapshot import manifest as documents
from packhorse.snapshot.contents import Before, content_of, content_on_disk
from packhorse.snapshot.frames import MEBIBYTE
from packhorse.snapshot.index import Index
from packhorse.snapshot.manifest import Directory, File, Hardlink, Manifest, Symlink
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.scan import Found, look, readable, scan
from packhorse.snapshot.writer import PACK_MOST, Placed, Written, placement_of, write


class Packs:
    """Takes the packs of a push, and gives their frames back."""

    def __init__(self) -> None:
        self.packs: dict[str, bytes] = {}

    def __call__(self, name: str, content: Sequence[frames.Bytes]) -> None:
        assert name not in self.packs
        self.packs[name] = b"".join(content)

    def frame(self, placed: Placed, frame: documents.Frame) -> bytes:
        stored = self.packs[placed.pack][placed.offset : placed.offset + placed.length]
        return b"".join(frames.decompress(stored, placed.codec, placed.digest, frame.digest, frame.length))


def _write(base: Path, packs: Packs, found: list[Found] | None = None, **options: object) -> Written:
    whole: dict[str, object] = {
        "index": Index(base.with_name("index")), "index_prefix": b"", "existing": {},
        "progress": Silent(), **options,
    }  # fmt: skip
    chosen = scan(os.fsencode(base)) if found is None else found
    return write(os.fsencode(base), chosen, packs, **whole)  # type: ignore[arg-type]


def _manifest(written: Written) -> Manifest:
    return Manifest(kind="packages", frames=tuple(written.frames), entries=tuple(written.entries()))


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "base"
    path.mkdir()
    yield path


names = st.binary(min_size=1, max_size=6).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
contents = st.one_of(
    st.binary(max_size=200),
    st.integers(0, 3 << 20).map(lambda size: size.to_bytes(4, "big") * (size // 4)),
)
files = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(b"/".join), contents, max_size=12)
links = st.dictionaries(st.lists(names, min_size=1, max_size=3).map(b"/".join), names, max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files, links)
def test_any_tree_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, files: dict[bytes, bytes], links: dict[bytes, bytes]
) -> None:
    top = tmp_path_factory.mktemp("tree")
    base, other = top / "base", top / "other"
    base.mkdir()
    for number, (path, content) in enumerate(files.items()):
        whole = os.path.join(os.fsencode(base), path)
        with contextlib.suppress(FileExistsError, NotADirectoryError):  # there already, or below a file
            os.makedirs(os.path.dirname(whole), exist_ok=True)
            with open(whole, "xb") as file:
                file.write(content)
            os.chmod(whole, 0o400 | number % 0o400)
    for path, target in links.items():
        whole = os.path.join(os.fsencode(base), path)
        with contextlib.suppress(OSError):  # the same, or below a link that leads nowhere
            os.makedirs(os.path.dirname(whole), exist_ok=True)
            os.symlink(target, whole)
    packs = Packs()
    written = _write(base, packs)
    encoded = documents.encode(_manifest(written))
    manifest = documents.decode_manifest(encoded, "packages")
    _restore(Tree(other, manifest, encoded.digest), written, packs)
    assert listing(other) == listing(base)


def _restore(tree: Tree, written: Written, packs: Packs) -> list[int]:
    tree.prepare()
    missing = tree.missing
    for number in missing:
        frame = tree.manifest.frames[number]
        tree.put(number, [packs.frame(written.placed[frame.digest], frame)])
    tree.finish()
    return missing


def test_packs_hold_frames_back_to_back_under_a_name_that_is_theirs(base: Path) -> None:
    for number in range(3):
        (base / f"large{number}").write_bytes(os.urandom(9 << 20))
    packs = Packs()
    written = _write(base, packs)
    assert sum(map(len, packs.packs.values())) == written.stored_bytes
    for name, content in packs.packs.items():
        inside = sorted((p for p in written.placed.values() if p.pack == name), key=lambda p: p.offset)
        assert [p.offset for p in inside] == [sum(p.length for p in inside[:i]) for i in range(len(inside))]
        assert sum(p.length for p in inside) == len(content)
        assert frames.group_digest(p.digest for p in inside).hex() == name


def test_a_pack_grows_no_larger_than_is_allowed_with_the_frame_that_fills_it(base: Path) -> None:
    packs = Packs()
    for number, size in enumerate((3, 8, 5, 4, 7, 6, 6, 1, 1, 8, 2)):
        (base / f"{number:02}").write_bytes(os.urandom(size << 20))
    _write(base, packs)
    sizes = [len(content) for content in packs.packs.values()]
    assert max(sizes) <= PACK_MOST
    assert sorted(sizes) == sorted(size << 20 for size in (3, 8, 9, 7, 6, 8, 8, 2))


def test_the_same_content_is_stored_once(base: Path) -> None:
    content = os.urandom(3 << 20)
    for name in ("a", "b", "c"):
        (base / name).write_bytes(content)
    packs = Packs()
    written = _write(base, packs)
    assert written.stored_bytes == len(content)
    assert len(written.frames) == 1
    again = _write(base, Packs(), existing=written.placed)
    assert (again.stored_bytes, _manifest(again)) == (0, _manifest(written))


def test_a_frame_that_takes_long_keeps_none_behind_it_and_stays_the_first(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        (base / f"file{number}").write_bytes(bytes([number]) * MEBIBYTE)
    others = threading.Semaphore(0)
    compress = frames.compress

    def slow(raw: frames.Bytes, level: int) -> tuple[int, frames.Bytes]:
        if raw[0] == 0:
            assert all(others.acquire(timeout=20) for _ in range(7)), "they wait for the first"
        else:
            others.release()
        return compress(raw, level)

    monkeypatch.setattr(frames, "compress", slow)
    written = _write(base, Packs(), threads=2)
    assert [file.pieces for file in written.entries() if isinstance(file, File)] == [
        (number, 0, MEBIBYTE) for number in range(8)
    ]


def test_where_a_disk_is_slow_all_threads_read_small_files(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(8):
        (base / f"top{number}").mkdir()
        for name in ("a", "b"):
            (base / f"top{number}/{name}").write_bytes(bytes([number]) * (600 << 10))
    together = threading.Barrier(4, timeout=20)
    read = source.read

    def slow(*words: Any) -> Any:
        together.wait()
        return read(*words)

    monkeypatch.setattr(source, "read", slow)
    written = _write(base, Packs(), threads=4)
    assert len(written.frames) == 8
    assert not written.changed


def test_holes_are_neither_stored_nor_written(base: Path, tmp_path: Path) -> None:
    with (base / "sparse").open("wb") as file:
        file.truncate(10 * frames.PIECE + 5)
        file.seek(4 * frames.PIECE + 7)
        file.write(b"island")
    (base / "zeros").write_bytes(bytes(2 * frames.PIECE))
    packs = Packs()
    written = _write(base, packs)
    assert written.stored_bytes < 10_000
    digest = documents.encode(_manifest(written)).digest
    tree = Tree(tmp_path / "other", _manifest(written), digest)
    missing = _restore(tree, written, packs)
    assert [tree.manifest.frames[number].digest for number in missing].count(frames.ZEROS) == 0
    assert len(missing) == 2
    assert (tmp_path / "other/sparse").read_bytes() == (base / "sparse").read_bytes()
    assert (tmp_path / "other/sparse").stat().st_blocks * 512 <= 2 * frames.PIECE
    assert (tmp_path / "other/zeros").stat().st_blocks == 0


def test_a_small_file_of_zeros_is_written(base: Path, tmp_path: Path) -> None:
    """A hostile manifest may put a small file into a frame that is a hole."""
    file = File(b"small", 0o644, 0, 100, b"d" * 32, (0, 0, 100))
    manifest = Manifest(
        kind="packages", frames=(documents.Frame(frames.ZEROS, frames.PIECE),), entries=(file,)
    )
    tree = Tree(tmp_path / "other", manifest, "digest")
    assert tree.missing == [0]
    tree.prepare()
    tree.put(0, [bytes(frames.PIECE)])
    tree.finish()
    assert (tmp_path / "other/small").read_bytes() == bytes(100)


@pytest.mark.parametrize("length", range(1, 5))
def test_no_number_of_the_journal_lies_over_the_border_of_two_blocks(tmp_path: Path, length: int) -> None:
    file = File(b"small", 0o644, 0, 100, b"d" * 32, (0, 0, 100))
    frame = documents.Frame(b"f" * 32, 100)
    tree = Tree(tmp_path / "other", Manifest(kind="packages", frames=(frame,), entries=(file,)), "d" * length)
    tree.prepare()
    tree.put(0, [bytes(100)])
    head, _, numbers = (tmp_path / "other.journal").read_bytes().partition(b"\n")
    assert numbers == bytes(4)
    assert (len(head) + 1) % 4 == 0
    tree.finish()


def test_a_file_that_is_no_longer_the_one_that_was_scanned_is_left_out_and_named(base: Path) -> None:
    for name in ("a", "b", "gone", "linked"):
        (base / name).write_bytes(name.encode() * 1000)
    (base / "other name").hardlink_to(base / "linked")
    (base / "large").write_bytes(bytes(range(256)) * (5 << 12))
    found = scan(os.fsencode(base))
    (base / "a").write_bytes(b"A" * 1000)
    (base / "gone").unlink()
    (base / "linked").write_bytes(b"changed")
    with (base / "large").open("r+b") as file:
        file.write(b"changed")
    written = _write(base, Packs(), found)
    assert written.changed == [b"a", b"gone", b"large", b"linked", b"other name"]
    assert [entry.path for entry in written.entries()] == [b"b"]


def test_a_link_in_the_place_of_a_scanned_file_is_not_followed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (base / "a").write_bytes(b"public")
    found = scan(os.fsencode(base))
    (base / "a").unlink()
    (base / "a").symlink_to(tmp_path / "secret")
    packs = Packs()
    assert _write(base, packs, found).changed == [b"a"]
    assert not any(b"secret" in content for content in packs.packs.values())


def test_a_link_that_is_gone_or_became_a_file_is_left_out_and_named(base: Path) -> None:
    for name in ("file", "gone", "still"):
        (base / name).symlink_to("target")
    found = scan(os.fsencode(base))
    for name in ("file", "gone"):
        (base / name).unlink()
    (base / "file").write_bytes(b"content")
    written = _write(base, Packs(), found)
    assert written.changed == [b"file", b"gone"]
    assert [entry.path for entry in written.entries()] == [b"still"]


def test_a_fifo_in_the_place_of_a_scanned_file_is_not_waited_for(base: Path) -> None:
    for name, size in (("a", 100), ("b", 100), ("large", 3 << 20), ("medium", 100_000)):
        (base / name).write_bytes(bytes([1]) * size)
    found = scan(os.fsencode(base))
    for name in ("a", "large", "medium"):
        (base / name).unlink()
        os.mkfifo(base / name)
    assert _write(base, Packs(), found).changed == [b"a", b"large", b"medium"]
    for item in found:
        if item.path != b"b":
            with contextlib.suppress(OSError):
                content_on_disk(os.path.join(os.fsencode(base), item.path), item.signature.size)


def test_a_file_that_a_lease_holds_back_is_waited_for(base: Path) -> None:
    path = os.fsencode(base / "held")
    (base / "held").write_bytes(b"content")
    descriptor = os.open(path, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)  # ignored unless somebody asks for it
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(content_on_disk, path, 7)
        while fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_WRLCK:  # until somebody opens it
            assert not read.done()
        os.close(descriptor)
        assert read.result(10) == frames.digest_of(b"content")


def test_after_the_deadline_nothing_is_begun_and_all_that_is_left_out_is_named(base: Path) -> None:
    for name in ("a", "b"):
        (base / name).write_bytes(os.urandom(2 << 20))
    (base / "empty").write_bytes(b"")
    written = _write(base, Packs(), deadline=time.monotonic())
    assert written.unfinished == [b"a", b"b"]
    assert [entry.path for entry in written.entries()] == [b"empty"]
    assert written.stored_bytes == 0


def test_what_an_earlier_index_vouches_for_is_not_opened(base: Path) -> None:
    (base / "large").write_bytes(os.urandom(9 << 20))
    for number in range(20):
        (base / f"small{number:02}").write_bytes(os.urandom(100_000))
    index = Index(base.with_name("index"))
    found = scan(os.fsencode(base))
    written = _write(base, Packs(), found, index=index)
    index.update(written.seen())
    contents = {item.path: index.digests(item.path, item.signature) for item in found}
    assert set(contents.values()) == {None}, "files written a moment ago are not trusted"
    kept = {entry.path: entry for entry in written.entries() if isinstance(entry, File)}
    for item in found:
        content = content_of(kept[item.path], written.frames)
        index.restored(item.path, item.signature, (content, item.mode))
    for item in found:  # whoever opens them now fails
        os.unlink(os.path.join(os.fsencode(base), item.path))
    again = _write(
        base, Packs(), found, index=index, existing=written.placed, before=Before.of(_manifest(written))
    )
    assert (again.changed, again.stored_bytes) == ([], 0)
    assert _manifest(again) == _manifest(written)


def test_a_scan_names_everything_by_its_kind(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (base / "directory").mkdir(mode=0o750)
    (base / "directory/file").write_bytes(b"1")
    (base / "directory/file").chmod(0o4711)
    (base / "link").symlink_to("nowhere")
    os.mkfifo(base / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(base)
        listener.bind("socket")
        skipped: list[tuple[bytes, str]] = []
        found = scan(os.fsencode(base), skipped=lambda path, what: skipped.append((path, what)))
    assert [(item.path, item.kind, item.mode) for item in found] == [
        (b"directory", "directory", 0o750),
        (b"directory/file", "file", 0o711),
        (b"link", "symlink", 0),
    ]
    assert sorted(path for path, _ in skipped) == [b"pipe", b"socket"]
    assert look(os.fsencode(base), b"link") == found[2]
    assert look(os.fsencode(base), b"nothing") is None
    assert look(os.fsencode(base), b"directory/file/below") is None


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("models/é ü 漢字.bin".encode(), "models/é ü 漢字.bin"),
        (b"a\x1b]0;title\x07", "a\\x1b]0;title\\x07"),
        (b"two\nlines\r\t\x00\x7f", "two\\x0alines\\x0d\\x09\\x00\\x7f"),
        ("\x9b31m".encode(), "\\x9b31m"),
        (b"\xff\xfe\x9b", "\\xff\\xfe\\x9b"),
    ],
    ids=["letters", "escapes", "line breaks", "C1", "no UTF-8"],
)
def test_a_path_is_shown_without_what_a_terminal_obeys(path: bytes, shown: str) -> None:
    assert readable(path) == shown


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.tmp"], [b"a", b"a/b", b"a/b/c.bin", b"d"]),
        (["a/b"], [b"a", b"a/x.tmp", b"d"]),
        (["b"], [b"a", b"a/x.tmp", b"d"]),
        (["a/*"], [b"a", b"d"]),
        (["c.b?n", "d"], [b"a", b"a/b", b"a/x.tmp"]),
    ],
)
def test_excluded_names_and_paths_are_left_out_with_all_below(
    base: Path, patterns: list[str], left: list[bytes]
) -> None:
    (base / "a/b").mkdir(parents=True)
    for name in ("a/b/c.bin", "a/x.tmp", "d"):
        (base / name).write_bytes(b"")
    assert [item.path for item in scan(os.fsencode(base), exclude=patterns)] == left


def test_of_several_names_of_a_file_the_first_holds_it(base: Path) -> None:
    (base / "b").write_bytes(b"content")
    (base / "a").hardlink_to(base / "b")
    (base / "c").symlink_to("b")
    entries = list(_write(base, Packs()).entries())
    assert [type(entry) for entry in entries] == [File, Hardlink, Symlink]
    assert isinstance(entries[1], Hardlink)
    assert entries[1].target == b"a"


def test_a_placement_names_every_pack_once(base: Path) -> None:
    (base / "d").mkdir()
    for number in range(3):
        (base / f"large{number}").write_bytes(os.urandom(9 << 20))
    written = _write(base, Packs())
    digest = documents.encode(_manifest(written)).digest
    placement = placement_of(digest, written.frames, written.placed)
    assert len(placement.packs) == len(set(placement.packs)) > 1
    assert isinstance(next(written.entries()), Directory)
    documents.decode_placement(documents.encode_placement(placement), _manifest(written), digest)
