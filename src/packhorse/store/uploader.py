"""Sends packs to the store while the next ones are filled: as many at a time as pay, and bounded in what they hold."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from packhorse.snapshot.frames import Bytes
from packhorse.store.objects import Store

FIRST, LEAST_MOST = 2, 4
"""Packs on their way at a time: at the start, and the most unless there is room for more."""
HELD, HELD_EACH, HELD_MOST = 40 << 20, 10 << 20, 80 << 20
"""The most bytes on their way at a time, unless a single pack has more, as `memory.allowance` takes it."""
HELD_DEEP = 12 << 20
"""The same at levels where frames take more memory, and so long that the line waits for them."""
_FAST, _SLOW = 10.0, 60.0
"""Seconds for a pack: where it took less one more at a time is tried, where it took more one less."""


class Uploader:
    """The sink of a writer. `bytes` is what was given to it.

    Its threads are daemons, since one that waits for a store must not keep the process from ending.
    """

    def __init__(self, store: Store, *, connections: int | None = None, held: int = HELD) -> None:
        """`connections` packs at a time, whatever they hold; by default as many as pay within `held` bytes."""
        self._store = store
        self._pinned = connections is not None
        self._held = held
        self._most = max(LEAST_MOST, held // HELD_EACH)
        self._limit = connections or FIRST
        self._changed = threading.Condition()
        self._sizes: list[int] = []
        """Of the packs on their way."""
        self._failure: BaseException | None = None
        self.bytes = 0

    def __call__(self, name: str, content: Sequence[Bytes]) -> None:
        """Send a pack; waits while too many are on their way. Raises StorageError of one before it."""
        size = sum(map(len, content))
        self._wait(lambda: not self._sizes or self._fits(size))
        with self._changed:
            self._sizes.append(size)
        self.bytes += size
        threading.Thread(
            target=self._send, args=(f"packs/{name}", content, size), name="upload", daemon=True
        ).start()

    def finish(self) -> None:
        """Wait until all packs are there. Raises StorageError."""
        self._wait(lambda: not self._sizes)

    def _fits(self, size: int) -> bool:
        """Whether one more of this size may be on its way."""
        within = self._pinned or sum(self._sizes) + size <= self._held
        return within and len(self._sizes) < self._limit

    def _wait(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or ready())
            if self._failure is not None:
                raise self._failure

    def _send(self, key: str, content: Sequence[Bytes], size: int) -> None:
        begun = time.monotonic()
        failure: BaseException | None = None
        try:
            self._store.put(key, content)
        except BaseException as error:  # the writer's thread raises it
            failure = error
        seconds = time.monotonic() - begun
        with self._changed:
            self._sizes.remove(size)
            self._failure = self._failure or failure
            if not self._pinned:
                self._limit += (seconds < _FAST and self._limit < self._most) - (
                    seconds > _SLOW and self._limit > 1
                )
            self._changed.notify_all()
