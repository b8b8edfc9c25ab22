"""Memory stays bounded whatever the size, and holes stay holes."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server

MIB = 1 << 20
SIZE = 16 << 30


@pytest.fixture(autouse=True)
def two_processors() -> Iterator[None]:
    """With more of them more memory may be used."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(mine)[:2])
    yield
    os.sched_setaffinity(0, mine)


def test_a_sparse_model_of_16_gb_is_pushed_and_pulled_in_256_mib(
    packhorse: Packhorse, seaweedfs: S3Server, tmp_path: Path
) -> None:
    chance = random.Random(9)
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "models").mkdir(parents=True, mode=0o700)
    first.chmod(0o700)
    islands = {
        offset: chance.randbytes(3 * MIB) for offset in (0, 5 << 30, (11 << 30) + 12_345, SIZE - 3 * MIB)
    }
    with (first / "models" / "model.safetensors").open("wb") as model:
        model.truncate(SIZE)
        for offset, content in islands.items():
            model.seek(offset)
            model.write(content)
    for number in range(20):
        (first / "models" / f"shard{number}").write_bytes(chance.randbytes(6 * MIB))
    env = {**seaweedfs.environ(), "PACKHORSE_STORAGE_ENDPOINT": seaweedfs.endpoint}
    store = f"s3://{seaweedfs.new_bucket()}"
    results = []
    for command, root in (("push", first), ("pull", second)):
        done = packhorse(command, "--json", "-q", "--root", root, "--store", store, env=env)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
        assert results[-1]["peak_rss_bytes"] < 256 * MIB
        assert results[-1]["bytes"] == SIZE + 120 * MIB
        assert 120 * MIB < results[-1]["transferred_bytes"] < 200 * MIB
    restored = second / "models" / "model.safetensors"
    assert restored.stat().st_size == SIZE
    assert restored.stat().st_blocks * 512 < 80 * MIB
    with restored.open("rb") as model:
        for offset, content in islands.items():
            model.seek(offset)
            assert model.read(len(content)) == content
        model.seek(7 << 30)
        assert model.read(MIB) == bytes(MIB)
    for number in range(20):
        assert (second / "models" / f"shard{number}").read_bytes() == (
            first / "models" / f"shard{number}"
        ).read_bytes()
    assert not os.listdir(second / "packages")


@pytest.mark.parametrize(
    ("words", "pieces", "modules"),
    [(["--threads", "8"], 36, 4000), (["--threads", "3", "--level", "best"], 3, 200)],
)
def test_a_push_stays_within_256_mb_whatever_its_threads_and_its_level(
    packhorse: Packhorse, seaweedfs: S3Server, root_path: Path, words: list[str], pieces: int, modules: int
) -> None:
    chance = random.Random(4)
    packages = root_path / "packages"
    packages.mkdir(parents=True, mode=0o700)
    root_path.chmod(0o700)
    seven_bits = bytes(number & 127 for number in range(256))
    with (packages / "library.so").open("wb") as library:
        for _ in range(pieces):  # an eighth can be saved, for which every byte has to be looked at
            library.write(chance.randbytes(8 * MIB).translate(seven_bits))
    for number in range(modules):
        lines = (f"def function_{line}(a, b={chance.random()}): return a" for line in range(400))
        (packages / f"module{number}.py").write_text("\n".join(lines))
    env = {**seaweedfs.environ(), "PACKHORSE_STORAGE_ENDPOINT": seaweedfs.endpoint}
    store = f"s3://{seaweedfs.new_bucket()}"
    done = packhorse("push", "--json", "-q", "--root", root_path, "--store", store, *words, env=env)
    assert done.returncode == 0, done.stderr
    pushed = json.loads(done.stdout)
    assert pushed["bytes"] > pieces * 8 * MIB
    assert pushed["peak_rss_bytes"] < 256_000_000
