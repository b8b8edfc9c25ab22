"""Requests on a bad line: what stalls or breaks off is asked for again, and memory stays bounded meanwhile."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.servers import S3Server
from tests.transfer.conftest import NewWorker
from tests.transfer.relay import Relay
from tests.transfer.workers import Worker, persistent, settle

from packhorse.config import Storage
from packhorse.errors import StorageError
from packhorse.progress import Silent
from packhorse.transfer import fetch, line, pace
from packhorse.watch.memory import allowance

MIB = 1 << 20
NOISE = random.Random(17)


@pytest.fixture(scope="module")
def stored(seaweedfs: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker whose models, 80 MiB, are pushed."""
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}", endpoint=seaweedfs.endpoint)
    worker = Worker(tmp_path_factory.mktemp("first") / "root", storage, seaweedfs.environ())
    assert worker.root
    for number in range(10):
        worker.write(f"models/shard{number}", NOISE.randbytes(8 * MIB))
    settle(worker.path / "models")
    worker.push()
    return worker


@pytest.fixture
def here(stored: Worker, tmp_path: Path) -> Iterator[Worker]:
    """Another worker, still empty."""
    yield Worker(tmp_path / "root", stored.storage, stored.environ)


def _through(relay: Relay, worker: Worker) -> Worker:
    return Worker(worker.path, Storage(url=worker.storage.url, endpoint=relay.endpoint), worker.environ)


@pytest.mark.timeout(45)  # after 60 seconds without a byte the client gives up by itself
def test_a_connection_that_stalls_is_asked_again_and_does_not_hold_the_pull(
    stored: Worker, here: Worker
) -> None:
    with Relay(stored.storage.endpoint, stall=2) as relay:
        _through(relay, here).pull()  # while the relay lives nothing more comes of those two
        assert relay.stalled == 2
    assert persistent(here.path) == persistent(stored.path)


def test_connections_that_break_in_the_middle_are_asked_again(stored: Worker, here: Worker) -> None:
    with Relay(stored.storage.endpoint, break_every=3) as relay:
        _through(relay, here).pull()
        assert relay.broken >= 3
    assert persistent(here.path) == persistent(stored.path)


def test_a_store_that_is_gone_for_good_ends_the_pull_with_6_and_what_came_is_kept(
    stored: Worker, here: Worker, packhorse: Packhorse
) -> None:
    with Relay(stored.storage.endpoint, gone_after=40 * MIB) as relay:
        where = {**stored.environ, "PACKHORSE_STORAGE_ENDPOINT": relay.endpoint}
        done = packhorse("pull", "--json", "--root", here.path, "--store", here.storage.url, env=where)
    assert done.returncode == 6, done.stderr
    assert "cannot be reached" in json.loads(done.stdout)["error"]
    assert "Traceback" not in done.stderr
    assert "Task" not in done.stderr
    assert here.names() == []
    assert here.pull().transferred_bytes < 60 * MIB
    assert persistent(here.path) == persistent(stored.path)


def test_a_store_without_ranges_whose_answers_break_off_is_asked_again_for_what_is_left(
    rclone_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Storage(url=f"s3://{rclone_s3.new_bucket()}", endpoint=rclone_s3.endpoint)
    worker = Worker(tmp_path / "first", where, rclone_s3.environ())
    other = Worker(tmp_path / "second", where, rclone_s3.environ())
    assert worker.root
    for number in range(6):
        worker.write(f"models/shard{number}", NOISE.randbytes(8 * MIB))
    settle(worker.path / "models")
    worker.push()
    with Relay(rclone_s3.endpoint, break_first=8) as relay:  # after 7 in a row the client gives up by itself
        _through(relay, other).pull(threads=1)
        assert relay.broken == 8
    assert persistent(other.path) == persistent(worker.path)
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    with Relay(rclone_s3.endpoint, break_every=1) as relay:
        third = Worker(tmp_path / "third", where, rclone_s3.environ())
        with pytest.raises(StorageError) as broken:
            _through(relay, third).pull(threads=1)
        assert broken.value.exit_code == 6
        assert max(len(times) for (_, wanted), times in relay.ranges.items() if not wanted) == 2


# --- how often a store is asked ---


@pytest.fixture(scope="module")
def many(seaweedfs: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A worker with 96 frames of a MiB each, eight in a pack."""
    storage = Storage(url=f"s3://{seaweedfs.new_bucket()}", endpoint=seaweedfs.endpoint)
    worker = Worker(tmp_path_factory.mktemp("many") / "root", storage, seaweedfs.environ())
    assert worker.root
    for number in range(96):
        worker.write(f"models/shard{number:02}", NOISE.randbytes(MIB))
    settle(worker.path / "models")
    worker.push()
    return worker


def test_with_nothing_changed_a_push_asks_twice_and_a_pull_once(many: Worker) -> None:
    with Relay(many.storage.endpoint) as relay:
        far = _through(relay, many)
        assert far.push().pushed == []
        assert len(relay.asked) == 2, relay.asked
        assert far.pull().pulled == []
        assert len(relay.asked) == 3, relay.asked


def test_neighbouring_frames_are_asked_for_together(many: Worker, tmp_path: Path) -> None:
    with Relay(many.storage.endpoint) as relay:
        here = _through(relay, Worker(tmp_path / "root", many.storage, many.environ))
        here.pull(connections=2)
    assert sum(map(len, relay.ranges.values())) <= 96 // 4
    assert persistent(here.path) == persistent(many.path)


def test_a_long_line_gets_more_requests_at_a_time(
    many: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "BATCH", MIB)  # so that there are many requests
    with Relay(many.storage.endpoint, delay=0.5) as relay:
        _through(relay, Worker(tmp_path / "root", many.storage, many.environ)).pull()
    # On loopback, where more bring nothing, it stays near the first number: that depends on what else the machine does.
    assert relay.most_at_once >= 2 * pace.FIRST


def test_a_store_that_asks_for_patience_gets_it(
    many: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "_PATIENCE", 60.0)  # nothing is asked for twice
    monkeypatch.setattr(pace, "_FIRST_PATIENCE", 60.0)
    with Relay(many.storage.endpoint, busy=2) as relay:
        here = _through(relay, Worker(tmp_path / "root", many.storage, many.environ))
        here.pull()
    assert persistent(here.path) == persistent(many.path)
    assert {len(times) for times in relay.ranges.values()} == {3}
    pauses = [
        later - before for times in relay.ranges.values() for before, later in itertools.pairwise(times)
    ]
    assert min(pauses) >= 0.15
    second = [times[2] - times[1] for times in relay.ranges.values()]
    assert max(second) - min(second) > 0.02, "all workers would come back at the same moment"


def test_a_store_that_is_busy_for_good_ends_the_pull_with_6_and_is_asked_a_few_times(
    many: Worker, tmp_path: Path, packhorse: Packhorse
) -> None:
    with Relay(many.storage.endpoint, busy=1000) as relay:
        where = {**many.environ, "PACKHORSE_STORAGE_ENDPOINT": relay.endpoint}
        flags = ["--root", str(tmp_path / "root"), "--store", many.storage.url]
        done = packhorse("pull", "--json", *flags, env=where)
    assert done.returncode == 6, done.stderr
    assert "SlowDown" in json.loads(done.stdout)["error"]
    # Seven by a client that tries again, and one beside where those take longer than a store may be silent, twice at most.
    assert sum(map(len, relay.ranges.values())) <= 9


class _Blocking(Silent):
    """Lets nobody write any further until the relay has nothing more to do, and then everybody."""

    def __init__(self, relay: Relay) -> None:
        self.relay, self.received_at_most = relay, 0
        self._first = threading.Lock()

    def advance(self, count: int) -> None:
        with self._first:
            calm_since = time.monotonic()
            while not self.received_at_most and time.monotonic() < calm_since + 0.5:
                if self.relay.at_once:
                    calm_since = time.monotonic()
                time.sleep(0.01)
            self.received_at_most = self.received_at_most or self.relay.received


def test_no_more_is_asked_for_than_may_be_held_while_nothing_is_written(
    stored: Worker, here: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is asked for twice where the first answer is late counts twice here, though only one is kept.
    monkeypatch.setattr(pace, "_PATIENCE", 60.0)
    monkeypatch.setattr(pace, "_FIRST_PATIENCE", 60.0)
    with Relay(stored.storage.endpoint) as relay:
        progress = _Blocking(relay)
        _through(relay, here).pull(progress=progress, threads=2, connections=32)
    held = allowance(fetch.HELD, fetch.HELD_EACH, fetch.HELD_MOST)
    assert held <= progress.received_at_most <= held + MIB
    assert persistent(here.path) == persistent(stored.path)


class _SmallLast(Silent):
    """Has whoever created small files wait until the pieces of large ones are written."""

    def __init__(self, pieces: int) -> None:
        self.in_time = True
        self._left, self._written = pieces, threading.Event()

    def advance(self, count: int) -> None:
        if count != 8 * MIB:
            self.in_time = self._written.wait(20) and self.in_time
            return
        self._left -= 1
        if not self._left:
            self._written.set()


def test_large_files_come_while_small_ones_wait_to_be_created(new_worker: NewWorker) -> None:
    worker, other = new_worker("first"), new_worker("second")
    for number in range(900):
        worker.write(f"models/a/{number}", NOISE.randbytes(50_000))
    for number in range(6):
        worker.write(f"models/z{number}", NOISE.randbytes(8 * MIB))
    settle(worker.path / "models")
    worker.push()
    progress = _SmallLast(6)
    other.pull(progress=progress, connections=4)
    assert progress.in_time
    assert persistent(other.path) == persistent(worker.path)


class _Threads(Silent):
    """Which threads write."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def advance(self, count: int) -> None:
        self.names.add(threading.current_thread().name)


@pytest.mark.parametrize(("connections", "threads"), [(1, 1), (8, 3)])
def test_the_numbers_of_requests_and_threads_can_be_pinned(
    stored: Worker, here: Worker, connections: int, threads: int
) -> None:
    progress = _Threads()
    with Relay(stored.storage.endpoint) as relay:
        _through(relay, here).pull(progress=progress, connections=connections, threads=threads)
    assert len(progress.names) <= threads
    if connections == 1:
        assert relay.most_at_once <= 2  # one that is overdue is asked for once more
    else:
        assert relay.most_at_once >= 3


class _FewDescriptors(Silent):
    """Leaves one more descriptor from the moment on at which the restore begins."""

    def stage(self, name: str, total: int | None = None) -> None:
        taken = {int(number) for number in os.listdir("/proc/self/fd")}
        free = (number for number in itertools.count() if number not in taken)
        next(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next(free), HARD))


class _FewThreads(Silent):
    """Leaves memory for the stack of one more thread from the moment on at which the restore begins."""

    def stage(self, name: str, total: int | None = None) -> None:
        threading.stack_size(2 << 30)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30), -1))


HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.filterwarnings(
    "ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of asyncio
@pytest.mark.timeout(60)  # it must not wait for a thread that never was
@pytest.mark.parametrize("progress", [_FewDescriptors(), _FewThreads()])
def test_a_pull_ends_where_no_descriptor_or_thread_is_left(progress: Silent, new_worker: NewWorker) -> None:
    worker, other = new_worker("first"), new_worker("second")
    worker.write("models/weights", NOISE.randbytes(60 * MIB))
    worker.push()
    limits = {each: resource.getrlimit(each) for each in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS)}
    try:
        with pytest.raises((OSError, RuntimeError)):
            other.pull(progress=progress)
    finally:
        threading.stack_size(0)
        for each, limit in limits.items():
            resource.setrlimit(each, limit)
    gc.collect()  # an event loop that was never whole; what it warns of is filtered here
    other.pull()
    assert persistent(other.path) == persistent(worker.path)


@pytest.mark.parametrize("flags", [["--connections", "0"], ["--threads", "65"], ["--threads", "many"]])
def test_a_number_that_cannot_be_is_a_usage_error(packhorse: Packhorse, flags: list[str]) -> None:
    assert packhorse("pull", *flags).returncode == 2
