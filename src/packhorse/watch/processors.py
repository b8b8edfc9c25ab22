"""Processors as this container sees them: those it may run on, less what its cgroup's quota takes away; and who is first."""

from __future__ import annotations

import contextlib
import math
import os
import threading

_BEHIND = 10
"""A nice value: who computes at 0 gets nine times as much of a processor that both want (sched(7))."""


def usable() -> int:
    """How many processors this process can keep busy: at least one.

    From sched_getaffinity(2) and the CPU bandwidth limit of cgroup v2 (`cpu.max`: quota and period in
    microseconds) or v1.
    """
    count = len(os.sched_getaffinity(0))
    for read in (_quota_v2, _quota_v1):
        with contextlib.suppress(OSError, ValueError):
            quota, period = read()
            if quota > 0 and period > 0:
                return max(1, min(count, math.ceil(quota / period)))
    return count


def step_back() -> None:
    """Let others have the processors first, from now on and for good: only for the thread that calls this.

    On Linux each thread has a nice value of its own (setpriority(2)).
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BEHIND)


def _quota_v2() -> tuple[int, int]:
    with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
        quota, period = file.read().split()
    return (0 if quota == "max" else int(quota)), int(period)


def _quota_v1() -> tuple[int, int]:
    values = []
    for name in ("quota", "period"):
        with open(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us", encoding="ascii") as file:
            values.append(int(file.read()))
    return values[0], values[1]
