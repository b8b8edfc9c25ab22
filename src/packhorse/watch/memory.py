"""Memory as this container sees it: its cgroup's limit and use, else the machine's."""

from __future__ import annotations

import contextlib
import gc
import resource
from collections.abc import Iterator
from typing import NamedTuple

from packhorse.watch import processors

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
"""mallopt(3)."""
_SHARE = 16
"""A transfer takes no more than one in this many of the bytes that nobody uses, beyond the least that it needs."""
_LARGEST_KEPT, _KEPT = 32 << 20, 32 << 20
"""The largest buffer that is taken from kept memory (glibc allows no more), and what each arena keeps, in bytes."""
_LEAST_ARENAS = 2


class Memory(NamedTuple):
    """Bytes in use and the most that may be."""

    used: int
    limit: int


def memory() -> Memory:
    """Use and limit of the container (cgroup v2 or v1), or of the machine where there is no limit.

    What files merely lie cached and would give way at once is not in use: an installation leaves gigabytes of it.
    """
    import psutil

    machine = psutil.virtual_memory()
    for directory, used_file, limit_file, cached in (
        ("/sys/fs/cgroup", "memory.current", "memory.max", "inactive_file"),
        (
            "/sys/fs/cgroup/memory",
            "memory.usage_in_bytes",
            "memory.limit_in_bytes",
            "total_inactive_file",
        ),
    ):
        used, limit = _number(f"{directory}/{used_file}"), _number(f"{directory}/{limit_file}")
        if used is not None and limit is not None and limit < machine.total:
            return Memory(max(used - _statistic(f"{directory}/memory.stat", cached), 0), limit)
    return Memory(machine.total - machine.available, machine.total)


def peak() -> int:
    """The most bytes that this process had in memory since it was started.

    From proc_pid_status(5). The ru_maxrss of getrusage(2) outlives exec, and so counts whoever started this
    process; it has to do where the kernel tells nothing else.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def allowance(least: int, each: int, most: int) -> int:
    """Bytes that a transfer may hold: `least` on up to two processors, `each` more for every one beyond, at most `most`,
    as far as there is memory that nobody uses.
    """
    beyond = processors.usable() - 2
    if beyond <= 0:
        return least
    now = memory()
    return max(least, min(least + beyond * each, most, (now.limit - now.used) // _SHARE))


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):  # not there, or "max"
        return None


def keep_freed() -> None:
    """Let the allocator keep what is freed instead of handing it back at once.

    Transfers take and give back buffers of several MiB all the time. By itself glibc maps each from the kernel, which
    clears every page of it again: half a second for each GB. No effect where there is no mallopt(3), as with musl.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def few_arenas() -> None:
    """Have all threads share a few of the allocator's arenas, one for four processors, so that what one frees another takes.

    To be called before there are many threads: an arena that was made stays. By itself glibc makes eight for each
    processor, one for each new thread. No effect where there is no mallopt(3), as with musl.
    """
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(_LEAST_ARENAS, processors.usable() // 4))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Have the garbage collector wait while long lists are made: it would go through all of them again and again, and
    find nothing. A tenth of the time of a push or pull with nothing to bring."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back() -> None:
    """Hand back to the kernel what the allocator kept. No effect where there is no malloc_trim(3)."""
    import ctypes

    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _statistic(path: str, name: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(f"{name} ")), 0)
    except (OSError, ValueError):
        return 0
