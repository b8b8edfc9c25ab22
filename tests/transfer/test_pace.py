"""The number of requests follows what more of them bring, and patience follows what is usual. By a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from statistics import mean, median

from packhorse.transfer.pace import FIRST, LEAST, MOST, Pace

MIB = 1 << 20


class Line:
    """A line on which `rate` tells the bytes a second for a number of requests at a time."""

    def __init__(
        self, rate: Callable[[int], float], *, awaited: bool = True, pinned: int | None = None
    ) -> None:
        self.now = 1000.0
        self.rate, self.awaited = rate, awaited
        self.pace = Pace(self.now, pinned=pinned)
        self.limits = [self.pace.limit]

    def bring(self, requests: int) -> list[int]:
        """Let so many requests of 8 MiB end one after the other; the limits on the way."""
        for _ in range(requests):
            limit = self.pace.limit
            self.now += 8 * MIB / self.rate(limit)
            self.pace.ended(8 * MIB, 8 * MIB * limit / self.rate(limit), self.now, awaited=self.awaited)
            self.limits.append(self.pace.limit)
        return self.limits


def test_a_line_where_each_request_brings_as_much_gets_as_many_as_there_may_be() -> None:
    limits = Line(lambda limit: 10 * MIB * limit).bring(2000)
    assert limits[0] == FIRST
    assert limits == sorted(limits)
    assert limits[-1] == MOST


def test_where_more_bring_nothing_their_number_stays() -> None:
    line = Line(lambda limit: 100 * MIB)
    assert line.bring(1000).count(FIRST) > 500
    assert max(line.limits) <= FIRST + FIRST // 2
    assert min(line.limits) == FIRST


def test_what_a_line_brings_by_chance_is_no_reason_for_more() -> None:
    chance = random.Random(1)
    lines = [Line(lambda limit: 100 * MIB * chance.uniform(0.5, 1.5)) for _ in range(20)]
    assert mean(median(line.bring(1000)) for line in lines) <= FIRST + FIRST // 2


def test_the_first_bytes_which_are_slow_to_come_are_no_reason_for_more() -> None:
    line = Line(lambda limit: 100 * MIB if line.now > 1000 else 8 * MIB)
    assert median(line.bring(1000)) == FIRST


def test_a_number_is_found_near_where_the_line_is_full_and_given_up_when_it_grows() -> None:
    most = 12
    line = Line(lambda limit: 10 * MIB * min(limit, most))
    line.bring(2000)
    assert 9 <= line.limits[-1] <= 20
    most = 1000
    line.bring(3000)
    assert line.limits[-1] == MOST


def test_where_the_writers_are_what_is_slow_their_number_falls() -> None:
    line = Line(lambda limit: 10 * MIB * limit, awaited=False)
    limits = line.bring(200)
    assert limits == sorted(limits, reverse=True)
    assert limits[-1] == LEAST


def test_a_pinned_number_stays() -> None:
    assert set(Line(lambda limit: 10 * MIB * limit, pinned=7).bring(500)) == {7}
    assert set(Line(lambda limit: 10 * MIB * limit, pinned=7, awaited=False).bring(500)) == {7}


def test_a_request_is_overdue_by_what_is_usual() -> None:
    pace = Pace(0.0)
    assert pace.patience(MIB) == 5.0
    now = 0.0
    for seconds in (2.0, 2.0, 60.0, 2.0, 2.0):
        now += seconds
        pace.ended(MIB, seconds, now, awaited=True)
    assert pace.patience(MIB) == 6.0, "one that took long is not usual"
    assert pace.patience(4 * MIB) == 24.0, "four times as much takes four times as long on a full line"
    assert pace.patience(MIB // 4) == 6.0, "a small one waits behind large ones"
    for _ in range(32):
        now += 0.001
        pace.ended(MIB, 0.001, now, awaited=True)
    assert pace.patience(MIB) == 0.5, "on a fast line nobody is asked twice for a hiccup"
