"""Libraries with code for GPUs: what is pushed of them, and that they come back whole from their gathered frames."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.snapshot.fatbins import Code, Section, code, container, library
from tests.transfer.conftest import NewWorker
from tests.transfer.test_pull import _has_staged, _killed_once, _start
from tests.transfer.workers import Worker, persistent, settle

from packhorse.snapshot import manifest as documents
from packhorse.snapshot.manifest import File, Manifest, triples
from packhorse.store import tags

MIB = 1 << 20
NOISE = random.Random(23)
TEXT = Section(b".text", NOISE.randbytes(2 * MIB))


def _noise(name: str, size: int = 3 * MIB) -> Code:
    return code(name, size)._replace(payload=NOISE.randbytes(size))


def _library(codes: list[Code]) -> bytes:
    """A library with a container for each two codes."""
    pairs = [container(*codes[number : number + 2]) for number in range(0, len(codes), 2)]
    return library(TEXT, Section(b".nv_fatbin", b"".join(pairs)))


@pytest.fixture
def codes() -> list[Code]:
    """Code of 24 MiB for two architectures, in turn."""
    return [_noise("sm_80" if number % 2 == 0 else "sm_90") for number in range(8)]


@pytest.fixture
def first(new_worker: NewWorker, codes: list[Code]) -> Worker:
    """A worker with a library with that code, and something beside it."""
    worker = new_worker("first")
    assert worker.root
    worker.write("packages/nvidia/lib.so", _library(codes))
    worker.write("packages/module.py", NOISE.randbytes(100_000))
    settle(worker.path / "packages")
    return worker


def _manifest(worker: Worker) -> Manifest:
    digest = worker.root.state().manifest
    return documents.decode_manifest(tags.get_manifest(worker.store, digest), "packages")


def _runs(manifest: Manifest, path: bytes = b"nvidia/lib.so") -> list[tuple[str, int, int]]:
    """Label, frame and length of each run of a library."""
    [entry] = [each for each in manifest.entries if each.path == path]
    assert isinstance(entry, File)
    return [(manifest.frames[frame].gpus, frame, length) for frame, _, length in triples(entry.pieces)]


def test_code_for_each_gpu_lies_in_frames_of_its_own_and_comes_back(
    first: Worker, new_worker: NewWorker
) -> None:
    first.push()
    runs = _runs(_manifest(first))
    frames_by_label: dict[str, set[int]] = {}
    for label, frame, _ in runs:
        frames_by_label.setdefault(label, set()).add(frame)
    assert {label: len(frames) for label, frames in frames_by_label.items()} == {
        "": 1,
        "80-89": 2,
        "90-99": 2,
    }
    assert sum(length for label, _, length in runs if label) == 24 * MIB
    second = new_worker("second")
    second.pull()
    assert persistent(second.path) == persistent(first.path)
    assert second.pull().pulled == second.push().pushed == first.push().pushed == []


def test_a_change_of_one_code_sends_and_fetches_about_its_frame(
    first: Worker, new_worker: NewWorker, codes: list[Code]
) -> None:
    second = new_worker("second")
    first.push()
    second.pull()
    codes[3] = codes[3]._replace(payload=NOISE.randbytes(3 * MIB))
    first.write("packages/nvidia/lib.so", _library(codes))
    assert first.push().transferred_bytes < 9 * MIB
    assert second.pull().transferred_bytes < 40 * MIB, "the file is written anew"
    assert persistent(second.path) == persistent(first.path)
    codes[5] = _noise("sm_90", 2 * MIB)
    codes += [_noise("sm_100"), _noise("sm_80")]
    first.write("packages/nvidia/lib.so", _library(codes))
    first.push()
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def test_an_unchanged_library_keeps_its_cut_and_is_not_sent_again(
    first: Worker, new_worker: NewWorker
) -> None:
    first.push()
    second = new_worker("second")
    second.pull()
    before = _runs(_manifest(second))
    second.write("packages/new.py", "new")
    assert second.push().transferred_bytes < MIB
    assert [(label, length) for label, _, length in _runs(_manifest(second))] == [
        (label, length) for label, _, length in before
    ]
    third = new_worker("third")
    third.pull()
    assert persistent(third.path) == persistent(second.path)


def test_equal_code_under_different_labels_is_needed_by_all_that_need_either(
    new_worker: NewWorker,
) -> None:
    worker = new_worker("first")
    assert worker.root
    same = NOISE.randbytes(2 * MIB)
    codes = [code(name, MIB) for name in ("sm_80", "sm_90", "sm_80", "sm_90")]
    for number in range(4):
        codes[number] = codes[number]._replace(payload=same[:MIB] if number < 2 else same[MIB:])
    worker.write("packages/equal.so", _library([*codes, _noise("sm_100")]))
    worker.write("packages/other.so", _library([codes[0], _noise("sm_90")]))
    settle(worker.path / "packages")
    worker.push()
    assert {label for label, *_ in _runs(_manifest(worker), b"equal.so")} == {"", "100-110"}
    second = new_worker("second")
    second.pull()
    assert persistent(second.path) == persistent(worker.path)
    second.write("packages/new.py", "new")  # what the index and the manifest tell of the others is used again
    second.push()
    third = new_worker("third")
    third.pull()
    assert persistent(third.path) == persistent(second.path)


def test_libraries_with_the_same_frames_in_another_order_are_not_the_same(
    new_worker: NewWorker, packhorse: Packhorse
) -> None:
    """Only where the runs lie tells them apart: three labels, each twice, all runs of one length."""
    worker = new_worker("first")
    assert worker.root
    names = ("sm_80", "sm_90", "sm_100")
    payloads = {name: [NOISE.randbytes(MIB) for _ in range(2)] for name in names}

    def lib(order: str) -> bytes:
        codes = []
        for number, name in enumerate((*names, *order.split())):
            made = code(name, MIB)
            codes.append(made._replace(payload=payloads[name][number // 3]))
        return library(TEXT, Section(b".nv_fatbin", b"".join(container(each) for each in codes)))

    worker.write("deps/lib.so", lib("sm_80 sm_90 sm_100"))
    settle(worker.path / "deps")
    worker.push()
    worker.write("deps/lib.so", lib("sm_90 sm_80 sm_100"))
    assert worker.push().pushed == ["shared"]
    second = new_worker("second")
    second.pull()
    assert persistent(second.path) == persistent(worker.path)


def test_a_killed_pull_of_gathered_frames_is_resumed(
    first: Worker, new_worker: NewWorker, packhorse: Packhorse
) -> None:
    whole = first.push().transferred_bytes
    expected = persistent(first.path)
    for kill in range(1, 5):
        second = new_worker(f"second{kill}")
        assert second.root
        process = _start(packhorse, second, "pull", "--threads", "1", "--connections", "1")
        _killed_once(process, partial(_has_staged, second.root.staging, kill))
        assert second.names("packages") == []
        assert second.pull().transferred_bytes < whole
        assert persistent(second.path) == expected


def test_gathered_frames_that_another_boot_left_are_proven(
    first: Worker, new_worker: NewWorker, packhorse: Packhorse
) -> None:
    first.push()
    second = new_worker("second")
    assert second.root
    process = _start(packhorse, second, "pull", "--threads", "1", "--connections", "1")
    _killed_once(process, partial(_has_staged, second.root.staging, 4))
    journal = second.root.staging / "packages.journal"
    header, _, body = journal.read_bytes().partition(b"\n")
    journal.write_bytes(json.dumps({**json.loads(header), "boot": "another"}).encode() + b"\n" + body)
    staged = second.root.staging / "packages/nvidia/lib.so"
    whole = bytearray(staged.read_bytes())
    whole[10 * MIB] ^= 1
    staged.write_bytes(whole)
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def test_a_tree_of_models_and_tools_may_have_such_libraries_too(
    first: Worker, new_worker: NewWorker, codes: list[Code]
) -> None:
    shutil.copytree(first.path / "packages/nvidia", first.path / "deps/nvidia")
    first.push()
    second = new_worker("second")
    second.pull()
    assert persistent(second.path) == persistent(first.path)
    for worker in (first, second):
        (worker.path / ".packhorse/index").unlink()
        assert worker.push().pushed == worker.pull().pulled == worker.pull().kept == []
    codes[0] = _noise("sm_80")
    second.write("deps/nvidia/lib.so", _library(codes))
    assert second.push().pushed == ["shared"]
    first.pull()
    lib = "deps/nvidia/lib.so"
    assert (first.path / lib).read_bytes() == (second.path / lib).read_bytes() == _library(codes)


def test_verify_finds_a_wrong_byte_in_code_for_a_gpu(
    first: Worker, packhorse: Packhorse, tmp_path: Path
) -> None:
    first.push()
    flags = ["--root", str(first.path), "--store", first.storage.url]
    assert packhorse("verify", *flags).returncode == 0
    lib = first.path / "packages/nvidia/lib.so"
    whole, mtime = bytearray(lib.read_bytes()), lib.stat().st_mtime_ns
    whole[12 * MIB] ^= 1
    first.write("packages/nvidia/lib.so", bytes(whole), mtime=mtime)
    done = packhorse("verify", *flags)
    assert done.returncode == 4
    assert "corrupt: packages/nvidia/lib.so" in done.stderr
