"""Sparse roots: libraries lack the code for other GPUs, and nothing that packhorse does takes a hole for content."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.conftest import Packhorse
from tests.snapshot.fatbins import Code, Section, code, container, extents_of_file, library
from tests.transfer.conftest import NewWorker
from tests.transfer.openings import Holder, killed, opened
from tests.transfer.workers import Worker, another_boot, persistent, settle

from packhorse.config import Storage
from packhorse.errors import IntegrityError, PackhorseError
from packhorse.snapshot.gpu import choice, needed
from packhorse.snapshot.index import flush
from packhorse.snapshot.order import ranks
from packhorse.store.objects import Store
from packhorse.transfer.opening import Opening

MIB = 1 << 20
NOISE = random.Random(29)
LIB = "packages/nvidia/lib.so"


def _noise(name: str) -> Code:
    return code(name, 2 * MIB)._replace(payload=NOISE.randbytes(2 * MIB))


def _library(codes: list[Code]) -> bytes:
    containers = b"".join(container(each) for each in codes)
    return library(Section(b".text", NOISE.randbytes(MIB)), Section(b".nv_fatbin", containers))


@pytest.fixture
def first(new_worker: NewWorker) -> Worker:
    """A worker that pushed three libraries with code for two GPUs, one read-only, and something beside them."""
    worker = new_worker("first")
    assert worker.root
    shared = _noise("sm_80")
    worker.write(LIB, _library([_noise(name) for name in ("sm_80", "sm_90") * 3]))
    worker.write("packages/other/read-only.so", _library([_noise("sm_90"), shared]))
    worker.write("packages/equal.so", _library([shared, _noise("sm_90")]))
    worker.write("packages/module.py", NOISE.randbytes(100_000))
    worker.write("packages/package/large", NOISE.randbytes(2 * MIB))
    worker.write("models/model", NOISE.randbytes(2 * MIB))
    os.chmod(worker.path / "packages/other/read-only.so", 0o444)
    settle(worker.path / "packages", worker.path / "models")
    worker.push()
    return worker


@pytest.fixture
def sparse(first: Worker, new_worker: NewWorker) -> Worker:
    """A worker that has the code for 9.0 only."""
    worker = new_worker("second")
    assert worker.root
    worker.pull(gpus=(90,), only=True)
    assert (worker.root.state().state, worker.root.state().gpus) == ("sparse", (90,))
    return worker


def _blocks(worker: Worker, path: str = LIB) -> int:
    return (worker.path / path).stat().st_blocks * 512


def _is_right(worker: Worker, as_in: Worker, capability: int) -> None:
    """What this GPU needs is there, and what is not is a hole."""
    for path in (LIB, "packages/other/read-only.so", "packages/equal.so"):
        here, whole = (worker.path / path).read_bytes(), (as_in.path / path).read_bytes()
        assert len(here) == len(whole)
        for offset, length, gpus in extents_of_file(as_in.path / path):
            part = whole[offset : offset + length]
            allowed = (part,) if needed(gpus, capability) else (part, bytes(length))
            assert here[offset : offset + length] in allowed, (path, offset, gpus)


def _elsewhere(worker: Worker, as_in: Worker, name: str = "elsewhere") -> Worker:
    """Another worker that pulls everything has what `as_in` has."""
    other = Worker(worker.path.with_name(name), worker.storage)
    assert other.root
    other.pull()
    assert persistent(other.path) == persistent(as_in.path)
    return other


def _complete(worker: Worker, as_in: Worker) -> None:
    assert persistent(worker.path) == persistent(as_in.path)
    assert (worker.root.state().state, worker.root.state().gpus) == ("complete", ())
    assert worker.push().pushed == []
    assert worker.pull().transferred_bytes == 0


rebooted = pytest.mark.parametrize("reboot", [False, True], ids=["", "after another boot"])


def test_only_leaves_holes_and_saves_what_they_are(
    first: Worker, sparse: Worker, new_worker: NewWorker
) -> None:
    whole = new_worker("third")
    assert whole.root
    everything = whole.pull().transferred_bytes
    again = new_worker("fourth")
    assert again.root
    pulled = again.pull(gpus=(90,), only=True)
    assert pulled.transferred_bytes < everything - 7 * MIB
    assert pulled.transferred_bytes + pulled.cold_stored_bytes == everything
    assert pulled.cold_bytes == 5 * 2 * MIB, "in three files; two of them share a frame"
    assert _blocks(sparse) < _blocks(whole) - 5 * MIB
    _is_right(sparse, first, 90)
    second = sparse.pull(gpus=(90,), only=True)
    assert (second.pulled, second.transferred_bytes) == ([], 0)
    assert (second.cold_bytes, second.cold_stored_bytes) == (pulled.cold_bytes, 0)
    assert sparse.root.state().state == "sparse"
    completed = sparse.pull()
    assert (completed.cold_bytes, completed.cold_stored_bytes) == (0, 0)


@rebooted
def test_verify_names_the_holes_and_finds_a_wrong_byte_beside_them(
    sparse: Worker, packhorse: Packhorse, reboot: bool
) -> None:
    if reboot:
        another_boot(sparse.path)
    flags = ["--root", str(sparse.path), "--store", sparse.storage.url, "--json"]
    done = packhorse("verify", *flags)
    assert done.returncode == 0, done.stderr
    facts = msgspec.json.decode(done.stdout)
    assert sorted(facts["holes"]) == ["packages/equal.so", LIB, "packages/other/read-only.so"]
    assert 9 * MIB < facts["hole_bytes"] < 11 * MIB
    lib = sparse.path / LIB
    mtime = lib.stat().st_mtime_ns
    with lib.open("r+b") as file:
        file.seek(MIB // 2)
        file.write(b"wrong")
    os.utime(lib, ns=(mtime, mtime))
    assert packhorse("verify", *flags).returncode == 4


@rebooted
def test_diff_takes_holes_for_what_they_stand_for(
    first: Worker, sparse: Worker, packhorse: Packhorse, reboot: bool
) -> None:
    assert first.root
    if reboot:
        another_boot(sparse.path)
    done = packhorse("diff", "main", "--json", "--root", sparse.path, "--store", sparse.storage.url)
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout)["paths"] == []


@rebooted
def test_an_unchanged_push_sends_nothing_and_keeps_the_snapshot(
    first: Worker, sparse: Worker, reboot: bool
) -> None:
    if reboot:
        another_boot(sparse.path)
    before = sparse.root.state()
    pushed = sparse.push()
    assert (pushed.pushed, pushed.transferred_bytes, pushed.snapshot) == ([], 0, before.snapshot)
    assert sparse.root.state().state == "sparse"
    assert _blocks(sparse) < (sparse.path / LIB).stat().st_size


def test_a_hole_is_found_where_a_crash_took_the_state(first: Worker, sparse: Worker) -> None:
    flush(sparse.root.index)
    another_boot(sparse.path)
    (sparse.path / ".packhorse/state.json").write_bytes(b"")
    sparse.pull()
    assert persistent(sparse.path) == persistent(first.path)
    _complete(sparse, first)


@rebooted
def test_a_small_change_of_a_sparse_root_is_pushed_and_complete_elsewhere(
    first: Worker, sparse: Worker, reboot: bool
) -> None:
    if reboot:
        another_boot(sparse.path)
    for worker in (sparse, first):
        worker.write("packages/new.py", "new", mtime=10**18)
        settle(worker.path / "packages")
    pushed = sparse.push()
    assert pushed.pushed == ["packages"]
    assert pushed.transferred_bytes < MIB
    assert (sparse.root.state().state, sparse.root.state().gpus) == ("sparse", (90,))
    _elsewhere(sparse, first)
    assert sparse.push().pushed == []
    sparse.pull()
    _complete(sparse, first)


@rebooted
def test_a_library_that_was_just_given_another_name_is_not_read(
    first: Worker, sparse: Worker, reboot: bool
) -> None:
    if reboot:
        another_boot(sparse.path)
    for worker in (sparse, first):
        os.link(worker.path / LIB, worker.path / "packages/nvidia/link.so")
        settle(worker.path / "packages")
    sparse.push()
    _elsewhere(sparse, first)


@rebooted
@pytest.mark.parametrize("change", ["touched", "written", "mode"])
def test_a_changed_library_with_holes_is_refused(
    first: Worker, sparse: Worker, reboot: bool, change: str
) -> None:
    if reboot:
        another_boot(sparse.path)
    lib = sparse.path / LIB
    if change == "mode":
        lib.chmod(0o755)
    elif change == "written":
        with lib.open("r+b") as file:
            file.write(b"\x7fELG")
    else:
        lib.touch()
    with pytest.raises(PackhorseError, match="code for other GPUs was missing") as refused:
        sparse.push()
    assert refused.value.exit_code == 1
    assert LIB in refused.value.what
    with pytest.raises(PackhorseError, match="code for other GPUs was missing"):
        sparse.push(repair=True)
    sparse.pull()
    _complete(sparse, first)


@pytest.mark.parametrize("repair", [False, True])
def test_a_store_that_has_none_of_it_gets_no_sparse_root(
    sparse: Worker, tmp_path: Path, repair: bool
) -> None:
    empty = Worker(sparse.path, Storage(url=(tmp_path / "another").as_uri()))
    with pytest.raises(PackhorseError, match="lacks code for other GPUs") as refused:
        empty.push(repair=repair)
    assert "packhorse pull" in refused.value.remedy
    assert refused.value.exit_code == 1
    assert not list((tmp_path / "another").rglob("tags/*/*"))


def test_repair_from_a_sparse_root_is_refused(sparse: Worker) -> None:
    with pytest.raises(PackhorseError, match="lacks code for other GPUs"):
        sparse.push(repair=True)


@rebooted
def test_a_complete_pull_fills_the_holes(first: Worker, sparse: Worker, reboot: bool) -> None:
    if reboot:
        another_boot(sparse.path)
    inode = (sparse.path / LIB).stat().st_ino
    filled = sparse.pull()
    assert (sparse.path / LIB).stat().st_ino == inode
    assert 7 * MIB < filled.transferred_bytes < 13 * MIB
    _complete(sparse, first)


@rebooted
@pytest.mark.parametrize("only", [False, True])
def test_for_another_gpu_a_root_is_filled_before_the_start(
    first: Worker, sparse: Worker, reboot: bool, only: bool
) -> None:
    if reboot:
        another_boot(sparse.path)
    starts = []

    def start() -> None:
        starts.append(1)
        _is_right(sparse, first, 80)

    opened(sparse, Holder("never"), start, gpus=(80,), only=only)
    assert starts == [1]
    _complete(sparse, first)


def test_a_gpu_between_two_needs_what_the_lower_one_does(first: Worker, sparse: Worker) -> None:
    opened(sparse, None, lambda: _is_right(sparse, first, 80), gpus=(86, 90), only=True)
    _complete(sparse, first)


def test_a_ready_root_is_sparse_while_the_rest_comes(first: Worker, new_worker: NewWorker) -> None:
    worker = new_worker("second")
    assert worker.root
    seen = []

    class Watch:
        def stage(self, name: str, total: int | None = None) -> None:
            if name.startswith("restoring code"):
                seen.append(worker.root.state())
                assert worker.root.state().snapshot
                assert worker.push(directories=["models"]).pushed == []
                assert worker.push().pushed == []

        def advance(self, count: int) -> None:
            pass

    def start() -> None:
        assert _blocks(worker) < (worker.path / LIB).stat().st_size
        assert (worker.path / "models/model").read_bytes() == (first.path / "models/model").read_bytes()
        _is_right(worker, first, 90)

    opened(worker, None, start, gpus=(90,), progress=Watch())
    assert [state.state for state in seen] == ["sparse"]
    _complete(worker, first)


def test_a_root_is_recorded_while_the_code_for_other_gpus_is_asked_for(
    first: Worker, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker("second")
    assert worker.root
    started, asked = threading.Event(), threading.Event()
    get_range = Store.get_range_async

    async def heard(*words: Any) -> memoryview:
        if started.is_set():
            asked.set()
        return await get_range(*words)

    states = []

    def arrived() -> None:
        states.append(worker.root.state().state)
        assert asked.wait(20.0)

    monkeypatch.setattr(Store, "get_range_async", heard)
    worker.pull(gpus=(90,), opening=Opening(lambda result: started.set(), ranks, arrived=arrived))
    assert states == ["sparse", "complete"]
    _complete(worker, first)


def test_an_early_root_holds_libraries_until_their_needed_code_is_there(
    first: Worker, new_worker: NewWorker
) -> None:
    worker, holder = new_worker("second"), Holder("never")
    assert worker.root

    def start() -> None:
        holder.want(LIB.encode(), b"packages/other/read-only.so", b"packages/equal.so")
        _is_right(worker, first, 90)
        holder.release()

    opened(worker, holder, start, gpus=(90,))
    _complete(worker, first)


@pytest.mark.parametrize(
    ("moment", "then"),
    [
        *((moment, "complete") for moment in ("held", "started", "arrived", "late")),
        ("arrived", "only"),
        ("held", "other"),
        ("late", "other"),
        ("late", "early"),
    ],
)
def test_a_restore_killed_at_any_moment_is_finished(
    first: Worker, new_worker: NewWorker, moment: str, then: str
) -> None:
    worker = new_worker("second")
    assert worker.root
    assert killed(worker, moment, "90") == -signal.SIGKILL
    assert worker.root.state().state == ("sparse" if moment == "late" else "partial")
    if then == "only":
        worker.pull(gpus=(90,), only=True)
        _is_right(worker, first, 90)
    elif then == "other":
        opened(worker, None, lambda: _is_right(worker, first, 80), gpus=(80,), only=True)
    elif then == "early":
        holder = Holder("never")
        opened(worker, holder, holder.release, gpus=(90,))
        _complete(worker, first)
    assert worker.pull().kept == []
    _complete(worker, first)


@rebooted
def test_an_upgrade_keeps_the_holes_of_what_did_not_change(
    first: Worker, sparse: Worker, reboot: bool
) -> None:
    first.write("packages/package/large", NOISE.randbytes(2 * MIB), mtime=10**18 + 1)
    first.write("packages/equal.so", _library([_noise("sm_80"), _noise("sm_90")]), mtime=10**18 + 1)
    first.push()
    if reboot:
        another_boot(sparse.path)
    inode = (sparse.path / LIB).stat().st_ino
    upgraded = sparse.pull(gpus=(90,), only=True)
    assert upgraded.transferred_bytes < 8 * MIB
    assert (sparse.path / LIB).stat().st_ino == inode
    assert _blocks(sparse) < (sparse.path / LIB).stat().st_size - 5 * MIB
    assert sparse.root.state().state == "sparse"
    _is_right(sparse, first, 90)
    assert sparse.push().pushed == []
    sparse.pull()
    _complete(sparse, first)


def test_an_upgrade_for_another_gpu_fills_what_is_kept_before_the_start(
    first: Worker, sparse: Worker
) -> None:
    """Also where a new library, whose code is still on its way, has code that an old one lacks."""
    first.write("packages/copy.so", (first.path / LIB).read_bytes(), mtime=10**18 + 1)
    first.push()
    holder = Holder("never")

    def start() -> None:
        assert (sparse.path / LIB).read_bytes() == (first.path / LIB).read_bytes()
        holder.release()

    opened(sparse, holder, start, gpus=(80,))
    assert b"packages/copy.so" in holder.held
    _complete(sparse, first)


def test_a_library_touched_while_it_is_filled_keeps_the_root_sparse(
    first: Worker, new_worker: NewWorker
) -> None:
    worker = new_worker("second")
    assert worker.root

    def start() -> None:
        (worker.path / LIB).touch()
        (worker.path / "packages/equal.so").unlink()

    opened(worker, None, start, gpus=(90,))
    assert (worker.root.state().state, worker.root.state().gpus) == ("sparse", (90,))
    with pytest.raises(PackhorseError, match="code for other GPUs was missing"):
        worker.push()
    worker.pull()
    _complete(worker, first)


def test_a_store_that_fails_while_holes_are_filled_leaves_the_root_sparse(
    first: Worker, new_worker: NewWorker
) -> None:
    worker = new_worker("second")
    assert worker.root
    packs = Path(worker.storage.url.removeprefix("file://")) / "packs"

    def start() -> None:
        packs.rename(packs.with_name("away"))

    with pytest.raises(IntegrityError):
        opened(worker, None, start, gpus=(90,))
    packs.with_name("away").rename(packs)
    assert worker.root.state().state == "sparse"
    assert worker.root.state().snapshot
    _is_right(worker, first, 90)
    assert worker.push().pushed == []
    worker.pull()
    _complete(worker, first)


def test_without_a_gpu_or_with_all_of_them_nothing_is_cold(first: Worker, new_worker: NewWorker) -> None:
    for number, text in enumerate(("all", "only:all")):
        gpus, only = choice(text, {})
        worker = new_worker(f"worker{number}")
        assert worker.root
        opened(
            worker,
            None,
            lambda worker=worker: _same(worker, first),  # type: ignore[misc]
            gpus=gpus,
            only=only,
        )
        _complete(worker, first)
    for text in ("sm_90", "only:sm_90"):
        assert choice(text, {"CUDA_FORCE_PTX_JIT": "1"}) == ((), False), "PTX counts then, which cubins hide"
        assert choice(text, {"CUDA_FORCE_PTX_JIT": "0"}) == ((90,), text != "sm_90")


def _same(worker: Worker, as_in: Worker) -> None:
    assert persistent(worker.path) == persistent(as_in.path)


def test_without_the_copies_of_manifests_a_sparse_root_is_pulled_anew(first: Worker, sparse: Worker) -> None:
    """The copies of the manifests are a cache: without them nothing tells what a hole is."""
    shutil.rmtree(sparse.path / ".packhorse/manifests")
    sparse.pull()
    _complete(sparse, first)


def test_without_the_copies_of_manifests_no_hole_is_pushed(first: Worker, sparse: Worker) -> None:
    shutil.rmtree(sparse.path / ".packhorse/manifests")
    (sparse.path / ".packhorse/index").unlink()
    for worker in (sparse, first):
        worker.write("packages/new.py", "new")
        settle(worker.path / "packages")
    assert sparse.push().pushed == ["packages"]
    _elsewhere(sparse, first)
