"""Manifests that are stored by what differs from another one: small, and never in the way of a restore."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.snapshot.stored_index import another_version
from tests.transfer.conftest import NewWorker
from tests.transfer.workers import Worker, persistent, settle

from packhorse.errors import IntegrityError
from packhorse.snapshot import manifest as documents

NOISE = random.Random(29)


@pytest.fixture
def first(new_worker: NewWorker) -> Worker:
    """A worker with packages of 400 files, pushed."""
    worker = new_worker("first")
    assert worker.root
    for number in range(400):
        worker.write(f"packages/package{number % 7}/module{number}.py", NOISE.randbytes(300))
    settle(worker.path / "packages")
    worker.push()
    return worker


def _upgrade(worker: Worker, number: int = 3) -> str:
    """Change a package and push; the name of the manifest."""
    worker.write(f"packages/package{number}/module{number}.py", NOISE.randbytes(1000))
    worker.push()
    return worker.root.state().manifest


def _object(worker: Worker, digest: str) -> Path:
    store = worker.storage.directory
    assert store is not None
    return store / "manifests" / digest


def _base(worker: Worker, digest: str) -> str:
    return documents.base_of(_object(worker, digest).read_bytes())


def test_the_manifest_of_an_upgrade_is_stored_by_what_differs_from_the_one_before(first: Worker) -> None:
    before = first.root.state().manifest
    after = _upgrade(first)
    assert _base(first, before) == ""
    assert _base(first, after) == before
    assert _object(first, after).stat().st_size * 8 < _object(first, before).stat().st_size


def test_a_chain_never_grows_longer_than_one(first: Worker, new_worker: NewWorker) -> None:
    before = first.root.state().manifest
    for number in range(6):
        assert _base(first, _upgrade(first, number)) == before
    shutil.rmtree(first.path / ".packhorse/manifests")
    assert _base(first, _upgrade(first)) == before, "without its own copies"
    second = new_worker("second")
    second.pull()
    assert _base(second, _upgrade(second, 6)) == before, "nor with those of a pull alone"
    first.pull()
    assert persistent(first.path) == persistent(second.path)


def test_a_manifest_with_little_in_common_is_stored_whole(first: Worker) -> None:
    shutil.rmtree(first.path / "packages")
    for number in range(300):
        first.write(f"packages/other{number}.py", NOISE.randbytes(300))
    first.push()
    assert _base(first, first.root.state().manifest) == ""


def test_a_worker_with_the_base_and_one_with_nothing_both_pull(first: Worker, new_worker: NewWorker) -> None:
    second, third = new_worker("second"), new_worker("third")
    second.pull()
    after = _upgrade(first)
    third.pull()
    assert persistent(third.path) == persistent(first.path)
    _object(first, _base(first, after)).unlink()  # it has that by itself
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _of_another(file: Path) -> None:
    file.write_bytes(documents.encode(documents.Manifest(kind="packages", soabi="another")).whole)


def _of_itself(file: Path) -> None:
    file.write_bytes(documents.DELTA_MAGIC + bytes.fromhex(file.name) + b"nothing of this is ever read")


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, _flip, lambda file: file.write_bytes(b""), _of_another, _of_itself],
    ids=["missing", "a wrong byte", "empty", "another one", "based on itself"],
)
def test_a_base_that_is_lost_or_corrupt_is_told_and_mended_by_a_repair(
    first: Worker, new_worker: NewWorker, packhorse: Packhorse, damage: Callable[[Path], None]
) -> None:
    before = first.root.state().manifest
    after = _upgrade(first)
    damage(_object(first, before))
    second = new_worker("second")
    with pytest.raises(IntegrityError) as refused:
        second.pull()
    assert "push --repair" in refused.value.remedy
    assert (
        before[:12] in refused.value.what
        or "malformed" in refused.value.what
        or "cannot be" in refused.value.what
    )
    done = packhorse("pull", "--root", second.path, "--store", second.storage.url)
    assert done.returncode == 4, done.stderr
    assert second.names("packages") == []
    first.push(repair=True)
    assert _base(first, after) == "", "whole"
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def test_what_others_are_based_on_is_never_replaced(first: Worker, new_worker: NewWorker) -> None:
    snapshots = [first.root.state().snapshot]
    before = first.root.state().manifest
    whole = _object(first, before).read_bytes()
    twin = new_worker("twin")
    twin.pull()
    _upgrade(first)
    snapshots.append(first.root.state().snapshot)
    module = "packages/package3/module3.py"
    shutil.copy2(twin.path / module, first.path / module)
    settle(first.path / "packages")
    first.push()  # back to what it was
    assert first.root.state().manifest == before
    assert _object(first, before).read_bytes() == whole
    for number, snapshot in enumerate(snapshots):
        new_worker(f"reader{number}").pull(snapshot)


def test_two_workers_that_push_the_same_manifest_at_the_same_time_are_both_right(
    first: Worker, new_worker: NewWorker
) -> None:
    """One has the manifest before, the other nothing: one stores it by what differs, the other whole."""
    other = new_worker("other", tag="other")
    assert other.root
    first.write("packages/package3/module3.py", "the same")
    settle(first.path / "packages")
    shutil.rmtree(other.path / "packages")
    shutil.copytree(first.path / "packages", other.path / "packages")
    before = first.root.state().manifest
    first.push()
    digest = first.root.state().manifest
    by_difference = _object(first, digest).read_bytes()
    assert documents.base_of(by_difference) == before
    _object(first, digest).unlink()  # as if the other one had looked before it was there
    other.push()
    assert other.root.state().manifest == digest
    whole = _object(first, digest).read_bytes()
    assert documents.base_of(whole) == ""
    for number, stored in enumerate((whole, by_difference)):
        _object(first, digest).write_bytes(stored)
        for tag in ("main", "other"):
            reader = new_worker(f"reader{number}{tag}", tag=tag)
            reader.pull()
            assert persistent(reader.path) == persistent(first.path)


def test_an_index_and_copies_of_another_version_are_dropped_without_harm(first: Worker) -> None:
    another_version(first.root.index, 2)
    for copy in (first.path / ".packhorse/manifests").iterdir():  # as format 1 kept them
        copy.write_bytes(documents.Encoded(copy.name, copy.read_bytes()).whole)
    assert first.pull().pulled == []
    assert first.push().pushed == []
    _upgrade(first)
