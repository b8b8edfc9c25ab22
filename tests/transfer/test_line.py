"""Who writes what of the frames that arrived."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from packhorse.snapshot.manifest import Frame, Manifest
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.writer import Placed
from packhorse.transfer.line import Arrived, Batch, Job, Stored


def _frames(of: str) -> list[Stored]:
    """Frames of the packs that these letters name, each in a request of its own, numbered."""
    tree = Tree(Path("nowhere"), Manifest(kind="packages"), "")
    jobs = [
        Job(tree, number, Frame(b"", 1), Placed(pack, number, 1, 0, b"")) for number, pack in enumerate(of)
    ]
    return [Stored(Batch([job], 0, 1), job, memoryview(b"")) for job in jobs]


def _arrived(of: str) -> Arrived:
    arrived = Arrived()
    for stored in _frames(of):
        arrived.put(stored)
    arrived.end()
    return arrived


def _number(arrived: Arrived) -> int:
    stored = arrived.get()
    return -1 if stored is None else stored.job.number


def test_one_thread_gets_what_arrived_in_its_order_and_then_nothing() -> None:
    arrived = _arrived("aabab")
    assert [_number(arrived) for _ in range(7)] == [0, 1, 2, 3, 4, -1, -1]


def test_two_threads_write_to_one_file_at_a_time_only_where_there_is_nothing_else() -> None:
    arrived = _arrived("aaabba")
    with ExitStack() as stack:
        one, other, third = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(3))
        gets = [pool.submit(_number, arrived).result() for pool in (one, other, third, other, other, one)]
    # The third finds both packs in hand and takes the first; then the other one has its own pack to itself.
    assert gets == [0, 3, 1, 4, 2, 5]


def test_a_thread_waits_until_something_arrives_and_is_told_that_nothing_more_comes() -> None:
    arrived = Arrived()
    [stored] = _frames("a")
    told: list[int] = []
    waiting = threading.Thread(target=lambda: told.extend(iter(lambda: _number(arrived), -1)))
    waiting.start()
    arrived.put(stored)
    arrived.end()
    waiting.join(10)
    assert told == [0]
    assert not waiting.is_alive()


def test_what_nobody_has_begun_with_can_be_taken_back() -> None:
    arrived = _arrived("aab")
    assert _number(arrived) == 0
    assert [stored.job.number for stored in arrived.take_all()] == [1, 2]
    assert arrived.empty()
    assert _number(arrived) == -1
