"""Frames from the store into files: neighbours in one request, several requests at a time, all bytes proven.

One thread asks, in the order that `line` promises; others prove, decompress and write, not the same ones what somebody
waits for and what nobody does. Promises bounded memory: what `line` holds, and a raw frame of small files for each of the
threads that create them.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial

from packhorse.errors import IntegrityError
from packhorse.progress import Progress
from packhorse.snapshot import frames
from packhorse.snapshot.order import UNCALLED
from packhorse.store import condemned
from packhorse.store.objects import NotFoundError, Store, UnreachableError
from packhorse.transfer.line import ATTEMPTS, Arrived, Job, Line, Wanted, missing, pause
from packhorse.watch import processors
from packhorse.watch.memory import allowance, give_back, keep_freed

WRITERS_MOST = 8
_SMALL_WRITERS = 2
"""One creates files, and the other one decompresses meanwhile."""
HELD, HELD_EACH, HELD_MOST = 48 << 20, 4 << 20, 64 << 20
"""The most bytes that are asked for and not yet written, as `memory.allowance` takes it: more writers use more at a
time."""


def fetch(
    store: Store,
    jobs: Iterable[Job],
    progress: Progress,
    *,
    connections: int | None = None,
    threads: int | None = None,
    wanted: Wanted | None = None,
    hurry: threading.Event | None = None,
    prepare: Callable[[], None] = lambda: None,
    written: Callable[[Job], None] = lambda job: None,
    began: float | None = None,
) -> int:
    """Bring every job's frame where it goes; returns the bytes requested.

    `prepare` is called once before anything is written, as a rule while the first bytes are on their way; `written` after
    each job that is, from several threads. `connections` and `threads` pin the number of requests at a time and of threads
    that write; without them both follow from the line and the processors. One or two more create small files, and as many
    again write behind the work of other processes, where there is something to be written so. Until `hurry`, if given, is set
    one thread alone writes all but small frames; whoever stops `wanted` has to set it. `began` is when the pull began, by
    `condemned.clock`; else it begins now. Raises IntegrityError for what is not what its digest says, and StorageError.
    """
    began = condemned.clock() if began is None else began
    waiting = sorted(jobs, key=lambda job: (job.rank, *_place(job)))
    if not waiting:
        prepare()
        return 0
    keep_freed()
    wanted = wanted or Wanted()
    if hurry is None:
        hurry = threading.Event()
        hurry.set()

    def finished(job: Job) -> None:
        progress.advance(job.frame.length)
        written(job)

    try:
        ranged = store.keeps_ranges(waiting[0].key)
    except NotFoundError as error:
        raise missing(waiting[0]) from error
    writers = threads or min(processors.usable() + 1, WRITERS_MOST)
    if not ranged:
        prepare()
        return _fetch_whole_packs(store, waiting, finished, wanted, writers, began)
    held = allowance(HELD, HELD_EACH, HELD_MOST)
    line = Line(store, waiting, connections, wanted, began, held)
    write = [partial(_write_what_comes, store, line, line.small, finished)] * min(writers, _SMALL_WRITERS)
    write += [partial(_write_what_comes, store, line, line.called, finished)]
    write += [partial(_write_in_a_hurry, store, line, finished, hurry)] * (writers - 1)
    if waiting[-1].rank >= UNCALLED:
        write += [partial(_write_stepped_back, store, line, finished)] * writers
    with ThreadPoolExecutor(len(write) + 1, thread_name_prefix="fetch") as pool:
        try:
            asking: Future[None] = pool.submit(line.ask)
            prepare()
            writing = [pool.submit(each) for each in write]
            done, _ = wait([asking, *writing], return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            line.stop()
            hurry.set()
        for future in (asking, *writing):
            future.result()
    give_back()
    return line.bytes


def _write_what_comes(store: Store, line: Line, arrived: Arrived, finished: Callable[[Job], None]) -> None:
    while (stored := arrived.get()) is not None:
        batch, job = stored.batch, stored.job
        _put(store, job, stored.content)
        finished(job)
        del stored  # before `written` counts on it
        line.written(batch, job)


def _write_in_a_hurry(
    store: Store, line: Line, finished: Callable[[Job], None], hurry: threading.Event
) -> None:
    hurry.wait()
    _write_what_comes(store, line, line.called, finished)


def _write_stepped_back(store: Store, line: Line, finished: Callable[[Job], None]) -> None:
    # A thread that has stepped back stays there, so it gets nothing that somebody waits for.
    processors.step_back()
    _write_what_comes(store, line, line.uncalled, finished)


def _put(store: Store, job: Job, stored: frames.Bytes) -> None:
    """Write a frame; one that arrived corrupt is asked for once more."""
    placed = job.placed
    try:
        job.tree.put(job.number, _proven(job, stored))
    except IntegrityError:
        [again] = store.ranges(job.key, [(placed.offset, placed.length)])
        job.tree.put(job.number, _proven(job, again))


def _proven(job: Job, stored: frames.Bytes) -> Iterator[frames.Bytes]:
    placed, frame = job.placed, job.frame
    return frames.decompress(stored, placed.codec, placed.digest, frame.digest, frame.length)


def _fetch_whole_packs(
    store: Store,
    jobs: Sequence[Job],
    finished: Callable[[Job], None],
    wanted: Wanted,
    threads: int,
    began: float,
) -> int:
    """For a store that ignores ranges: each pack is streamed from its beginning to the last byte wanted, once, and
    again for what is left where the stream breaks off."""
    stop = threading.Event()
    packs = [
        list(inside) for _, inside in itertools.groupby(sorted(jobs, key=_place), key=lambda job: job.key)
    ]
    packs.sort(key=lambda inside: min(job.rank for job in inside))

    def bring(inside: Sequence[Job]) -> int:
        left: dict[tuple[int, int], list[Job]] = {}
        for job in inside:
            left.setdefault((job.placed.offset, job.placed.length), []).append(job)
        size = max(map(sum, left)) - min(left)[0]
        for attempt in itertools.count(1):
            condemned.require_time(began, "pull")
            try:
                spans = list(left)
                for span, stored in zip(spans, store.ranges(inside[0].key, spans)):
                    for job in left[span]:
                        if stop.is_set() or wanted.stopped:
                            return 0
                        _put(store, job, stored)
                        finished(job)
                    del left[span]
                break
            except NotFoundError as error:
                raise missing(inside[0]) from error
            except UnreachableError:
                if attempt == ATTEMPTS or stop.wait(pause(attempt)):
                    raise
        return size

    with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
        futures = [pool.submit(bring, inside) for inside in packs]
        try:
            return sum(future.result() for future in futures)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _place(job: Job) -> tuple[str, int]:
    return job.placed.pack, job.placed.offset
