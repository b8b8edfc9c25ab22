"""A push adds to a tag all or nothing, sends what the store lacks, and loses nothing to other workers."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server
from tests.transfer.conftest import NewWorker
from tests.transfer.workers import Worker, persistent, settle

from packhorse.config import Storage
from packhorse.errors import PackhorseError
from packhorse.progress import Silent
from packhorse.snapshot import manifest as documents
from packhorse.store import tags
from packhorse.store.objects import Store
from packhorse.transfer.local import Local, source_of

MB = 1_000_000
NOISE = random.Random(5)


@pytest.fixture
def first(new_worker: NewWorker) -> Worker:
    """A worker with eight megabytes of packages and a model."""
    worker = new_worker("first")
    assert worker.root
    for number in range(40):
        worker.write(f"packages/package{number % 4}/module{number}.py", NOISE.randbytes(100_000))
    worker.write("packages/package1/library.so", NOISE.randbytes(4 * MB))
    worker.write("models/model", NOISE.randbytes(2 * MB))
    settle(worker.path / "packages", worker.path / "models")
    return worker


def test_the_same_tree_is_the_same_snapshot_wherever_it_lies(first: Worker, tmp_path: Path) -> None:
    twin = Worker(tmp_path / "twin", Storage(url=(tmp_path / "another store").as_uri()))
    assert twin.root
    for name in ("packages", "models"):
        shutil.rmtree(twin.path / name)
        shutil.copytree(first.path / name, twin.path / name)
    assert persistent(twin.path) == persistent(first.path)
    first.push()
    twin.push()
    assert first.root.state().manifest == twin.root.state().manifest
    assert first.root.state().shared == twin.root.state().shared


def test_an_environment_that_shares_files_with_another_sends_what_differs(
    first: Worker, new_worker: NewWorker
) -> None:
    first.push()
    other = new_worker("other", tag="other")
    assert other.root
    shutil.rmtree(other.path / "packages")
    shutil.copytree(first.path / "packages", other.path / "packages")
    other.write("packages/package9/module.py", NOISE.randbytes(200_000))
    other.write("models/renamed", (first.path / "models/model").read_bytes())
    assert 200_000 <= other.push().transferred_bytes < 2 * MB
    new_worker("third", tag="other").pull()
    assert persistent(first.path.with_name("third")) == persistent(other.path)


def test_what_is_counted_is_what_was_pushed(first: Worker, new_worker: NewWorker) -> None:
    whole = first.push()
    assert (whole.files, whole.bytes) == (42, 10 * MB)
    again = first.push()
    assert (again.pushed, again.files, again.bytes) == ([], 0, 0)
    first.write("models/small", b"12")
    added = first.push()
    assert (added.pushed, added.files, added.bytes) == (["shared"], 1, 2)
    twin = new_worker("twin")
    assert twin.root
    for name in ("packages", "models"):
        shutil.rmtree(twin.path / name)
        shutil.copytree(first.path / name, twin.path / name)
    same = twin.push()
    assert (same.pushed, same.files, same.bytes) == ([], 0, 0)
    first.write("packages/package1/module1.py", b"1")
    changed = first.push()
    assert (changed.pushed, changed.files, changed.bytes) == (["packages"], 41, 8 * MB - 100_000 + 1)


def test_nothing_new_is_told_and_sends_nothing(first: Worker) -> None:
    pushed = first.push()
    before = first.store.list("")
    again = first.push()
    assert (again.pushed, again.transferred_bytes, again.snapshot) == ([], 0, pushed.snapshot)
    assert [item for item in first.store.list("") if item not in before] == []


def test_unchanged_files_are_not_read_again(first: Worker, new_worker: NewWorker) -> None:
    first.push()
    second = new_worker("second")
    second.pull()
    second.write("packages/package0/new.py", "new")
    opened: list[str] = []
    watching = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and watching:
            opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (bytes, str)) else "")

    sys.addaudithook(hook)  # nobody can take it away again
    pushed = second.push()
    watching = False
    assert pushed.pushed == ["packages"]
    names = {path.removeprefix(f"{second.path}/packages/") for path in opened if "/packages/package" in path}
    assert "package0/new.py" in names  # and with it the small files of its frame
    assert names.isdisjoint({"package1/library.so", *(f"package3/module{number}.py" for number in range(40))})


class _During(Silent):
    """Does something when a push begins to save."""

    def __init__(self, action: object) -> None:
        self.action = action

    def stage(self, name: str, total: int | None = None) -> None:
        if name.startswith("saving"):
            assert callable(self.action)
            self.action(name)


def test_a_model_that_changes_while_it_is_read_is_left_out_and_named(
    first: Worker, new_worker: NewWorker
) -> None:
    first.write("models/other", "other")
    (first.path / "models/name").hardlink_to(first.path / "models/model")

    def change(stage: str) -> None:
        if "models" in stage:
            first.write("models/model", b"changed")

    result = first.push(progress=_During(change))
    assert result.unsaved == ["models/model", "models/name"]
    second = new_worker("second")
    second.pull()
    assert second.names() == ["other"]
    assert first.push().unsaved == []
    second.pull()
    assert second.read("models/model") == second.read("models/name") == "changed"


def test_a_model_that_vanishes_while_it_is_read_is_left_out(first: Worker, new_worker: NewWorker) -> None:
    first.write("models/other", "other")
    first.push(progress=_During(lambda stage: (first.path / "models/model").unlink(missing_ok=True)))
    second = new_worker("second")
    second.pull()
    assert second.names() == ["other"]


def test_packages_that_change_while_they_are_saved_are_not_saved_at_all(first: Worker) -> None:
    with pytest.raises(PackhorseError, match=r"module0.*changed while it was saved"):
        first.push(progress=_During(lambda stage: first.write("packages/package0/module0.py", "changed")))
    assert tags.read_tag(first.store, "main") == []


def test_packages_that_are_only_linked_while_they_are_saved_are_saved(
    first: Worker, new_worker: NewWorker, tmp_path: Path
) -> None:
    module = first.path / "packages/package0/module0.py"
    linked = tmp_path / "linked"
    progress = _During(lambda stage: linked.hardlink_to(module) if "packages" in stage else None)
    assert first.push(progress=progress).pushed[0] == "packages"
    second = new_worker("second")
    second.pull()
    assert (second.path / "packages/package0/module0.py").read_bytes() == module.read_bytes()
    assert first.push().pushed == []


def test_what_a_deadline_leaves_out_is_named_and_saved_by_the_next_push(
    first: Worker, new_worker: NewWorker
) -> None:
    for number in range(6):
        first.write(f"models/shard{number}", NOISE.randbytes(9 * MB))

    class Slow(Silent):
        def advance(self, count: int) -> None:
            while time.monotonic() < deadline:
                time.sleep(0.01)

    deadline = time.monotonic() + 0.5
    result = first.push(directories=("models",), deadline=deadline, progress=Slow())
    assert 0 < len(result.unsaved) < 7
    [entry] = tags.read_tag(first.store, "main")
    assert tags.entry_facts(first.store, [entry])[0].partial
    second = new_worker("second")
    second.pull()
    saved = {f"models/{name}" for name in second.names()}
    assert saved.isdisjoint(result.unsaved)
    assert len(saved) + len(result.unsaved) == 7
    first.push()
    second.pull()
    assert persistent(second.path) == persistent(first.path)


def test_a_large_file_that_takes_long_to_compare_keeps_no_other_from_being_saved_in_time(
    first: Worker, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from packhorse.snapshot import contents

    (first.path / "models/model").unlink()
    large, small = first.write("models/large", NOISE.randbytes(20 * MB)), first.write("models/small", "one")
    settle(first.path / "models")
    first.push()
    with large.open("r+b") as file:
        file.write(b"changed")
    small.write_text("two")
    late = 0.0
    clock, looks = time.monotonic, contents.is_hole

    def is_hole(descriptor: int, runs: Sequence[tuple[int, int]]) -> bool:
        nonlocal late
        late += 400  # seconds for each of three parts
        return looks(descriptor, runs)

    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: clock() + late)
        patch.setattr(contents, "is_hole", is_hole)
        result = first.push(directories=("models",), deadline=time.monotonic() + 600)
    assert late > 0
    assert (result.pushed, result.unsaved) == (["shared"], ["models/large"])
    second = new_worker("second")
    second.pull()
    assert second.read("models/small") == "two"
    assert (second.path / "models/large").read_bytes() != large.read_bytes()
    assert first.push(directories=("models",)).unsaved == []
    second.pull()
    assert (second.path / "models/large").read_bytes() == large.read_bytes()


@pytest.mark.parametrize("depth", [20, 25])
def test_what_has_too_long_a_path_is_left_out_and_named(
    first: Worker, new_worker: NewWorker, depth: int
) -> None:
    """Also what has room here, but would not have it at every worker."""
    name = "d" * 180
    directory = os.open(first.path / "models", os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=directory)
        deeper = os.open(name, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = deeper
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=directory))
    os.close(directory)
    assert first.push().pushed == ["packages", "shared"]
    [told] = first.warnings
    assert told.startswith(f"models/{name}/{name}/")
    assert "whose path is too long; it is not saved" in told
    second = new_worker("another worker, whose root has a longer path")
    second.pull()
    assert second.names()[-1] == "model"
    assert second.names()[0].endswith("/file")
    assert 10 < len(second.names()) < 20
    assert first.push().pushed == []


def test_what_lies_too_deep_is_left_out_and_named(first: Worker, new_worker: NewWorker) -> None:
    directory = os.open(first.path / "models", os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=directory)
        deeper = os.open("d", os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = deeper
    os.close(directory)
    first.push()
    [told] = first.warnings
    assert told.startswith("models/d/d/")
    assert "that lies too deep; it is not saved" in told
    assert first.push().pushed == []
    second = new_worker("second")
    second.pull()
    assert second.names()[-1] == "model"


def test_a_root_that_a_pull_left_unfinished_saves_no_packages(first: Worker, new_worker: NewWorker) -> None:
    import msgspec

    first.push()
    root = first.root
    root.record(msgspec.structs.replace(root.state(), state="partial"))
    first.write("models/new", "new")
    with pytest.raises(PackhorseError, match="not finished"):
        first.push()
    assert first.push(directories=("models",)).pushed == ["shared"]
    assert first.root.state().state == "partial"


def test_a_backup_of_one_directory_saves_no_other(first: Worker, new_worker: NewWorker) -> None:
    first.write("deps/tool", "tool")
    first.push(directories=("deps",))
    second = new_worker("second")
    second.pull()
    assert persistent(second.path) == {**persistent(second.path), "packages": {}, "models": {}}
    assert second.read("deps/tool") == "tool"


# --- several at once ---

_PUSHES = """
import sys
sys.path.insert(0, ".")
from pathlib import Path
from packhorse.config import Storage
from tests.transfer.workers import Worker
path, url, endpoint, *secrets, rounds = sys.argv[1:]
environ = dict(zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), secrets))
worker = Worker(Path(path), Storage(url=url, endpoint=endpoint), environ)
for number in range(int(rounds)):
    sys.stdin.readline()
    worker.write(f"models/{worker.path.name}/{number}", f"{worker.path.name} {number}")
    worker.write("models/fought over", f"{worker.path.name} {number}")
    worker.push()
    print("pushed", flush=True)
"""


class _StoreMeanwhile(Store):
    """A store that does something, once, when the document of a snapshot has been put."""

    action: Callable[[], object] | None = None

    def put(self, key: str, content: Any) -> None:
        super().put(key, content)
        if key.startswith("snapshots/") and self.action is not None:
            action, self.action = self.action, None
            action()


class _Interrupted(Worker):
    """A worker whose push is interrupted shortly before its end."""

    action: Callable[[], object] | None = None

    @property
    def store(self) -> Store:
        store = _StoreMeanwhile(self.storage, self.environ)
        store.action = self.action
        return store


def test_what_a_pull_records_while_a_push_comes_to_its_end_stays(new_worker: NewWorker) -> None:
    other, here = new_worker("other"), new_worker("here")
    assert other.root
    assert here.root
    other.write("models/theirs", "theirs")
    theirs = other.push()
    here.write("models/ours", "ours")
    pusher = _Interrupted(here.path, here.storage)
    pusher.action = lambda: here.pull(theirs.snapshot)
    assert pusher.push().pushed == ["shared"]
    assert here.names() == ["ours", "theirs"]
    state = here.root.state()
    assert state.state == "complete"
    assert state.snapshot == theirs.snapshot
    assert set(other.root.state().shared) < set(state.shared), "what was pulled and what was pushed"
    synced = Local(here.root).synced()
    assert [digest for _, digest in synced.manifests] == list(other.root.state().shared)
    assert synced.source == source_of(here.store, "")
    here.pull()
    assert here.root.state().snapshot != theirs.snapshot
    assert here.push().pushed == []


def test_a_pull_that_ends_while_a_push_writes_a_copy_of_its_manifest_leaves_that_alone(
    new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = new_worker()
    worker.write("models/a", "1") if worker.root else None
    worker.push()
    worker.write("models/b", "2")
    rename = os.rename
    pulled: list[object] = []

    def meanwhile(source: Path, target: Path) -> None:
        if "/.packhorse/manifests/" in str(target) and not pulled:
            pulled.append(None)
            pulled.append(worker.pull())  # of another process
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    assert worker.push().pushed == ["shared"]
    assert len(pulled) == 2


def test_a_pull_may_find_that_a_push_finished_its_copy_of_a_manifest(
    first: Worker, new_worker: NewWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first.push()
    second = new_worker("second")
    copies, listdir = second.root.private / "manifests", os.listdir
    listed: list[object] = []

    def meanwhile(path: object = ".") -> list[str]:
        names = listdir(path)  # type: ignore[call-overload]
        if str(path) == str(copies):
            listed.append(path)
            names += [".0123.abcd", "0123"]  # gone again since
        return list(names)

    monkeypatch.setattr(os, "listdir", meanwhile)
    second.pull()
    assert listed
    assert second.root.state().state == "complete"


@pytest.mark.timeout(60)
def test_a_push_waits_for_nobody_who_writes_to_the_root(first: Worker) -> None:
    with first.root.writing():  # as a pull does until its end, under a command that saves meanwhile
        assert first.push().pushed == ["packages", "shared"]
    assert first.push().pushed == []


def test_workers_that_save_at_the_same_moment_lose_nothing(any_worker: NewWorker) -> None:
    rounds = 12
    workers: Sequence[Worker] = [any_worker("left"), any_worker("right")]
    processes = []
    for worker in workers:
        secrets = [worker.environ.get(name, "") for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        words = [str(worker.path), worker.storage.url, worker.storage.endpoint, *secrets, str(rounds)]
        assert worker.root
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _PUSHES, *words],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    for _ in range(rounds):
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "pushed\n"
    for process in processes:
        process.communicate()
    third, fourth = any_worker("third"), any_worker("fourth")
    pulled = third.pull()
    expected = {
        f"{name}/{number}": f"{name} {number}" for name in ("left", "right") for number in range(rounds)
    }
    assert third.names() == sorted([*expected, "fought over"])
    assert {path: third.read(f"models/{path}") for path in expected} == expected
    assert third.read("models/fought over").split()[1] == str(rounds - 1)
    fourth.pull(pulled.snapshot)  # the snapshot that both make together has a name, too
    assert persistent(fourth.path)["models"] == persistent(third.path)["models"]


# --- kills ---


@pytest.mark.parametrize("kind", ["file", "seaweedfs"])
def test_a_push_killed_at_any_moment_leaves_the_tag_old_or_new(
    kind: str, first: Worker, new_worker: NewWorker, packhorse: Packhorse, request: pytest.FixtureRequest
) -> None:
    if kind == "seaweedfs":
        server: S3Server = request.getfixturevalue("seaweedfs")
        storage = Storage(url=f"s3://{server.new_bucket()}", endpoint=server.endpoint)
        first = Worker(first.path, storage, server.environ())
    first.push()
    chance = random.Random(11)
    started = time.monotonic()
    _pushing(packhorse, first).wait()
    usual = time.monotonic() - started
    for attempt in range(8):
        before = Worker(first.path.with_name(f"before{attempt}"), first.storage, first.environ)
        after = Worker(first.path.with_name(f"after{attempt}"), first.storage, first.environ)
        before.pull()
        for number in range(3):
            first.write(f"packages/package{number}/module.py", NOISE.randbytes(3 * MB))
            first.write(f"models/{attempt}-{number}", NOISE.randbytes(3 * MB))
        settle(first.path / "packages", first.path / "models")
        process = _pushing(packhorse, first)
        _end(process, chance.uniform(0.2, 1.3) * usual)
        after.pull()  # raises where anything listed is not there
        trees = persistent(before.path), persistent(after.path), persistent(first.path)
        for name in ("packages", "models"):
            assert trees[1][name] in (trees[0][name], trees[2][name])
        for entry in tags.read_tag(first.store, "main"):
            encoded = tags.get_manifest(first.store, entry.digest)
            manifest = documents.decode_manifest(encoded, entry.part)  # type: ignore[arg-type]
            for place in tags.get_placement(first.store, manifest, entry.digest).packs:
                assert first.store.modified(f"packs/{place}")
        for worker in (before, after):
            shutil.rmtree(worker.path)
    first.push()
    last = Worker(first.path.with_name("last"), first.storage, first.environ)
    last.pull()
    assert persistent(last.path) == persistent(first.path)


def _pushing(packhorse: Packhorse, worker: Worker) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*packhorse.command, "push", "--root", worker.path, "--store", worker.storage.url],
        cwd=packhorse.directory,
        env={**packhorse.environ, **worker.environ, "PACKHORSE_STORAGE_ENDPOINT": worker.storage.endpoint},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """SIGKILL a process after a time, if it is not done before."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
