"""Snapshots that were stored once, and have to stay readable: `golden/` has a store for each version of the format.

`golden/2` was written by `write` below. `golden/1` and `golden/1-gpu` were written by versions that knew no labels and
cut every large file alike. Where a test here fails, the format changed: it needs a new version number, and a reader for
the old one.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.conftest import Packhorse
from tests.snapshot.fatbins import Section, code, container, library
from tests.snapshot.trees import listing
from tests.transfer.workers import LONG_AGO, Worker, settle

from packhorse.config import Storage
from packhorse.install.interpreter import Interpreter
from packhorse.snapshot import manifest as documents
from packhorse.store import tags

PYTHON = Interpreter(
    path="python3", version="3.11.7", soabi="cpython-311-x86_64-linux-gnu", platform="linux-x86_64"
)


class Golden(NamedTuple):
    """A store, and the names of what it holds."""

    name: str
    format: int
    snapshot: str
    packages: str
    shared: str
    before: str = ""
    """The packages manifest of the push before."""

    @property
    def store(self) -> Path:
        return Path(__file__).with_name("golden") / self.name


ONE = Golden(
    "1",
    1,
    snapshot="d22c3db9360e250a0e02761af78c13400a5e483356c919d745a7c371be219750",
    packages="16dbfb35c65415dad656f551b07070dd0c96bb5f29010d7faed182741792c7ea",
    shared="bf2b7d4109a72e15d5424ae84993b9a6398322823d8ea33c56339eb67fe2856b",
)
ONE_GPU = Golden(
    "1-gpu",
    1,
    snapshot="f9e0a858388e5268e95895309c0e5621c3b22f1cbebc3185af8b4f624d731e7b",
    packages="bfbd42e8ad7c3ca5d6965c27f945d4bf9f683c168befec815af1a1e8177ea0f8",
    shared=ONE.shared,
)
TWO = Golden(
    "2",
    2,
    snapshot="82f10cc5bc3169343c475bedaa0aac3038c7df097366394520c6ea166db6222d",
    packages="2929efa190c8af6475af6ab5f8b7682a1756afac90dad6554c614340b4e628e4",
    shared="142eb26875efabb06c8b5e97e4093829c18b2aa4e027c0fedcff53b24a284a30",
    before="2cb5792e191fb8705a2927ed39f54ac56abbbf770d880be03cc84aaa29c70c64",
)


def fill(root: Path) -> None:
    """The tree that was stored."""
    base = os.fsencode(root / "packages")
    chance = random.Random(2)
    for name, content in {
        b"plain.py": b"print('packhorse')\n" * 40,
        b"\xff\xfe": b"a name that is no UTF-8",
        b"new\nline": chance.randbytes(1000),
        b"x" * 255: b"",
        b"library.so": b"0123456789abcdef" * (9 << 16) + bytes(8 << 20) + b"the end",
        b"read-only": b"read-only",
        b"directory/file": b"below",
    }.items():
        path = os.path.join(base, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        os.chmod(path, 0o644)
    (root / "packages/read-only").chmod(0o444)
    (root / "packages/directory").chmod(0o750)
    (root / "packages/empty").mkdir()
    (root / "packages/empty").chmod(0o755)
    (root / "packages/link").symlink_to("directory/file")
    (root / "packages/other name").hardlink_to(root / "packages/plain.py")
    (root / "models/nested").mkdir()
    (root / "models/nested").chmod(0o755)
    (root / "models/nested/model").write_bytes(chance.randbytes(2000))
    (root / "models/nested/model").chmod(0o640)
    _settle(root)


def fill_with_gpu_code(root: Path) -> None:
    """The tree of the others: also a library with code for GPUs."""
    fill(root)
    for number in range(40):
        (root / f"packages/module{number}.py").write_bytes(b"%d\n" % number)
    write_library(root, b"second version")


def write_library(root: Path, content: bytes) -> None:
    """The library, with this in one of the payloads for sm_90."""
    codes = [code(name, 300_000) for name in ("sm_80", "sm_90", "compute_90")]
    other = codes[1]._replace(payload=content.ljust(300_000, b"*"))
    fatbins = container(*codes) + container(codes[0], other)
    (root / "packages/gpu.so").write_bytes(
        library(Section(b".text", b"\x90" * 5000), Section(b".nv_fatbin", fatbins))
    )
    _settle(root)


def _settle(root: Path) -> None:
    for name in ("packages", "models"):
        settle(root / name)
        (root / name).chmod(0o700)


def write(store: Path, root: Path) -> Worker:
    """Push the tree of `golden/2` twice from a new root."""
    worker = Worker(root, Storage(url=store.as_uri()), interpreter=PYTHON)
    assert worker.root
    fill_with_gpu_code(root)
    for content in (b"first version", b"second version"):
        write_library(root, content)
        worker.push()
    return worker


@pytest.fixture(params=[ONE, ONE_GPU, TWO], ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each of the stores."""
    found: Golden = request.param
    return found


@pytest.fixture
def worker(golden: Golden, tmp_path: Path) -> Worker:
    """An empty root beside a copy of the golden store."""
    shutil.copytree(golden.store, tmp_path / "store")
    return Worker(tmp_path / "root", Storage(url=(tmp_path / "store").as_uri()), interpreter=PYTHON)


@pytest.fixture
def expected(golden: Golden, tmp_path: Path) -> Path:
    """The tree that was stored."""
    root = tmp_path / "expected"
    for name in ("packages", "models"):
        (root / name).mkdir(parents=True)
    (fill if golden is ONE else fill_with_gpu_code)(root)
    return root


def test_a_golden_snapshot_is_restored(golden: Golden, worker: Worker, expected: Path) -> None:
    pulled = worker.pull()
    assert pulled.snapshot == golden.snapshot
    for name in ("packages", "models"):
        assert listing(worker.path / name) == listing(expected / name)
    assert (worker.path / "packages/library.so").stat().st_mtime_ns == LONG_AGO + len("library.so")
    assert worker.push().pushed == []
    assert worker.pull().pulled == []


def test_a_golden_snapshot_is_restored_by_its_id(golden: Golden, worker: Worker) -> None:
    assert worker.pull(golden.snapshot[:12]).pulled == ["packages", "shared"]


@pytest.mark.parametrize("golden", [ONE], ids=["1"], indirect=True)
def test_what_an_older_version_pushed_is_built_upon(worker: Worker, tmp_path: Path) -> None:
    """Its frames are not sent again, and its manifest is what the next one is stored beside."""
    worker.pull()
    for number in range(40):
        worker.write(f"packages/module{number}.py", b"%d\n" % number)
    assert worker.push().transferred_bytes < 2_000
    another = Worker(tmp_path / "another", worker.storage, interpreter=PYTHON)
    another.pull()
    assert listing(another.path / "packages") == listing(worker.path / "packages")


def test_without_an_index_a_restored_file_is_known_however_it_was_cut(
    worker: Worker, packhorse: Packhorse
) -> None:
    worker.pull()
    index = worker.path / ".packhorse/index"
    index.unlink()
    verified = packhorse("verify", "--root", worker.path, "--store", worker.storage.url)
    assert verified.returncode == 0, verified.stderr
    assert worker.pull().pulled == []
    index.unlink()
    assert worker.push().pushed == []


def test_the_same_tree_still_gives_the_same_documents(tmp_path: Path) -> None:
    worker = write(tmp_path / "store", tmp_path / "root")
    state = worker.root.state()
    assert (state.manifest, state.shared) == (TWO.packages, (TWO.shared,))
    assert {path.name for path in (tmp_path / "store/manifests").iterdir()} == {
        TWO.packages, TWO.before, TWO.shared,
    }  # fmt: skip


def test_what_a_golden_manifest_says_can_be_read_without_packhorse(golden: Golden) -> None:
    """Pins the bytes: fields, their order and their types."""
    import msgspec
    from blake3 import blake3

    from packhorse.snapshot.frames import zstd

    stored = (golden.store / "manifests" / golden.packages).read_bytes()
    magic, newline, body = stored.partition(b"\n")
    if golden.format == 1:
        assert (magic, newline) == (b"packhorse-manifest", b"\n")
        raw = zstd.decompress(body)
    else:
        assert (magic, newline) == (b"packhorse-manifest-delta", b"\n")
        assert body[:32].hex() == golden.before
        magic, _, whole = (golden.store / "manifests" / golden.before).read_bytes().partition(b"\n")
        assert magic == b"packhorse-manifest"
        before = zstd.decompress(whole)
        assert blake3(before).hexdigest() == golden.before
        raw = zstd.decompress(body[32:], zstd.ZstdDict(before, is_raw=True).as_prefix)
    assert blake3(raw).hexdigest() == golden.packages
    plain = msgspec.msgpack.decode(raw)
    assert list(plain) == [
        "format", "kind", "fingerprint", "soabi", "platform", "frames", "entries", "stamps", "stamped",
    ]  # fmt: skip
    assert (plain["format"], plain["kind"], plain["soabi"]) == (golden.format, "packages", PYTHON.soabi)
    assert plain["entries"][0] == ["d", b"directory", 0o750, LONG_AGO + 9]
    assert [entry[:2] for entry in plain["entries"]][-2:] == [["f", b"x" * 255], ["f", b"\xff\xfe"]]
    assert ["l", b"link", LONG_AGO + 4, b"directory/file"] in plain["entries"]
    assert ["h", b"plain.py", b"other name"] in plain["entries"]
    manifest = documents.decode_manifest(documents.Encoded(golden.packages, raw), "packages")
    assert manifest.files == (9 if golden is ONE else 50)
    assert sum(file.stat().st_size for file in golden.store.rglob("*") if file.is_file()) < 30_000


def test_what_the_golden_manifest_says_of_a_library_with_gpu_code() -> None:
    store = Worker(Path(), Storage(url=TWO.store.as_uri())).store
    manifest = documents.decode_manifest(tags.get_manifest(store, TWO.packages), "packages")
    [entry] = [each for each in manifest.entries if each.path == b"gpu.so"]
    assert isinstance(entry, documents.File)
    runs = [
        (manifest.frames[frame].gpus, offset, length)
        for frame, offset, length in documents.triples(entry.pieces)
    ]
    assert [run for run in runs if run[0]] == [
        ("80-89", 0, 300_000),
        ("90-99", 0, 300_000),
        ("91-", 0, 300_000),
        ("80-89", 300_000, 300_000),
        ("90-99", 300_000, 300_000),
    ]
    needed = [run for run in runs if not run[0]]
    assert [offset for _, offset, _ in needed] == [sum(run[2] for run in needed[:n]) for n in range(6)]
    assert len(set(entry.pieces[::3])) == 4
