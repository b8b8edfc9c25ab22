"""The requests on their way to a store: what is asked for next, and once more where it is overdue or broke off.

What somebody waits for comes before everything else. Promises that no more bytes are asked for and not yet written than
are allowed, and one request more where somebody waits. What becomes of the bytes is up to those who take them.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from packhorse.errors import MEND, IntegrityError
from packhorse.snapshot import frames
from packhorse.snapshot.manifest import Frame
from packhorse.snapshot.order import NEEDED, UNCALLED
from packhorse.snapshot.writer import Placed
from packhorse.store import condemned
from packhorse.store.objects import NotFoundError, Store, UnreachableError
from packhorse.transfer.pace import Pace

BATCH = 16 << 20
"""The most that one request asks for, in stored bytes, unless one frame has more: packs are smaller as a rule."""
GAP = 256 << 10
"""Unwanted bytes between two frames that are rather read than skipped with a request more."""
ATTEMPTS = 6
"""How often a batch is asked for when requests break off, beside the client's own attempts at a connection."""
_WRITTEN = 3
"""As many requests' bytes may wait to be written beside those that are on their way."""
_TICK = 0.1
"""Seconds between two looks for what is overdue."""


class Destination(Protocol):
    """Where frames go."""

    def put(self, number: int, parts: Iterable[frames.Bytes]) -> None:
        """Write what the frame `number` holds. Callable from several threads, and once more after `parts` raised."""


@dataclass(frozen=True)
class Job:
    """One frame on its way."""

    tree: Destination
    number: int
    frame: Frame
    placed: Placed
    rank: int = 0
    """Lower ones are asked for first. From UNCALLED on they are written behind the work of other processes."""
    small: bool = False
    """Whether it holds files that are created when it is written: one at a time, and nothing else waits for that."""

    @property
    def key(self) -> str:
        """Of its pack."""
        return f"packs/{self.placed.pack}"


class Wanted:
    """Frames that somebody waits for, told to a `fetch` that is on its way, from any thread.

    `patient` holds back what nobody waits for: "never" asks for none of it, "once" for none before somebody waits for
    something, "slowly" for little at a time.
    """

    def __init__(self, patient: str = "") -> None:
        self.patient = patient
        self.wake: Callable[[], None] = lambda: None
        """Set by the fetch that listens."""
        self.stopped = False
        self._keys: queue.SimpleQueue[list[tuple[int, int]]] = queue.SimpleQueue()

    def add(self, tree: Destination, numbers: Iterable[int]) -> None:
        """These frames are to be asked for next, after those that were wanted before."""
        self._keys.put([(id(tree), number) for number in numbers])
        self.wake()

    def stop(self) -> None:
        """Have the fetch end as it is."""
        self.stopped = True
        self.wake()

    def taken(self) -> list[tuple[int, int]]:
        """What was added since the last call, as (id of the destination, number)."""
        keys: list[tuple[int, int]] = []
        with contextlib.suppress(queue.Empty):
            while True:
                keys += self._keys.get_nowait()
        return keys


@dataclass
class Batch:
    """Neighbouring frames of one pack, in the order of their offsets."""

    jobs: list[Job]
    start: int
    end: int
    attempts: int = 0
    requests: set[asyncio.Task[memoryview]] = field(default_factory=set)
    asked: float = 0.0
    """When it was last asked for."""
    called: bool = True
    """Whether somebody waits for it, or is expected to."""
    unwritten: int = 0
    """How many of its frames arrived and are not yet written, without small ones."""

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def key(self) -> str:
        return self.jobs[0].key


class Stored(NamedTuple):
    """A frame that arrived, as it is stored."""

    batch: Batch
    job: Job
    content: memoryview


class Arrived:
    """Frames that arrived, for the threads that write them.

    In their order, but where there is a choice nobody gets one of a pack of which another thread is writing one: what lies in
    one pack is mostly of one file, and the kernel lets only one write to a file at a time.
    """

    def __init__(self) -> None:
        self._waiting: deque[Stored] = deque()
        self._written: dict[int, str] = {}
        """The pack of what each thread writes."""
        self._ended = False
        self._news = threading.Condition()

    def put(self, stored: Stored) -> None:
        """One more, the last."""
        with self._news:
            self._waiting.append(stored)
            self._news.notify()

    def end(self) -> None:
        """Nothing more comes."""
        with self._news:
            self._ended = True
            self._news.notify_all()

    def get(self) -> Stored | None:
        """What this thread is to write next, having written what it was given before; None if nothing more comes."""
        thread = threading.get_ident()
        with self._news:
            self._written.pop(thread, None)
            self._news.wait_for(lambda: self._waiting or self._ended)
            if not self._waiting:
                return None
            busy = self._written.values()
            number = next((n for n, each in enumerate(self._waiting) if each.batch.key not in busy), 0)
            stored = self._waiting[number]
            del self._waiting[number]
            self._written[thread] = stored.batch.key
            return stored

    def take_all(self) -> list[Stored]:
        """What nobody has begun with, which waits here no longer."""
        with self._news:
            every = list(self._waiting)
            self._waiting.clear()
        return every

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting


class Line:
    """The requests on their way to the store. `ask` is the only thing that runs in its thread."""

    def __init__(
        self,
        store: Store,
        jobs: Iterable[Job],
        connections: int | None,
        wanted: Wanted,
        began: float,
        held: int,
    ) -> None:
        """`began` is when what needs these jobs began, by `condemned.clock`; `held` the most bytes that are asked for
        and not yet written."""
        self.small, self.called, self.uncalled = Arrived(), Arrived(), Arrived()
        """What arrived: small frames, and the others by `Batch.called`."""
        self.bytes = 0
        self._store = store
        self._began = began
        self._pending = deque(jobs)
        self._urgent: deque[Job] = deque()
        self._wanted = wanted
        self._again: list[tuple[float, Batch]] = []
        """What broke off, and when it may be asked for again."""
        self._active: dict[asyncio.Task[memoryview], Batch] = {}
        self._held, self._most = 0, held
        self._small = 0
        """Of what is held, the small frames that have arrived."""
        self._lock = threading.Lock()
        self._pace = Pace(time.monotonic(), pinned=connections)
        self._stopped = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()

    # --- called by writers ---

    def written(self, batch: Batch, job: Job) -> None:
        """A frame is no longer used; the last one of a batch frees the memory of all but the small ones."""
        with self._lock:
            if job.small:
                self._small -= job.placed.length
                self._held -= job.placed.length
            else:
                batch.unwritten -= 1
                if batch.unwritten:
                    return
                self._held -= batch.size
        self._wake()

    def stop(self) -> None:
        """Ask for nothing more."""
        self._stopped = True
        self._wake()

    def _wake(self) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(self._news.set)

    # --- in its own thread ---

    def ask(self) -> None:
        """Ask for everything, then tell the writers to end. Raises what a batch fails with for good."""
        try:
            asyncio.run(self._run())  # raises OSError where no descriptor is left for its loop
        finally:
            for arrived in (self.small, self.called, self.uncalled):
                arrived.end()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._wanted.wake = self._wake
        try:
            while self._left and not (self._stopped or self._wanted.stopped):
                self._ask()
                await self._something_happens()
                self._settle()
                self._ask_again()
        finally:
            self._loop = None
            tasks = list(self._active)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def _left(self) -> bool:
        """Whether anything has not arrived."""
        return bool(self._pending or self._urgent or self._again or self._active)

    def _ask(self) -> None:
        condemned.require_time(self._began, "pull")
        self._prefer()
        while len(self._active) < self._pace.limit and (batch := self._next()):
            with self._lock:
                self._held += batch.size
            self._request(batch)

    def _next(self) -> Batch | None:
        """What to ask for now, if there is anything and room for it."""
        now = time.monotonic()
        due = [each for each in self._again if each[0] <= now]
        again = next((each for each in due if each[1].called), due[0] if due and not self._urgent else None)
        if again is not None:
            if self._fits(again[1].size):
                self._again.remove(again)
                return again[1]
            if not self._urgent:
                return None
        source, passed = (self._urgent, 0) if self._urgent else (self._pending, self._passed())
        if not source:
            return None
        if source is self._pending and self._held_back(source[passed]):
            return None
        # Of more requests at a time each asks for less.
        share = min(BATCH, self._most // (self._pace.limit + _WRITTEN))
        # Somebody who waits does not wait for those to be written that nobody waits for.
        if not self._fits(0 if source is self._urgent else max(share, source[passed].placed.length)):
            return None
        source.rotate(-passed)
        batch = _take(source, share, small=not passed)
        source.rotate(passed)
        batch.called = source is self._urgent or batch.jobs[0].rank < UNCALLED
        return batch

    def _held_back(self, job: Job) -> bool:
        """Whether patience has it wait until somebody wants it."""
        patient = self._wanted.patient
        return job.rank != NEEDED and (patient in ("never", "once") or bool(patient and self._active))

    def _passed(self) -> int:
        """How many small jobs are passed over for now, since those that have arrived wait for their writer."""
        if not self._pending or self._small <= self._most // 4:
            return 0
        rank = self._pending[0].rank
        return next(
            (number for number, job in enumerate(self._pending) if not job.small and job.rank == rank), 0
        )

    def _fits(self, size: int) -> bool:
        return not self._held or self._held + size <= self._most

    def _prefer(self) -> None:
        """Move what is wanted in front of everything else, wherever it is on its way."""
        wanted = set(self._wanted.taken())
        if not wanted:
            return
        if self._wanted.patient == "once":
            self._wanted.patient = ""
        self._urgent.extend(job for job in self._pending if _wish(job) in wanted)
        self._pending = deque(job for job in self._pending if _wish(job) not in wanted)
        for batch in (*self._active.values(), *(batch for _, batch in self._again)):
            batch.called = batch.called or any(_wish(job) in wanted for job in batch.jobs)
        for stored in self.uncalled.take_all():
            (self.called if _wish(stored.job) in wanted else self.uncalled).put(stored)

    def _request(self, batch: Batch) -> None:
        task = asyncio.ensure_future(self._store.get_range_async(batch.key, batch.start, batch.end))
        task.add_done_callback(_heard)
        batch.asked = time.monotonic()
        batch.requests.add(task)
        self._active[task] = batch

    async def _something_happens(self) -> None:
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({*self._active, news}, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        self._news.clear()

    def _settle(self) -> None:
        now = time.monotonic()
        for task in [task for task in self._active if task.done()]:
            batch = self._active.pop(task, None)
            if batch is None:  # the slower twin of one that has just arrived
                continue
            batch.requests.discard(task)
            error = task.exception()
            if error is None:
                for twin in batch.requests:
                    twin.cancel()
                    self._active.pop(twin, None)
                batch.requests.clear()
                self.bytes += batch.size
                awaited = any(self._queue(batch, job).empty() for job in batch.jobs)
                self._pace.ended(batch.size, now - batch.asked, now, awaited=awaited)
                self._hand_over(batch, task.result())
            elif not batch.requests:
                self._failed(batch, error, now)

    def _hand_over(self, batch: Batch, content: memoryview) -> None:
        small = [job for job in batch.jobs if job.small]
        size = sum(job.placed.length for job in small)
        batch.unwritten = len(batch.jobs) - len(small)
        with self._lock:
            self._small += size
            self._held += size - (0 if batch.unwritten else batch.size)
        for job in batch.jobs:
            start = job.placed.offset - batch.start
            part = content[start : start + job.placed.length]
            if job.small:  # in memory of its own, since that of the others is free before
                part = memoryview(bytes(part))
            self._queue(batch, job).put(Stored(batch, job, part))

    def _queue(self, batch: Batch, job: Job) -> Arrived:
        if job.small:
            return self.small
        return self.called if batch.called else self.uncalled

    def _failed(self, batch: Batch, error: BaseException, now: float) -> None:
        """The last request for a batch broke: ask again a little later, each time later, all workers apart."""
        batch.attempts += 1
        if isinstance(error, NotFoundError):
            raise missing(batch.jobs[0]) from error
        if not isinstance(error, UnreachableError) or batch.attempts >= ATTEMPTS:
            raise error
        with self._lock:
            self._held -= batch.size
        self._again.append((now + pause(batch.attempts), batch))

    def _ask_again(self) -> None:
        """Ask once more for what is overdue, beside the request that may still answer: the first to come counts.

        For few at a time: when all are slow the line is, and asking twice would make it worse.
        """
        now = time.monotonic()
        asked = self._asked()
        twins = len(self._active) - len(asked)
        for batch in asked:
            if twins >= max(1, len(self._active) // 4):
                return
            if len(batch.requests) < 3 and now - batch.asked > self._pace.patience(batch.size):
                self._request(batch)
                twins += 1

    def _asked(self) -> list[Batch]:
        """The batches that are asked for now, the one that waits longest first."""
        return sorted({id(batch): batch for batch in self._active.values()}.values(), key=lambda b: b.asked)


def _heard(task: asyncio.Task[memoryview]) -> None:
    """What a request failed with that nobody waits for any more is no news, which asyncio would print."""
    if not task.cancelled():
        task.exception()


def _take(jobs: deque[Job], most: int, *, small: bool) -> Batch:
    """The first of these jobs, and those after it that lie near it, up to `most` bytes in all and up to the first small
    one unless they may be `small`; they are removed."""
    first = jobs.popleft()
    batch = Batch([first], first.placed.offset, first.placed.offset + first.placed.length)
    while jobs:
        placed = jobs[0].placed
        end = max(batch.end, placed.offset + placed.length)
        # In the order of ranks it may lie before.
        near = placed.offset >= batch.start and placed.offset - batch.end <= GAP
        if placed.pack != first.placed.pack or not near or end - batch.start > most:
            break
        if jobs[0].small and not small:
            break
        batch.jobs.append(jobs.popleft())
        batch.end = end
    return batch


def pause(attempts: int) -> float:
    """Seconds to wait after so many requests that broke off: longer each time, and not the same for all workers."""
    return random.uniform(0.1, 0.3) * (1 << attempts)  # noqa: S311


def _wish(job: Job) -> tuple[int, int]:
    """A job as `Wanted` names it."""
    return id(job.tree), job.number


def missing(job: Job) -> IntegrityError:
    """What a job ends with where its pack is not there."""
    return IntegrityError(f"The pack {job.placed.pack[:12]} is missing from the store.", MEND)
