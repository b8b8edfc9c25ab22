"""How long large objects take on their way to a store, and so when one is stuck.

A client cannot see how far a request has got on its way out, so what others took is all there is to go by. Promises
that over a line that is merely slow hardly anything is sent twice.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

_LEAST = 5.0
"""Seconds in which nothing counts as stuck."""
_TIMES = 3.0
"""An object is stuck that takes so many times as long as its size took lately."""
_LATELY = 8
_UNKNOWN = 1 / (96 << 10)
"""Seconds for each byte while nothing has been sent."""


class Sending:
    """The objects that are on their way to one store. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._took: deque[float] = deque(maxlen=_LATELY)
        """Seconds for each byte of the last ones."""
        self._beside = False

    @contextlib.contextmanager
    def one(self, size: int) -> Iterator[Callable[[float], bool]]:
        """While an object of `size` bytes is sent. Gives what tells, by the seconds that it was silent, whether to send it
        once more beside: once for an object, and one object at a time, since where all are slow the line is."""
        begun = time.monotonic()
        beside = False

        def stuck(silent: float) -> bool:
            nonlocal beside
            with self._lock:
                slowest = max(self._took, default=_UNKNOWN)
                if self._beside or silent < _LEAST + _TIMES * slowest * size:
                    return False
                self._beside = beside = True
            return True

        try:
            yield stuck
            if not beside:
                with self._lock:
                    self._took.append((time.monotonic() - begun) / size)
        finally:
            if beside:
                with self._lock:
                    self._beside = False
