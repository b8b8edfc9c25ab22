"""A prune gives back what no tag needs, two days later, and whoever restores or saves meanwhile notices nothing."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.servers import S3Server
from tests.transfer.conftest import NewWorker
from tests.transfer.workers import Worker, persistent, settle

from packhorse.config import Storage
from packhorse.errors import IntegrityError, NoSuchSnapshotError, PackhorseError
from packhorse.progress import Silent
from packhorse.root import State
from packhorse.snapshot import manifest as documents
from packhorse.store import condemned, profiles, tags
from packhorse.store.condemned import LIMIT
from packhorse.store.objects import Store
from packhorse.store.profiles import Profile
from packhorse.transfer.prune import PruneResult, prune
from packhorse.transfer.retention import Keep

NOISE = random.Random(9)
MB = 1_000_000
HOUR = 3600
AT_ONCE = -2
"""An age that everything has, also where the store tells times by the second."""


def pruned(worker: Worker, number: int = 0, *, limit: float = LIMIT, **options: Any) -> PruneResult:
    """As `packhorse prune --keep number` does it."""
    keep = options.pop("keep", Keep(number))
    return prune(worker.store, Silent(), keep=keep, limit=limit, **options)


def pruned_out(worker: Worker, number: int = 0, **options: Any) -> None:
    """Prune until nothing is left to do, as if days lay between."""
    for _ in range(5):
        pruned(worker, number, limit=AT_ONCE, **options)


def age(worker: Worker, hours: float, below: str = "") -> None:
    """Make all objects of a store in a directory (or those `below` a key) so many hours older."""
    directory = worker.storage.directory
    assert directory is not None
    for path in (directory / below).rglob("*"):
        if path.is_file():
            past = path.stat().st_mtime - hours * HOUR
            os.utime(path, (past, past))


def keys(worker: Worker, *kinds: str) -> set[str]:
    """The keys of the store's objects."""
    return {item.key for kind in kinds or ("",) for item in worker.store.list(kind and f"{kind}/")}


def in_use(worker: Worker) -> set[str]:
    """The packs of all manifests that the entries of tags and their snapshots name."""
    store = worker.store
    entries = tags.read_tags(store)
    manifests: set[tuple[str, Any]] = {(entry.digest, entry.part) for entry in entries}
    for entry, facts in zip(entries, tags.entry_facts(store, entries)):
        if entry.kind == "put":
            snapshot = tags.read_snapshot(store, facts.snapshot)
            manifests |= {(snapshot.packages, "packages")} | {(each, "shared") for _, each in snapshot.shared}
    packs = set()
    for digest, part in manifests - {("", "packages")}:
        manifest = documents.decode_manifest(tags.get_manifest(store, digest), part)
        packs |= {f"packs/{pack}" for pack in tags.get_placement(store, manifest, digest).packs}
    return packs


def restores(worker: Worker, expected: Any, snapshot: str = "", directory: str = "packages") -> None:
    """A worker with nothing restores what is expected."""
    other = Worker(worker.path.with_name(f"restored-{os.urandom(3).hex()}"), worker.storage, worker.environ)
    other.pull(snapshot)
    assert persistent(other.path)[directory] == expected
    shutil.rmtree(other.path)


def version(worker: Worker, number: int, size: int = MB) -> tuple[str, Any]:
    """Push another version of the packages; the snapshot's id and what it holds."""
    assert worker.root
    worker.write("packages/module.py", f"version = {number}")
    worker.write("packages/library.so", NOISE.randbytes(size))
    settle(worker.path / "packages")
    return worker.push().snapshot, persistent(worker.path)["packages"]


# --- profiles ---


def test_profiles_stay_with_their_tag_the_newest_two_of_each_name(new_worker: NewWorker) -> None:
    worker = new_worker()
    version(worker, 1)
    body = Profile("serve").encode()
    for number in range(4):
        worker.store.put(f"profiles/main/serve/{number:014d}-12345678", body)
    worker.store.put(f"profiles/main/train/{9:014d}-12345678", body)
    worker.store.put(f"profiles/gone/serve/{9:014d}-12345678", body)
    worker.store.put("profiles/foreign", b"")
    assert pruned(worker, dry_run=True).profiles == 2
    assert len(keys(worker, "profiles")) == 7
    assert pruned(worker).profiles == 2
    left = profiles.listed_profiles(worker.store.list("profiles/"))
    assert [(each.tag, each.name, int(each.stamp)) for each in left] == [
        ("gone", "serve", 9),  # somebody may be about to push the tag
        ("main", "serve", 0),
        ("main", "serve", 1),
        ("main", "train", 9),
    ]
    age(worker, 25, "profiles")
    assert pruned(worker).profiles == 1
    assert profiles.names(worker.store, "gone") == []
    assert profiles.names(worker.store, "main") == ["serve", "train"]
    assert pruned(worker).profiles == 0
    assert "profiles/foreign" in keys(worker, "profiles")


# --- what is forgotten ---


def test_nothing_is_forgotten_unless_asked(any_worker: NewWorker) -> None:
    worker = any_worker()
    versions = [version(worker, number) for number in range(3)]
    before = keys(worker, "packs", "manifests", "snapshots", "tags")
    pruned_out(worker)
    assert keys(worker, "packs", "manifests", "snapshots", "tags") == before
    for snapshot, content in versions:
        restores(worker, content, snapshot)


def test_of_each_tag_the_newest_are_kept_and_what_only_others_used_is_deleted(any_worker: NewWorker) -> None:
    worker = any_worker()
    versions = [version(worker, number) for number in range(4)]
    pruned_out(worker, 2)
    for snapshot, _ in versions[:2]:
        with pytest.raises(NoSuchSnapshotError):
            worker.pull(snapshot)
    for snapshot, content in versions[2:]:
        restores(worker, content, snapshot)
    assert keys(worker, "packs") == in_use(worker)
    assert len(keys(worker, "manifests")) == len(keys(worker, "placements")) == 2
    assert len(keys(worker, "snapshots")) == 2
    assert keys(worker, "condemned") == {condemned.CLOCK}


def test_each_fingerprint_keeps_its_own(new_worker: NewWorker) -> None:
    worker = new_worker()
    versions = []
    for number in range(4):
        worker.root.record(State(state="complete", fingerprint="ab"[number % 2] * 64))
        versions.append(version(worker, number))
    pruned_out(worker, 1)
    kept = [entry.fingerprint for entry in tags.read_tag(worker.store, "main")]
    assert sorted(kept) == ["a" * 64, "b" * 64]
    for snapshot, content in versions[2:]:
        restores(worker, content, snapshot)


def test_a_manifest_that_others_are_stored_beside_stays_without_its_packs(any_worker: NewWorker) -> None:
    worker = any_worker()
    assert worker.root
    for number in range(3000):
        worker.write(f"packages/package{number % 7}/module{number}.py", f"number = {number}")
    versions = [version(worker, number) for number in range(3)]
    first, *_, newest = reversed(tags.read_tag(worker.store, "main"))
    assert documents.base_of(worker.store.get(f"manifests/{newest.digest}")) == first.digest
    pruned_out(worker, 1)
    restores(worker, versions[-1][1])
    assert keys(worker, "packs") == in_use(worker)
    assert f"manifests/{first.digest}" in keys(worker, "manifests")
    for snapshot, _ in versions[:2]:
        with pytest.raises(NoSuchSnapshotError):
            worker.pull(snapshot)
    snapshot, content = version(worker, 3)
    again = tags.read_tag(worker.store, "main")[0]
    assert documents.base_of(worker.store.get(f"manifests/{again.digest}")) == "", "the base is condemned"
    pruned_out(worker, 1)
    assert keys(worker, "manifests") == {f"manifests/{again.digest}"}
    restores(worker, content, snapshot)


def test_with_a_tag_only_that_one_forgets(new_worker: NewWorker) -> None:
    main, other = new_worker("root"), new_worker("root", tag="other")
    for number in range(3):
        version(main, number)
        version(other, number)
    pruned_out(main, keep=Keep(1, tag="other"))
    assert len(tags.read_tag(main.store, "main")) == 3
    assert len(tags.read_tag(main.store, "other")) == 1


def test_what_is_young_enough_is_kept_and_the_newest_always(new_worker: NewWorker) -> None:
    worker = new_worker()
    versions = [version(worker, number) for number in range(3)]
    assert pruned(worker, keep=Keep(seconds=HOUR)).forgotten == 0
    pruned_out(worker, keep=Keep(seconds=1e-9))
    assert len(tags.read_tag(worker.store, "main")) == 1
    restores(worker, versions[-1][1], versions[-1][0])


def test_additions_to_shared_directories_are_folded_and_none_is_lost(any_worker: NewWorker) -> None:
    worker = any_worker()
    version(worker, 0)
    for number in range(6):
        worker.write(f"models/model{number}", NOISE.randbytes(20_000))
        worker.write("models/changing", NOISE.randbytes(1_200_000))
        worker.push()
    expected = persistent(worker.path)["models"]
    first = pruned(worker, 2, limit=AT_ONCE)
    assert first.folded == 4
    restores(worker, expected, directory="models")
    pruned_out(worker, 2)
    restores(worker, expected, directory="models")
    entries = tags.listed_entries(worker.store.list("tags/main/shared/"))
    assert [entry.kind for entry in entries].count("put") == 2
    assert [entry.kind for entry in entries].count("fold") == 1
    assert worker.push().pushed == []
    for number in range(3):  # and the folds that others replace
        worker.write("models/changing", str(number))
        assert worker.push().pushed == ["shared"]
        pruned_out(worker, 1)
    assert len(worker.store.list("tags/main/shared/")) == 2
    stored = sum(item.size for item in worker.store.list("packs/"))
    assert stored < MB + 6 * 20_000 + 1000, "what later additions replaced is gone"
    restores(worker, persistent(worker.path)["models"], directory="models")


def test_a_snapshot_that_is_kept_keeps_the_shared_files_of_its_time(new_worker: NewWorker) -> None:
    worker = new_worker()
    worker.write("models/file", NOISE.randbytes(200_000))
    settle(worker.path / "models")
    snapshot, _ = version(worker, 0)
    expected = persistent(worker.path)["models"]
    for number in range(4):
        worker.write("models/file", NOISE.randbytes(200_000 + number))
        worker.push()
    pruned_out(worker, 1)
    restores(worker, expected, snapshot, directory="models")


def test_of_additions_with_one_stamp_none_is_folded_without_the_others(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may tell times by the second. Which of them counts hangs on digests, and a fold has another one."""
    oldest, *twins = (new_worker(name) for name in ("oldest", "one", "two"))
    oldest.write("models/file", "oldest") if oldest.root else None
    oldest.push()
    [entry] = tags.read_tag(oldest.store, "main")
    together = f"{int(entry.stamp) - 1000:014d}"
    monkeypatch.setattr(tags, "stamp_after", lambda moment, newest: together)
    for twin in twins:
        twin.write("models/file", twin.path.name) if twin.root else None
        twin.push(directories=("models",))
    before, after = new_worker("before"), new_worker("after")
    before.pull()
    assert [each.stamp for each in tags.read_tag(oldest.store, "main")].count(together) == 2
    assert pruned(oldest, 1, limit=AT_ONCE).folded == 0
    assert [each.stamp for each in tags.read_tag(oldest.store, "main")].count(together) == 2
    after.pull()
    assert after.read("models/file") == before.read("models/file")


# --- when ---


def test_what_a_killed_push_left_is_condemned_after_a_day_and_deleted_two_days_later(
    new_worker: NewWorker,
) -> None:
    worker = new_worker()
    version(worker, 0)
    before = keys(worker, "packs", "manifests", "placements", "snapshots")
    version(worker, 1)
    newest = tags.read_tag(worker.store, "main")[0]
    worker.store.delete([newest.key])  # all but the last step of the push
    left = keys(worker, "packs", "manifests", "snapshots") - before

    age(worker, 23)
    assert pruned(worker).condemned == 0, "a push may still be on its way"
    age(worker, 2)
    done = pruned(worker)
    assert (done.condemned, done.deleted, done.waiting) == (len(left), 0, len(left))
    assert set(condemned.marks(worker.store)) == left
    age(worker, 47)
    assert (pruned(worker).deleted, pruned(worker).waiting) == (0, len(left))
    age(worker, 2)
    done = pruned(worker)
    assert done.deleted == len(left)
    assert done.deleted_bytes > MB
    assert keys(worker, "packs", "manifests", "placements", "snapshots") == before
    assert set(condemned.marks(worker.store)) == left, "another prune may still be about to delete them"
    age(worker, 25)
    pruned(worker)
    assert condemned.marks(worker.store) == {}


def test_what_is_tagged_again_is_spared(new_worker: NewWorker) -> None:
    worker = new_worker()
    version(worker, 0)
    _, content = version(worker, 1)
    newest = tags.read_tag(worker.store, "main")[0]
    body = worker.store.get(newest.key)
    worker.store.delete([newest.key])
    age(worker, 25)
    assert pruned(worker).condemned > 0
    worker.store.put(newest.key, body)  # the last step of a push that began before
    age(worker, 49)
    done = pruned(worker)
    assert (done.deleted, done.condemned) == (0, 0)
    assert done.spared > 0
    assert condemned.marks(worker.store) == {}
    restores(worker, content)


def test_placements_that_count_no_more_and_dead_leases_go_after_two_days(new_worker: NewWorker) -> None:
    worker = new_worker()
    version(worker, 0)
    worker.push(repair=True)
    worker.store.put("leases/main-0123456789abcdef/0123456789abcdef.claim", b"")
    assert len(keys(worker, "placements")) == 2
    age(worker, 47)
    pruned(worker)
    assert len(keys(worker, "placements") | keys(worker, "leases")) == 3
    age(worker, 2)
    newest = min(keys(worker, "placements"))
    pruned(worker)
    assert keys(worker, "placements", "leases") == {newest}


def test_what_killed_puts_left_in_a_directory_goes_after_a_day(new_worker: NewWorker) -> None:
    worker = new_worker()
    version(worker, 0)
    directory = worker.storage.directory
    assert directory is not None
    old, young = directory / f"packs/{'ab' * 32}#1", directory / f"packs/{'cd' * 32}#12"
    others = [directory / "packs/notes#", directory / "#1"]
    for path in (old, *others):
        path.write_bytes(b"unfinished")
    age(worker, 25)
    young.write_bytes(b"unfinished")
    before = keys(worker)
    pruned(worker, dry_run=True)
    assert old.exists()
    pruned(worker)
    assert not old.exists()
    assert young.exists(), "it may still grow"
    assert all(path.exists() for path in others)
    assert keys(worker) >= {key for key in before if key.startswith(("packs/", "tags/"))}


def test_too_old_a_beginning_is_refused() -> None:
    condemned.require_time(condemned.clock() - LIMIT + 60, "push")
    with pytest.raises(PackhorseError, match="longer than 24 hours"):
        condemned.require_time(condemned.clock() - LIMIT - 1, "push")


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Has the machine sleep for more than a day: that clock goes on which counts sleep, and no other."""
    slept = 0.0
    awake = time.clock_gettime

    def clock_gettime(clock: int) -> float:
        return awake(clock) + (slept if clock == time.CLOCK_BOOTTIME else 0.0)

    def sleep() -> None:
        nonlocal slept
        slept += LIMIT + 1

    monkeypatch.setattr(time, "clock_gettime", clock_gettime)
    return sleep


class _Asleep(Silent):
    """Sleeps as soon as there is something to do."""

    def __init__(self, sleep: Callable[[], None]) -> None:
        self._sleep = sleep

    def stage(self, name: str, total: int | None = None) -> None:
        self._sleep()


def test_a_push_that_slept_for_a_day_gives_up(new_worker: NewWorker, sleep: Callable[[], None]) -> None:
    worker = new_worker()
    assert worker.root
    worker.write("models/weights", "weights")
    with pytest.raises(PackhorseError, match="The push took longer than 24 hours"):
        worker.push(progress=_Asleep(sleep))
    assert tags.read_tag(worker.store, "main") == []
    assert worker.push().pushed == ["shared"]


def test_a_pull_that_slept_for_a_day_gives_up(any_worker: NewWorker, sleep: Callable[[], None]) -> None:
    worker, other = any_worker("first"), any_worker("second")
    assert worker.root
    worker.write("models/weights", "weights")
    worker.push()
    with pytest.raises(PackhorseError, match="The pull took longer than 24 hours"):
        other.pull(progress=_Asleep(sleep))
    assert other.names() == []
    assert other.pull().pulled == ["shared"]


# --- repacking ---


def mostly_unused(worker: Worker) -> Any:
    """A pack of seven megabytes of which the newest snapshot, the only one to be kept, uses two."""
    for number in range(7):
        worker.write(f"packages/package{number}/lib.so", bytes([number]) * (2 * MB) + NOISE.randbytes(MB))
    settle(worker.path / "packages")
    worker.push(directories=("packages",))
    for number in range(5):
        shutil.rmtree(worker.path / f"packages/package{number}")
    settle(worker.path / "packages")
    worker.push(directories=("packages",))
    return persistent(worker.path)["packages"]


def test_what_is_used_of_a_pack_is_copied_as_it_is_and_the_pack_goes_two_days_later(
    any_worker: NewWorker,
) -> None:
    worker = any_worker()
    assert worker.root
    content = mostly_unused(worker)
    newest = tags.read_tag(worker.store, "main")[0]
    manifest = documents.decode_manifest(tags.get_manifest(worker.store, newest.digest), "packages")
    old = tags.get_placement(worker.store, manifest, newest.digest)
    done = pruned(worker, 1, limit=AT_ONCE)
    assert done.repacked == 1
    assert 2 * MB <= done.copied_bytes < 2.1 * MB
    new = tags.get_placement(worker.store, manifest, newest.digest)
    assert not set(new.packs) & set(old.packs)
    assert [(place.length, place.codec, place.digest) for place in new.places] == [
        (place.length, place.codec, place.digest) for place in old.places
    ]
    for place in old.places:  # a pull that has read the old placement goes on
        span = (place.offset, place.length)
        assert len(next(worker.store.ranges(f"packs/{old.packs[place.pack]}", [span]))) == place.length
    restores(worker, content)
    pruned_out(worker, 1)
    assert keys(worker, "packs") == {f"packs/{pack}" for pack in new.packs}
    restores(worker, content)
    assert pruned(worker, 1, limit=AT_ONCE).repacked == 0
    assert worker.push(directories=("packages",)).pushed == []


def test_a_frame_that_also_lies_elsewhere_is_not_copied(new_worker: NewWorker) -> None:
    worker = new_worker()
    content = mostly_unused(worker)
    twin = Worker(worker.path, Storage(url=worker.storage.url, tag="twin"))
    worker.write("packages/one-more", "file")
    assert twin.push(directories=("packages",), repair=True).transferred_bytes > 2 * MB
    age(worker, 25)
    done = pruned(worker, 1)
    assert (done.repacked, done.copied_bytes) == (1, 0)
    restores(worker, content)


def test_the_share_decides(new_worker: NewWorker) -> None:
    worker = new_worker()
    mostly_unused(worker)
    assert pruned(worker, 1, limit=AT_ONCE, live_share=0.2, dry_run=True).repacked == 0
    assert pruned(worker, 1, limit=AT_ONCE, live_share=0.4, dry_run=True).repacked == 1


def test_a_corrupt_frame_is_not_copied(new_worker: NewWorker) -> None:
    worker = new_worker()
    mostly_unused(worker)
    for pack in (worker.storage.directory or Path()).glob("packs/*"):
        pack.write_bytes(bytes(pack.stat().st_size))
    before = keys(worker, "packs")
    with pytest.raises(IntegrityError, match="corrupt"):
        pruned(worker, 1, limit=AT_ONCE)
    assert keys(worker, "packs") == before


# --- at the same time as others ---


class Meanwhile(Silent):
    """Does something once, in the middle of what it watches."""

    def __init__(self, action: Callable[[], object], after: int = 1) -> None:
        self._action, self._left, self._lock = action, after, threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self._left -= 1
            if not self._left:
                self._action()


def test_a_pull_goes_on_while_all_it_reads_is_condemned(new_worker: NewWorker) -> None:
    worker = new_worker()
    mostly_unused(worker)
    expected = persistent(worker.path)["packages"]
    snapshot = tags.entry_facts(worker.store, tags.read_tag(worker.store, "main"))[0].snapshot
    version(worker, 1)
    version(worker, 2)
    age(worker, 25)
    results: list[PruneResult] = []
    meanwhile = Meanwhile(lambda: results.append(pruned(worker, 1)))
    other = new_worker("other")
    other.pull(snapshot, progress=meanwhile, threads=1)
    assert results[0].condemned > 0
    assert persistent(other.path)["packages"] == expected


@pytest.mark.parametrize("threads", [1, 4])
def test_a_pull_goes_on_while_its_packs_are_repacked(new_worker: NewWorker, threads: int) -> None:
    worker = new_worker()
    expected = mostly_unused(worker)
    age(worker, 25)
    results: list[PruneResult] = []
    other = new_worker("other")
    other.pull(progress=Meanwhile(lambda: results.append(pruned(worker, 1))), threads=threads)
    assert results[0].repacked == 1
    assert persistent(other.path)["packages"] == expected


def test_a_push_that_began_before_keeps_what_is_condemned_meanwhile(new_worker: NewWorker) -> None:
    worker = new_worker()
    mostly_unused(worker)
    age(worker, 25)
    worker.write("packages/package6/new.so", NOISE.randbytes(2 * MB))
    settle(worker.path / "packages")
    results: list[PruneResult] = []
    worker.push(directories=("packages",), progress=Meanwhile(lambda: results.append(pruned(worker, 1))))
    assert results[0].repacked == 1, "the push uses frames of the pack that is condemned now"
    expected = persistent(worker.path)["packages"]
    restores(worker, expected)
    age(worker, 49)
    pruned(worker, 1)
    restores(worker, expected)
    age(worker, 49)
    pruned(worker, 1)
    restores(worker, expected)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_a_push_does_not_rely_on_what_may_be_deleted_at_any_moment(new_worker: NewWorker, after: int) -> None:
    worker = new_worker()
    version(worker, 0)
    for number in range(5):
        worker.write(f"packages/big{number}", NOISE.randbytes(2 * MB))
    version(worker, 1)
    newest = tags.read_tag(worker.store, "main")[0]
    worker.store.delete([newest.key])
    age(worker, 25)
    assert pruned(worker).condemned > 0
    age(worker, 49)
    worker.root.record(State())  # as a worker that has nothing but the files
    (worker.path / ".packhorse/index").unlink()
    results: list[PruneResult] = []
    worker.push(progress=Meanwhile(lambda: results.append(pruned(worker)), after))
    assert results[0].deleted > 0
    marks = condemned.marks(worker.store)
    again = tags.read_tag(worker.store, "main")[0]
    assert f"manifests/{newest.digest}" in marks
    assert again.digest != newest.digest, "under its old name it could be deleted once more"
    assert not in_use(worker) & marks.keys()
    expected = persistent(worker.path)["packages"]
    restores(worker, expected)
    for _ in range(3):
        age(worker, 49)
        pruned(worker)
        restores(worker, expected)
    assert worker.push().pushed == []


def test_a_push_goes_back_to_what_is_stored_beside_a_manifest_that_is_deleted_meanwhile(
    new_worker: NewWorker,
) -> None:
    worker, old = new_worker("root"), new_worker("old")
    assert worker.root
    for number in range(400):
        worker.write(f"packages/package{number % 7}/module{number}.py", NOISE.randbytes(300))
    settle(worker.path / "packages")
    worker.push()
    first = worker.root.state().manifest
    age(worker, 25)
    worker.write("packages/package3/module3.py", NOISE.randbytes(1000))
    worker.push()
    second = worker.root.state().manifest
    assert documents.base_of(worker.store.get(f"manifests/{second}")) == first
    old.pull()
    shutil.rmtree(worker.path / "packages")
    version(worker, 3)
    pruned(worker, 1)
    assert f"manifests/{first}" in condemned.marks(worker.store)
    age(worker, 49)
    results: list[PruneResult] = []
    old.push(progress=Meanwhile(lambda: results.append(pruned(worker, 1))))
    assert results[0].deleted > 0
    assert f"manifests/{first}" not in keys(worker, "manifests")
    assert old.root.state().manifest == second, "what was there already"
    restores(worker, persistent(old.path)["packages"])


def test_two_prunes_at_once_do_no_harm(any_worker: NewWorker) -> None:
    worker = any_worker()
    assert worker.root
    content = mostly_unused(worker)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            pruned(worker, 1, limit=AT_ONCE)
        except BaseException as error:
            failures.append(error)

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        restores(worker, content)
    assert failures == []


# --- kills and damage ---

_PRUNE = """
import os, sys
from packhorse.config import Storage
from packhorse.progress import Silent
from packhorse.store.objects import Store
from packhorse.store.profiles import Profile
from packhorse.transfer.prune import prune
from packhorse.transfer.retention import Keep
url, endpoint = sys.argv[1:]
prune(Store(Storage(url=url, endpoint=endpoint), os.environ), Silent(), keep=Keep(1), limit=-2)
"""


@pytest.mark.parametrize("kind", ["file", "seaweedfs"])
def test_a_prune_killed_at_any_moment_does_no_harm_and_is_made_up_for(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage, environ = Storage(url=(tmp_path / "store").as_uri()), dict(os.environ)
    if kind == "seaweedfs":
        server: S3Server = request.getfixturevalue("seaweedfs")
        storage = Storage(url=f"s3://{server.new_bucket()}", endpoint=server.endpoint)
        environ |= server.environ()
    worker = Worker(tmp_path / "root", storage, environ)
    assert worker.root

    def start() -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", _PRUNE, storage.url, storage.endpoint]
        return subprocess.Popen(words, env=environ)

    chance = random.Random(4)
    content = mostly_unused(worker)
    started = time.monotonic()
    assert start().wait() == 0
    usual = time.monotonic() - started
    for number in range(8):
        worker.write(f"models/{number}", NOISE.randbytes(100_000))
        settle(worker.path / "models")
        worker.push(directories=("models",))
        content = mostly_unused(worker)
        for _ in range(2):
            process = start()
            try:
                process.wait(chance.uniform(0.4, 1.1) * usual)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            restores(worker, content)
    worker.push()
    pruned_out(worker, 1)
    restores(worker, content)
    restores(worker, persistent(worker.path)["models"], directory="models")
    assert keys(worker, "packs") == in_use(worker)


def test_where_something_in_use_cannot_be_read_nothing_is_deleted(new_worker: NewWorker) -> None:
    worker = new_worker()
    version(worker, 0)
    version(worker, 1)
    pruned(worker, 1, limit=AT_ONCE)
    placement = next(iter(keys(worker, "placements") - {""}))
    newest = tags.read_tag(worker.store, "main")[0].digest
    placement = next(key for key in keys(worker, "placements") if newest in key)
    worker.store.put(placement, b"garbage")
    before = keys(worker)
    with pytest.raises(IntegrityError):
        pruned(worker, 1, limit=AT_ONCE)
    assert keys(worker) == before


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(new_worker: NewWorker) -> None:
    worker = new_worker()
    mostly_unused(worker)
    for number in range(4):
        worker.write("models/changing", NOISE.randbytes(1000 + number))
        worker.push(directories=("models",))
    listing = worker.store.list("")
    planned = pruned(worker, 1, limit=AT_ONCE, dry_run=True)
    assert worker.store.list("") == listing
    done = pruned(worker, 1, limit=AT_ONCE)
    assert (planned.dry_run, done.dry_run) == (True, False)
    for name in ("kept", "forgotten", "folded", "repacked", "copied_bytes", "condemned", "condemned_bytes"):
        assert getattr(planned, name) == getattr(done, name), name
    assert done.forgotten
    assert done.folded
    assert done.condemned
    assert Store(worker.storage, {}).list("") != listing
