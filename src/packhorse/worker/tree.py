"""The processes that a command became: found, stopped as a whole, continued and killed.

Promises that after `Tree.stop` none of them runs, new ones included, and that their parents notice nothing. Knows
nothing of why. Linux only.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

PATIENCE = 2.0
"""Seconds after which an attempt to stop all processes is given up."""
_KILL_PATIENCE = 5.0
_BLOCKED_PATIENCE = 0.01
"""Seconds after which a thread in an uninterruptible wait counts as stopped: it stops before it runs on."""
_PAUSE = 0.0005
"""Seconds between two looks at processes that were told to stop and have not yet."""
_STOPPED = b"TtZX"
_STOPPED_BY_SIGNAL = b"T"
_BLOCKED = b"D"


class Seen(NamedTuple):
    """What /proc tells of a living process (proc_pid_stat(5)); `state` is one letter."""

    parent: int
    group: int
    state: bytes


def processes() -> dict[int, Seen]:
    """Every living process by its id; a zombie does not live, unless its other threads do."""
    return {pid: seen for pid in _numbers("/proc") if (seen := _look(pid)) is not None}


def descendants(alive: dict[int, Seen], tops: Iterable[int], apart: Collection[int] = ()) -> list[int]:
    """The processes below `tops`, parents before their children, without those in `apart` and what is below them."""
    children: dict[int, list[int]] = {}
    for pid, seen in alive.items():
        children.setdefault(seen.parent, []).append(pid)
    found: list[int] = []
    level = list(tops)
    while level:
        level = [pid for parent in level for pid in children.get(parent, ()) if pid not in apart]
        found += level
    return found


def started(pid: int) -> int:
    """When a process was started, in ticks since the machine was. Raises OSError."""
    return int(_stat(f"/proc/{pid}/stat")[19])


class Tree:
    """The processes below `top`, but for those that are `apart`."""

    def __init__(self, top: int, apart: Callable[[], Collection[int]]) -> None:
        self._top = top
        self._apart = apart
        self._told: dict[int, bool] = {}
        """Who was told to stop, parents first, and whether it ran before."""

    @property
    def stopped(self) -> bool:
        """Whether it is stopped, from `stop` until `resume`."""
        return bool(self._told)

    def stopped_here(self, pid: int) -> bool:
        """Whether a process was running until this stopped it."""
        return self._told.get(pid, False)

    def members(self) -> list[int]:
        """Those that live, parents first."""
        return descendants(processes(), [self._top], self._apart())

    def stop(self, patience: float = math.inf) -> bool:
        """Stop all (SIGSTOP); those that others continued meanwhile once more.

        A parent is stopped before its children, so that it starts no more and does not see them stop. False where
        it could not be done in `patience` seconds, or in PATIENCE; all are continued then.
        """
        until = time.monotonic() + min(patience, PATIENCE)
        while True:
            alive = processes()
            members = descendants(alive, [self._top], self._apart())
            self._told = {pid: ran for pid, ran in self._told.items() if pid in alive}
            known = self._told.keys()
            new = [pid for pid in members if pid not in known and alive[pid].parent in (self._top, *known)]
            for pid in new:
                if _send(pid, signal.SIGSTOP):
                    self._told[pid] = alive[pid].state not in _STOPPED_BY_SIGNAL
            if not any(pid in self._told for pid in new) and not _running(self._told):
                return True
            if not self._settle(until):
                self.resume()
                return False

    def _settle(self, until: float) -> bool:
        """Wait until all who were told have stopped."""
        blocked_until = time.monotonic() + _BLOCKED_PATIENCE
        while running := _running(self._told, blocked_too=time.monotonic() < blocked_until):
            if time.monotonic() > until:
                return False
            for pid in running:
                if _running([pid]):
                    self._told[pid] = True
                    _send(pid, signal.SIGSTOP)
            time.sleep(_PAUSE)
        return time.monotonic() < until

    def resume(self) -> None:
        """Continue those that `stop` stopped, children first, so that no parent sees a stopped one."""
        told, self._told = self._told, {}
        for pid, ran in reversed(told.items()):
            if ran:
                _send(pid, signal.SIGCONT)

    def kill(self) -> bool:
        """Kill all; False where some still were there after a while (they run no more, but hang in the kernel)."""
        self._told = {}
        return kill(self.members)


def kill(find: Callable[[], Iterable[int]]) -> bool:
    """Kill whom `find` finds until it finds nobody; False where some still were there after a while."""
    until = time.monotonic() + _KILL_PATIENCE
    while found := list(find()):
        for pid in found:
            _send(pid, signal.SIGKILL)
        if time.monotonic() > until:
            return False
        time.sleep(_PAUSE)
    return True


def _send(pid: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
        return True
    return False


def _running(pids: Iterable[int], *, blocked_too: bool = False) -> list[int]:
    """Those with a thread that runs or may; `blocked_too`: or is in an uninterruptible wait."""
    still = _STOPPED if blocked_too else _STOPPED + _BLOCKED
    return [pid for pid in pids if any(state not in still for state in _thread_states(pid))]


def _thread_states(pid: int) -> Iterator[bytes]:
    try:
        threads = list(_numbers(f"/proc/{pid}/task"))
    except OSError:
        return
    for thread in threads:
        with contextlib.suppress(OSError):
            yield _stat(f"/proc/{pid}/task/{thread}/stat")[0]


def _look(pid: int) -> Seen | None:
    try:
        fields = _stat(f"/proc/{pid}/stat")
    except OSError:
        return None
    state, parent, group = fields[:3]
    if state in b"ZX" and int(fields[17]) < 2:
        return None
    return Seen(int(parent), int(group), state)


def _stat(path: str) -> list[bytes]:
    """The fields after the name, which may hold anything."""
    with open(path, "rb") as file:
        return file.read().rpartition(b")")[2].split()


def _numbers(directory: str) -> Iterator[int]:
    return map(int, filter(str.isdecimal, os.listdir(directory)))
