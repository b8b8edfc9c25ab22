"""What was pushed comes back, whatever the store, the names and the user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.transfer.conftest import NewWorker
from tests.transfer.workers import odd_tree, persistent


def _fill(root: Path) -> None:
    for name in ("packages", "models", "deps"):
        odd_tree(root / name)


def test_everything_comes_back_from_any_store(any_worker: NewWorker) -> None:
    first, second = any_worker("first"), any_worker("second")
    _fill(first.root.path)
    pushed = first.push()
    pulled = second.pull()
    expected, found = persistent(first.path), persistent(second.path)
    for name, tree in expected.items():
        assert found[name] == tree
    assert pulled.snapshot == pushed.snapshot
    assert (pulled.files, pulled.bytes) == (pushed.files, pushed.bytes)
    assert pulled.pulled == pushed.pushed == ["packages", "shared"]
    assert 0 < pulled.transferred_bytes < pulled.bytes
    assert second.warnings == []
    again, unchanged = first.push(), second.pull()
    assert (again.pushed, again.transferred_bytes) == ([], 0)
    assert (unchanged.pulled, unchanged.transferred_bytes) == ([], 0)


_PREPARED_BESIDE = """
import sys, threading
from pathlib import Path
from packhorse.config import Storage
from packhorse.progress import Silent
from packhorse.store import tags
from packhorse.transfer.prune import prune
from tests.transfer.workers import Worker

def note(frame, event, argument):
    if event == "call" and frame.f_code.co_name == "get_class_annotations":
        print("msgspec prepares a type in", threading.current_thread().name)

root, url, what = sys.argv[1:]
worker = Worker(Path(root), Storage(url=url))
threading.setprofile(note)  # for threads that are started from now on
if what == "list":
    assert len(tags.entry_facts(worker.store, tags.read_tags(worker.store))) > 1
elif what == "prune":
    prune(worker.store, Silent())
else:
    getattr(worker, what)()
"""


@pytest.mark.parametrize("what", ["push", "pull", "list", "prune"])
def test_no_types_are_prepared_in_threads_beside_each_other(what: str, new_worker: NewWorker) -> None:
    """msgspec crashes the process where two threads use a type for the first time at once."""
    first, second = new_worker("first"), new_worker("second")
    for number in range(3):
        first.root.packages.joinpath("module.py").write_text(f"VALUE = {number}")
        first.write(f"models/{number}", f"{number}")
        first.push()
    first.write("models/new", "new")
    worker = second if what == "pull" else first
    words = [sys.executable, "-c", _PREPARED_BESIDE, str(worker.root.path), worker.storage.url, what]
    done = subprocess.run(
        words,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert done.stdout == ""


_AS_SOMEBODY = """
import os, sys
sys.path.insert(0, ".")
from pathlib import Path
from packhorse.config import Storage
from tests.transfer.workers import Worker, odd_tree, persistent

def round_trip(base):
    storage = Storage(url=(base / "store").as_uri())
    first, second = Worker(base / "first", storage), Worker(base / "second", storage)
    first.root
    for name in ("packages", "models", "deps"):
        odd_tree(first.path / name)
    first.push()
    second.pull()
    assert persistent(first.path) == persistent(second.path)

    # Another file for a directory that its owner must not write to.
    for name in ("packages", "models"):
        os.chmod(first.path / name / "read-only", 0o755)
        first.write(f"{name}/read-only/new", "new")
        os.chmod(first.path / name / "read-only", 0o555)
    first.push()
    second.pull()
    for name in ("packages", "models"):
        assert second.read(f"{name}/read-only/new") == "new"
        assert (second.path / name / "read-only").stat().st_mode & 0o777 == 0o555
    assert second.pull().transferred_bytes == 0
    assert not (second.path / ".packhorse" / "previous").exists()

base = Path(sys.argv[1])
round_trip(base / "as root")  # loads all modules: the other user may not be allowed to read the interpreter's
os.setgroups([]), os.setgid(65534), os.setuid(65534)
round_trip(base / "as somebody")
print("as it was")
"""


@pytest.mark.namespaces
def test_somebody_without_privileges_gets_read_only_files_and_directories_back(tmp_path: Path) -> None:
    outside = Path("/var/tmp") / f"packhorse-{tmp_path.name}-{os.getpid()}"
    outside.mkdir(mode=0o700)
    os.chown(outside, 65534, 65534)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _AS_SOMEBODY, outside],
            cwd=Path(__file__).parents[2],
            env={"HOME": str(outside), "PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "as it was\n", done.stderr
    finally:
        shutil.rmtree(outside)


def test_setuid_bits_are_dropped_and_special_files_are_named_and_left_out(new_worker: NewWorker) -> None:
    first, second = new_worker("first"), new_worker("second")
    for name in ("packages", "models"):
        tool = first.write(f"{name}/tool", "tool") if first.root else None
        assert tool is not None
        tool.chmod(0o6755)
        os.mkfifo(first.path / name / "pipe")
    first.push()
    second.pull()
    for name in ("packages", "models"):
        assert (second.path / name / "tool").stat().st_mode & 0o7777 == 0o755
        assert second.names(name) == ["tool"]
    assert [warning.split(" is ")[0] for warning in first.warnings] == ["pipe", "models/pipe"]


def test_what_is_excluded_is_neither_saved_nor_touched(new_worker: NewWorker) -> None:
    first, second = new_worker("first"), new_worker("second")
    for worker in (first, second):
        worker.write("models/a", "a") if worker.root else None
    first.write("models/b.tmp", "b")
    first.write("models/cache/c", "c")
    first.push(exclude=("*.tmp", "models/cache"))
    second.write("models/b.tmp", "mine")
    second.pull()
    assert second.names() == ["a", "b.tmp"]
    assert second.read("models/b.tmp") == "mine"


def test_a_time_beyond_64_bits_of_nanoseconds_is_kept_as_the_last_within(new_worker: NewWorker) -> None:
    first, second = new_worker("first"), new_worker("second")
    assert first.root
    last, later = (1 << 63) - 1, 13_569_465_600  # the year 2400, in seconds
    names = ("packages/strange.py", "models/strange")
    for name in names:
        os.utime(first.write(name, "strange"), (later, later))
        if os.stat(first.path / name).st_mtime != later:
            pytest.skip("this file system knows no such times")
    first.push()
    second.pull()
    for name in names:
        assert second.read(name) == "strange"
        assert os.stat(second.path / name).st_mtime_ns == last
    assert (first.push().transferred_bytes, second.pull().transferred_bytes) == (0, 0)
    assert second.push().pushed == []
