"""How many requests at a time pay, and when one is overdue: learned from those that ended.

Knows neither stores nor threads: it is told of each request that ended, by the caller's clock in seconds.
"""

from __future__ import annotations

from collections import deque
from statistics import median

FIRST, LEAST, MOST = 4, 2, 32
"""Requests at a time: at the start, and what it is kept between."""
_GAIN = 1.10
"""More requests at a time are kept when they bring this much more, all windows of either number taken together."""
_REST = 4
"""Windows for which a number that was found is kept before more are tried again."""
_OVERDUE = 3.0
"""A request that takes this many times as long as most, for its size, is overdue."""
_PATIENCE, _FIRST_PATIENCE = 0.5, 5.0
"""Seconds after which a request may be overdue at the earliest: when others have ended, and when none has."""


class Pace:
    """The number of requests at a time: `limit`, climbed up and down by what it brings.

    More are tried while those who use the bytes wait for them. The same number brings now more, now less: so where more
    of them do not bring half of what they might, what fewer bring is looked at once more. Where the processor is what
    everything waits for, more would only take memory, so the number falls.
    """

    def __init__(self, now: float, *, pinned: int | None = None) -> None:
        self.limit = pinned or FIRST
        self._pinned = pinned is not None
        self._ended: deque[tuple[float, int]] = deque(maxlen=32)
        """Seconds and bytes of the last requests."""
        self._fewer = 0
        """While more are tried the number before, else 0."""
        self._brought: dict[int, tuple[int, float]] = {}
        """By the number of requests: bytes, and the seconds in which they came."""
        self._rest = 0
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._since, self._count, self._bytes, self._waited = now, 0, 0, 0

    def ended(self, size: int, seconds: float, now: float, *, awaited: bool) -> None:
        """A request of `size` bytes took `seconds`; `awaited`: somebody had nothing to do until it came."""
        self._ended.append((seconds, size))
        if len(self._ended) == 1:  # a line takes a while to get going
            self._begin(now)
            return
        self._count += 1
        self._bytes += size
        self._waited += awaited
        if not self._pinned and self._count >= 2 * self.limit and now > self._since:
            self._turn(now - self._since, self._waited * 2 >= self._count)
            self._begin(now)

    def _turn(self, seconds: float, starving: bool) -> None:
        """One window ended, that long after it began."""
        if not starving:
            self.limit, self._fewer, self._brought = max(LEAST, self.limit - 1), 0, {}
            return
        size, before = self._brought.get(self.limit, (0, 0.0))
        self._brought[self.limit] = size + self._bytes, before + seconds
        if self._fewer:
            half = (1 + self.limit / self._fewer) / 2
            if self._bytes / seconds < self._rate(self._fewer) * half:
                self.limit, self._fewer, self._rest = self._fewer, 0, _REST
                return
        self._fewer = 0
        more = min(MOST, self.limit + max(1, self.limit // 2))
        if more > self.limit and self._rate(more) >= self._rate(self.limit) * _GAIN:
            self.limit, self._rest = more, 0
        elif self._rest:
            self._rest -= 1
        elif more > self.limit:
            self._fewer, self.limit = self.limit, more

    def _rate(self, limit: int) -> float:
        """What so many requests at a time brought, in bytes a second."""
        size, seconds = self._brought.get(limit, (0, 1.0))
        return size / seconds

    def patience(self, size: int) -> float:
        """Seconds after which a request of `size` bytes is overdue, so that asking once more may be faster."""
        if len(self._ended) < LEAST:
            return _FIRST_PATIENCE
        seconds = median(seconds for seconds, _ in self._ended)
        usual = median(size for _, size in self._ended)
        return max(_PATIENCE, _OVERDUE * seconds * max(1.0, size / usual))
