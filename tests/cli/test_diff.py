"""`packhorse diff` tells what changed between snapshots, tags and the root, by what people call it, and changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.install.index import Index
from tests.servers import S3Server

from packhorse.config import Storage
from packhorse.store.objects import Store
from packhorse.transfer.line import GAP


@pytest.fixture
def storage(seaweedfs: S3Server) -> Storage:
    """A bucket of a real server."""
    return Storage(url=f"s3://{seaweedfs.new_bucket()}/envs", endpoint=seaweedfs.endpoint)


@pytest.fixture
def environ(
    environ: dict[str, str], root_path: Path, index: Index, storage: Storage, seaweedfs: S3Server
) -> dict[str, str]:
    """One root, one store and one index for all commands of a test."""
    return {
        **index.environ(environ),
        **seaweedfs.environ(),
        "PACKHORSE_ROOT": str(root_path),
        "PACKHORSE_STORAGE_URL": storage.url,
        "PACKHORSE_STORAGE_ENDPOINT": storage.endpoint,
    }


def _json(packhorse: Packhorse, *words: str | Path, code: int = 0, **options: Any) -> dict[str, Any]:
    done = packhorse(*words, "--json", **options)
    assert done.returncode == code, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts


def _snapshot(packhorse: Packhorse, dependencies: Sequence[str]) -> str:
    """Install these and push; returns the snapshot's id."""
    file = packhorse.directory / "packhorse.toml"
    file.write_text(f"[environment]\ndependencies = {json.dumps(list(dependencies))}\n")
    _json(packhorse, "install")
    snapshot: str = _json(packhorse, "push")["snapshot"]
    return snapshot


def _counts(change: dict[str, Any]) -> tuple[int, int, int]:
    return change["added"], change["removed"], change["changed"]


def test_files_are_told_by_their_distribution_whatever_they_are_called(
    packhorse: Packhorse, index: Index, root_path: Path
) -> None:
    image = {"IMG/__init__.py": "", "IMG/png.py": "a = 1\n", "_img_native.so": b"\x7fELF one"}
    index.add("picture", "1.0", image)
    index.add(
        "picture", "2.0", {**image, "IMG/png.py": "a = 2\n", "IMG/webp.py": "", "_img_native.so": b"\x7fELF"}
    )
    index.add("vendor-blas", "1.0", {"vendor/blas/lib.so": os.urandom(2_000_000)})
    index.add("vendor-fft", "1.0", {"vendor/fft/lib.so": os.urandom(1_500_000)})
    index.add("vendor-fft", "1.1", {"vendor/fft/lib.so": os.urandom(1_600_000)})
    index.add("gone", "3", {"gone.py": ""})
    before = _snapshot(packhorse, ["picture==1.0", "vendor-blas", "vendor-fft==1.0", "gone"])
    after = _snapshot(packhorse, ["picture==2.0", "vendor-blas", "vendor-fft==1.1"])
    found = _json(packhorse, "diff", before, after)
    assert [(each["name"], each["old"], each["new"]) for each in found["distributions"]] == [
        ("gone", "3", ""),
        ("picture", "1.0", "2.0"),
        ("vendor-fft", "1.0", "1.1"),
    ]
    assert found["paths"] == []
    gone, picture, fft = found["distributions"]
    metadata = len(list((root_path / "packages/picture-2.0.dist-info").iterdir()))
    assert _counts(gone) == (0, 2 + metadata, 0)
    assert _counts(picture)[:2] == (2 + metadata, metadata)
    assert picture["changed"] >= 3, "a module, its bytecode, the library"
    assert _counts(fft) == (metadata, metadata, 1)
    assert 1_600_000 <= fft["bytes"] < 1_610_000
    assert 100_000 <= fft["disk_bytes"] < 110_000
    table = packhorse("diff", before[:8], after[:8]).stdout
    assert "vendor-fft" in table
    assert "vendor-blas" not in table


def test_the_bytes_to_fetch_are_those_that_a_pull_then_fetches(
    packhorse: Packhorse, index: Index, root_path: Path, tmp_path: Path
) -> None:
    for version in ("1", "2"):
        index.add("library", version, {"library/one.so": os.urandom(9_000_000), "library/two.py": version})
    index.add("other", "1", {"other/data": os.urandom(3_000_000), "other/small": os.urandom(700_000)})
    before = _snapshot(packhorse, ["library==1", "other"])
    (root_path / "models/weights").write_bytes(os.urandom(5_000_000))
    (root_path / "models/zeros").write_bytes(bytes(10_000_000))
    after = _snapshot(packhorse, ["library==2", "other"])
    found = _json(packhorse, "diff", before, after)
    worker = tmp_path / "worker"
    _json(packhorse, "pull", before, "--root", worker)
    fetched = _json(packhorse, "pull", after, "--root", worker)["transferred_bytes"]
    assert 0 <= fetched - found["fetch_bytes"] <= 10 * GAP
    assert 14_000_000 < found["fetch_bytes"] < 20_000_000
    everything = _json(packhorse, "pull", after, "--root", tmp_path / "new")["transferred_bytes"]
    assert 0 <= everything - found["whole_bytes"] <= 10 * GAP
    assert found["disk_bytes"] == found["b"]["bytes"] - found["a"]["bytes"] >= 15_000_000


def test_other_files_are_told_by_the_directory_they_lie_in(packhorse: Packhorse, root_path: Path) -> None:
    def write(name: str, size: int) -> None:
        (root_path / name).parent.mkdir(parents=True, exist_ok=True)
        (root_path / name).write_bytes(os.urandom(size))

    packhorse("status")
    write("models/llama/weights", 2_000_000)
    write("models/llama/config.json", 100)
    write("deps/tool", 10)
    before = _json(packhorse, "push")["snapshot"]
    write("models/llama/config.json", 150)
    write("models/qwen/deep/weights", 1_000)
    write("packages/by-hand/module.py", 20)
    (root_path / "deps/tool").chmod(0o755)
    found = _json(packhorse, "diff", before, _json(packhorse, "push")["snapshot"])
    assert {each["path"]: (*_counts(each), each["disk_bytes"]) for each in found["paths"]} == {
        "deps/tool": (0, 0, 1, 0),
        "models/llama": (0, 0, 1, 50),
        "models/qwen": (1, 0, 0, 1_000),
        "packages/by-hand": (1, 0, 0, 20),
    }
    assert found["distributions"] == []


def test_without_a_second_it_is_the_root_as_it_is_now(
    packhorse: Packhorse, index: Index, root_path: Path
) -> None:
    index.add("module", "1", {"module/__init__.py": "x = 1\n", "module/data": os.urandom(2_000_000)})
    pushed = _snapshot(packhorse, ["module"])
    assert _json(packhorse, "diff", "main")["distributions"] == []
    (root_path / "packages/module/__init__.py").write_text("x = 2\n")
    (root_path / "models/new").write_bytes(b"12345")
    found = _json(packhorse, "diff", pushed)
    [module] = found["distributions"]
    assert (module["name"], module["old"], module["new"]) == ("module", "1", "1")
    assert _counts(module) == (0, 0, 1)
    assert [each["path"] for each in found["paths"]] == ["models/new"]
    assert found["b"]["name"] == str(root_path)
    assert found["fetch_bytes"] is None
    assert "fetches" not in packhorse("diff", "main").stdout


def test_bytecode_written_later_belongs_to_the_distribution_of_its_source(
    packhorse: Packhorse, index: Index, root_path: Path
) -> None:
    index.add("module", "1", {"pkg/__init__.py": "x = 1\n"})
    pushed = _snapshot(packhorse, ["module"])
    shutil.copy(
        next((root_path / "packages/pkg/__pycache__").iterdir()),
        root_path / "packages/pkg/__pycache__/__init__.cpython-399.opt-1.pyc",
    )
    [change] = _json(packhorse, "diff", pushed)["distributions"]
    assert (change["name"], _counts(change)) == ("module", (1, 0, 0))


def test_times_alone_are_no_difference_but_are_fetched(packhorse: Packhorse, root_path: Path) -> None:
    packhorse("status")
    (root_path / "packages/file").write_bytes(os.urandom(2_000_000))
    before = _json(packhorse, "push")["snapshot"]
    os.utime(root_path / "packages/file", (1, 1))
    after = _json(packhorse, "push")["snapshot"]
    assert before != after
    found = _json(packhorse, "diff", before, after)
    assert (found["distributions"], found["paths"], found["fetch_bytes"]) == ([], [], 2_000_000)
    assert "Nothing differs" in packhorse("diff", before, after).stdout


def test_a_tag_is_its_newest_packages_and_wins_over_an_id_that_looks_alike(
    packhorse: Packhorse, root_path: Path
) -> None:
    packhorse("status")
    (root_path / "packages/file").write_text("one")
    first = _json(packhorse, "push")["snapshot"]
    (root_path / "packages/file").write_text("other")
    second = _json(packhorse, "push", "--tag", first[:8])["snapshot"]
    found = _json(packhorse, "diff", first, first[:8])
    assert (found["a"]["snapshot"], found["b"]["snapshot"]) == (first, second)
    assert _json(packhorse, "diff", "main", first[:9])["paths"] == []


def test_the_longest_tag_is_found(packhorse: Packhorse, root_path: Path) -> None:
    packhorse("status")
    (root_path / "packages/file").write_text("one")
    for tag in ("t" * 64, "0" * 64):
        pushed = _json(packhorse, "push", "--tag", tag)["snapshot"]
        assert _json(packhorse, "diff", tag)["a"]["snapshot"] == pushed


@pytest.mark.parametrize("name", ["nosuchtag", "1234567", "123456789a", "../x", "f" * 64])
def test_what_does_not_exist_ends_with_3(packhorse: Packhorse, name: str) -> None:
    facts = _json(packhorse, "diff", name, code=3)
    assert "`packhorse snapshots` lists" in facts["remedy"]


def test_it_changes_nothing(
    packhorse: Packhorse, index: Index, storage: Storage, seaweedfs: S3Server
) -> None:
    index.add("module", "1")
    index.add("module", "2")
    before, after = _snapshot(packhorse, ["module==1"]), _snapshot(packhorse, ["module==2"])
    store = Store(storage, seaweedfs.environ())
    listing = store.list("")
    assert _json(packhorse, "diff", before, after)["distributions"]
    assert store.list("") == listing


def test_a_pack_that_is_missing_ends_with_4(
    packhorse: Packhorse, index: Index, storage: Storage, seaweedfs: S3Server
) -> None:
    index.add("module", "1")
    index.add("module", "2")
    before, after = _snapshot(packhorse, ["module==1"]), _snapshot(packhorse, ["module==2"])
    store = Store(storage, seaweedfs.environ())
    store.delete([item.key for item in store.list("packs/")])
    assert "is missing from the store" in _json(packhorse, "diff", before, after, code=4)["error"]


@pytest.mark.parametrize("record", ["sized.py," + "x" * 200_000, "nul.py\0,,\n", "\ud800.py,,\n"])
def test_a_record_that_is_none_tells_nothing_and_breaks_nothing(
    packhorse: Packhorse, root_path: Path, record: str
) -> None:
    packhorse("status")
    info = root_path / "packages/module-1.dist-info"
    info.mkdir()
    (root_path / "packages/sized.py").write_text("x = 1\n")
    (info / "RECORD").write_bytes(record.encode(errors="surrogatepass"))
    before = _json(packhorse, "push")["snapshot"]
    (root_path / "packages/sized.py").write_text("x = 2\n")
    after = _json(packhorse, "push")["snapshot"]
    for words in ((before, after), (before,)):
        found = _json(packhorse, "diff", *words)
        assert (found["distributions"], [each["path"] for each in found["paths"]]) == (
            [],
            ["packages/sized.py"],
        )


def test_a_record_of_the_root_that_leads_elsewhere_is_not_followed(
    packhorse: Packhorse, root_path: Path, tmp_path: Path
) -> None:
    packhorse("status")
    (root_path / "packages/file").write_text("")
    pushed = _json(packhorse, "push")["snapshot"]
    info = root_path / "packages/module-1.dist-info"
    info.mkdir()
    os.mkfifo(tmp_path / "fifo")
    (info / "RECORD").symlink_to(tmp_path / "fifo")
    (root_path / "packages/module.py").write_text("")
    found = _json(packhorse, "diff", pushed, timeout=60)
    assert [each["name"] for each in found["distributions"]] == ["module"]
    assert [each["path"] for each in found["paths"]] == ["packages/module.py"]


def test_the_record_of_a_distribution_called_as_the_directory_is_read_before_the_others(
    packhorse: Packhorse, root_path: Path
) -> None:
    packhorse("status")
    for name in ("early", "module", "late"):
        _distribution(root_path, name, size=2_000_000)
    before = _json(packhorse, "push")["snapshot"]
    cached = root_path / "packages/module/__pycache__"
    cached.mkdir()
    (cached / "f0.cpython-311.pyc").write_bytes(b"")
    found = _json(packhorse, "diff", before, _json(packhorse, "push")["snapshot"])
    assert [(each["name"], _counts(each)) for each in found["distributions"]] == [("module", (1, 0, 0))]
    assert 0 < found["transferred_bytes"] < 3_000_000, "one frame of three"


def test_many_distributions_are_compared_in_256_mib(packhorse: Packhorse, root_path: Path) -> None:
    packhorse("status")
    for number in range(100):
        _distribution(root_path, f"module{number}", size=3_500_000, random=False)
    before = _json(packhorse, "push")["snapshot"]
    (root_path / "packages/by-hand").write_text("in no RECORD, so that all are read")
    after = _json(packhorse, "push")["snapshot"]
    script = (
        "import sys\nfrom packhorse.cli import packhorse\nfrom packhorse.watch import memory\n"
        "packhorse(sys.argv[1:], standalone_mode=False)\nprint(memory.peak(), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "diff", "-q", "--json", before, after],
        cwd=packhorse.directory, env=dict(packhorse.environ), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [each["path"] for each in json.loads(done.stdout)["paths"]] == ["packages/by-hand"]
    assert int(done.stderr) < 256 << 20


def _distribution(root_path: Path, name: str, *, size: int, random: bool = True) -> None:
    """Files of 50 kB that are `size` bytes together, in a frame with their RECORD."""
    directory, info = (root_path / "packages" / each for each in (name, f"{name}-1.dist-info"))
    directory.mkdir()
    info.mkdir()
    for number in range(size // 50_000):
        start = f"{name} {number}".encode()
        (directory / f"f{number}.py").write_bytes(
            os.urandom(50_000) if random else start + bytes(50_000 - len(start))
        )
    names = [f"{name}/{file.name}" for file in directory.iterdir()]
    (info / "RECORD").write_text("".join(f"{each},,\n" for each in [*names, f"{name}-1.dist-info/RECORD"]))
