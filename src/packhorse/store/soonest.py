"""An answer that is waited for, asked for once more where nothing of it comes: one stuck connection holds nobody up.

Promises that what is asked for again is what has been silent, never what is merely long in coming over a slow line, and
that the requests which are not needed any more are ended.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    import asyncio

PATIENCE = 2.0
"""Seconds without a byte, after which a request is made beside the one that is silent."""
_MOST = 3
"""Requests for one thing at a time."""

_Answer = TypeVar("_Answer")


Ask: TypeAlias = Callable[[bool, Callable[[], None]], Awaitable[_Answer]]
"""Makes a request, and calls what it is given whenever bytes have come. True for one beside another: such a one should not be
tried often, since a store that asks for patience is silent, too."""


def silent_for_long(seconds: float) -> bool:
    """Whether so many seconds without a byte are more than a short answer may take."""
    return seconds >= PATIENCE


def soonest(ask: Ask[_Answer], overdue: Callable[[float], bool] = silent_for_long) -> _Answer:
    """The first answer to one of these requests, or what the first request raises.

    `overdue` tells by the seconds without a byte whether to make another request beside those that are silent. Callable from any thread, also one that runs an event loop.
    """
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_first(ask, overdue))
    with ThreadPoolExecutor(1, thread_name_prefix="soonest") as own:
        return own.submit(lambda: asyncio.run(_first(ask, overdue))).result()


async def _first(ask: Ask[_Answer], overdue: Callable[[float], bool]) -> _Answer:
    import asyncio

    heard = time.monotonic()

    def hear() -> None:
        nonlocal heard
        heard = time.monotonic()

    async def request() -> _Answer:
        return await ask(len(tasks) > 1, hear)

    tasks: list[asyncio.Task[_Answer]] = []
    try:
        while True:
            if not tasks or (len(tasks) < _MOST and overdue(time.monotonic() - heard)):
                tasks.append(asyncio.ensure_future(request()))
                hear()
            pending = [task for task in tasks if not task.done()]
            await asyncio.wait(pending, timeout=PATIENCE / 4, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done() and (task is tasks[0] or task.exception() is None):
                    return task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
