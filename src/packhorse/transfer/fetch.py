"""Frames from the store into trees: neighbours in one request, several requests at a time, all bytes proven.

Promises bounded memory: at most `threads` requests of BATCH bytes and one raw frame each.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from packhorse.errors import MEND, IntegrityError
from packhorse.progress import Progress
from packhorse.snapshot import frames
from packhorse.snapshot.manifest import Frame
from packhorse.snapshot.reader import Tree
from packhorse.snapshot.writer import Placed
from packhorse.store.objects import NotFoundError, Store

BATCH = 16 << 20
"""The most that one request asks for, in stored bytes."""
GAP = 256 << 10
"""Unwanted bytes between two frames that are rather read than skipped with a request more."""
THREADS = 4


@dataclass(frozen=True)
class Job:
    """One frame on its way into one tree."""

    tree: Tree
    number: int
    frame: Frame
    placed: Placed


def fetch(store: Store, jobs: Iterable[Job], progress: Progress, *, threads: int = THREADS) -> int:
    """Bring every job's frame into its tree; returns the bytes requested.

    Raises IntegrityError for what is not what its digest says, and StorageError.
    """
    waiting = sorted(jobs, key=lambda job: (job.placed.pack, job.placed.offset))
    if not waiting:
        return 0
    try:
        ranged = store.keeps_ranges(_key(waiting[0]))
    except NotFoundError as error:
        raise _missing(waiting[0]) from error
    stop = threading.Event()

    def bring(batch: Sequence[Job]) -> int:
        return 0 if stop.is_set() else _bring(store, batch, progress)

    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(bring, batch) for batch in _batches(waiting, whole_packs=not ranged)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            failed = next((future for future in done if future.exception()), None)
            if failed is not None:
                failed.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return sum(future.result() for future in futures)


def _batches(jobs: Sequence[Job], *, whole_packs: bool) -> list[list[Job]]:
    batches: list[list[Job]] = []
    start = end = 0
    for job in jobs:
        placed = job.placed
        same = bool(batches) and batches[-1][-1].placed.pack == placed.pack
        near = whole_packs or (placed.offset - end <= GAP and placed.offset + placed.length - start <= BATCH)
        if same and near:
            batches[-1].append(job)
        else:
            batches.append([job])
            start = placed.offset
        end = placed.offset + placed.length
    return batches


def _bring(store: Store, batch: Sequence[Job], progress: Progress) -> int:
    key = _key(batch[0])
    spans = sorted({(job.placed.offset, job.placed.length) for job in batch})
    wanted: dict[tuple[int, int], list[Job]] = {}
    for job in batch:
        wanted.setdefault((job.placed.offset, job.placed.length), []).append(job)
    try:
        for span, stored in zip(spans, store.ranges(key, spans)):
            for job in wanted[span]:
                job.tree.put(job.number, _proven(store, key, job, stored))
                progress.advance(job.frame.length)
    except NotFoundError as error:
        raise _missing(batch[0]) from error
    return spans[-1][0] + spans[-1][1] - spans[0][0]


def _key(job: Job) -> str:
    return f"packs/{job.placed.pack}"


def _missing(job: Job) -> IntegrityError:
    return IntegrityError(
        f"The pack {job.placed.pack[:12]} is missing from the store.",
        MEND,
    )


def _proven(store: Store, key: str, job: Job, stored: frames.Bytes) -> frames.Bytes:
    """The raw bytes of a frame; one that arrived corrupt is asked for once more."""
    placed, frame = job.placed, job.frame
    try:
        return frames.decompress(stored, placed.codec, placed.digest, frame.digest, frame.length)
    except IntegrityError:
        [again] = store.ranges(key, [(placed.offset, placed.length)])
        return frames.decompress(again, placed.codec, placed.digest, frame.digest, frame.length)
