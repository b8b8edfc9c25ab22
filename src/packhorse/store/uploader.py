"""Sends packs to the store while the next one is filled: UPLOADS on their way at a time, which bounds the memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from packhorse.snapshot.frames import Bytes
from packhorse.store.objects import Store

UPLOADS = 4
"""Packs on their way at a time."""


class Uploader:
    """The sink of a writer. `bytes` is what was given to it."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload")
        self._pending: deque[Future[None]] = deque()
        self.bytes = 0

    def __call__(self, name: str, content: Sequence[Bytes]) -> None:
        """Send a pack; waits while too many are on their way. Raises StorageError of one before it."""
        self._settle(UPLOADS - 1)
        self.bytes += sum(map(len, content))
        self._pending.append(self._pool.submit(self._store.put, f"packs/{name}", content))

    def _settle(self, left: int) -> None:
        while len(self._pending) > left:
            self._pending.popleft().result()

    def finish(self) -> None:
        """Wait until all packs are there. Raises StorageError."""
        self._settle(0)
        self._pool.shutdown()

    def abandon(self) -> None:
        """Begin no further upload."""
        self._pool.shutdown(wait=False, cancel_futures=True)
