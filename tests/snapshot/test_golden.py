"""A snapshot that was stored once, and has to stay readable: `golden/` is a store, written by `write` below.

Where a test here fails, the format changed: it needs a new version number, and a reader for the old one.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from tests.snapshot.trees import listing
from tests.transfer.workers import LONG_AGO, Worker, settle

from packhorse.config import Storage
from packhorse.install.interpreter import Interpreter
from packhorse.snapshot import manifest as documents

GOLDEN = Path(__file__).with_name("golden")
PYTHON = Interpreter(
    path="python3", version="3.11.7", soabi="cpython-311-x86_64-linux-gnu", platform="linux-x86_64"
)
SNAPSHOT = "d22c3db9360e250a0e02761af78c13400a5e483356c919d745a7c371be219750"
PACKAGES = "16dbfb35c65415dad656f551b07070dd0c96bb5f29010d7faed182741792c7ea"
SHARED = ("bf2b7d4109a72e15d5424ae84993b9a6398322823d8ea33c56339eb67fe2856b",)


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
    for name in ("packages", "models"):
        settle(root / name)
        (root / name).chmod(0o700)


def write() -> None:
    """Write `golden/`, for the next version of the format."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    root = GOLDEN.with_name("golden-root")
    worker = Worker(root, Storage(url=GOLDEN.as_uri()), interpreter=PYTHON)
    assert worker.root
    fill(root)
    worker.push()
    shutil.rmtree(root)


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    """An empty root beside a copy of the golden store."""
    shutil.copytree(GOLDEN, tmp_path / "store")
    return Worker(tmp_path / "root", Storage(url=(tmp_path / "store").as_uri()), interpreter=PYTHON)


def test_the_golden_snapshot_is_restored(worker: Worker, tmp_path: Path) -> None:
    pulled = worker.pull()
    assert pulled.snapshot == SNAPSHOT
    expected = tmp_path / "expected"
    for name in ("packages", "models"):
        (expected / name).mkdir(parents=True)
    fill(expected)
    for name in ("packages", "models"):
        assert listing(worker.path / name) == listing(expected / name)
    assert (worker.path / "packages/library.so").stat().st_mtime_ns == LONG_AGO + len("library.so")
    assert worker.push().pushed == []


def test_the_golden_snapshot_is_restored_by_its_id(worker: Worker) -> None:
    assert worker.pull(SNAPSHOT[:12]).pulled == ["packages", "shared"]


def test_the_same_tree_still_gives_the_same_documents(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "root", Storage(url=(tmp_path / "store").as_uri()), interpreter=PYTHON)
    assert worker.root
    fill(worker.path)
    worker.push()
    state = worker.root.state()
    assert (state.manifest, state.shared) == (PACKAGES, SHARED)


def test_what_the_golden_manifest_says_can_be_read_without_packhorse() -> None:
    """Pins the bytes: fields, their order and their types."""
    import msgspec
    from blake3 import blake3

    from packhorse.snapshot.frames import zstd

    stored = (GOLDEN / "manifests" / PACKAGES).read_bytes()
    magic, newline, body = stored.partition(b"\n")
    assert (magic, newline) == (b"packhorse-manifest", b"\n")
    raw = zstd.decompress(body)
    assert blake3(raw).hexdigest() == PACKAGES
    plain = msgspec.msgpack.decode(raw)
    assert list(plain) == [
        "format", "kind", "fingerprint", "soabi", "platform", "frames", "entries", "stamps", "stamped",
    ]  # fmt: skip
    assert (plain["format"], plain["kind"], plain["soabi"]) == (1, "packages", PYTHON.soabi)
    assert plain["entries"][0] == ["d", b"directory", 0o750, LONG_AGO + 9]
    assert [entry[:2] for entry in plain["entries"]][-2:] == [["f", b"x" * 255], ["f", b"\xff\xfe"]]
    assert ["l", b"link", LONG_AGO + 4, b"directory/file"] in plain["entries"]
    assert ["h", b"plain.py", b"other name"] in plain["entries"]
    assert documents.decode_manifest(stored, PACKAGES, "packages").files == 9
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 30_000
