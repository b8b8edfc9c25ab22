"""What the disk was made to take is trusted after the machine was started again, and nothing else is."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from tests.transfer.conftest import NewWorker
from tests.transfer.workers import Worker, another_boot, persistent, settle

from packhorse.snapshot.index import RACE, flush, now

MB = 1_000_000
NOISE = random.Random(31)


@pytest.fixture
def first(new_worker: NewWorker) -> Worker:
    """A worker that pushed small and large files."""
    worker = new_worker("first")
    assert worker.root
    for number in range(20):
        worker.write(f"packages/package/module{number}.py", NOISE.randbytes(100_000))
    worker.write("packages/package/library.so", NOISE.randbytes(12 * MB))
    worker.write("models/model", NOISE.randbytes(10 * MB))
    settle(worker.path / "packages", worker.path / "models")
    worker.push()
    return worker


@pytest.fixture
def second(first: Worker, new_worker: NewWorker) -> Worker:
    """A worker that pulled them."""
    worker = new_worker("second")
    assert worker.root
    worker.pull()
    return worker


def _read() -> int:
    """The bytes that this process has read, from whatever file (proc_pid_io(5))."""
    facts = Path("/proc/self/io").read_text().split()
    return int(facts[facts.index("rchar:") + 1])


def _read_by_pull(worker: Worker) -> int:
    before = _read()
    assert worker.pull().transferred_bytes == 0
    return _read() - before


def test_after_another_boot_what_was_flushed_is_not_read_again(second: Worker) -> None:
    flush(second.root.index)
    another_boot(second.path)
    for _ in range(2):
        assert _read_by_pull(second) < MB


def test_after_another_boot_what_was_never_flushed_is_read_again_once(second: Worker) -> None:
    another_boot(second.path)
    while (
        now() <= (second.path / "models").stat().st_ctime_ns + RACE
    ):  # no machine starts again as fast as that
        time.sleep(0.1)
    assert _read_by_pull(second) > 24 * MB
    another_boot(second.path)
    assert _read_by_pull(second) < MB, "it came from the disk"


def test_what_is_pulled_after_a_flush_is_read_again(first: Worker, second: Worker) -> None:
    flush(second.root.index)
    first.write("models/another", NOISE.randbytes(3 * MB))
    settle(first.path / "models")
    first.push()
    second.pull()
    another_boot(second.path)
    assert 3 * MB < _read_by_pull(second) < 4 * MB


def test_what_a_crash_took_of_the_rest_is_brought_again(first: Worker, second: Worker) -> None:
    flush(second.root.index)
    module = first.write("packages/package/new.py", NOISE.randbytes(MB))
    settle(first.path / "packages")
    first.push()
    second.pull()
    lost = second.path / "packages/package/new.py"
    os.truncate(lost, 0)
    os.truncate(lost, MB)
    os.utime(lost, ns=(module.stat().st_mtime_ns,) * 2)
    another_boot(second.path)
    assert second.pull().pulled == ["packages"]
    assert persistent(second.path) == persistent(first.path)


def test_a_push_after_another_boot_reads_nothing_that_was_flushed(second: Worker) -> None:
    flush(second.root.index)
    another_boot(second.path)
    before = _read()
    assert second.push().pushed == []
    assert _read() - before < MB
