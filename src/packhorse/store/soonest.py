"""An answer that is waited for, asked for once more where nothing of it comes: one stuck connection holds nobody up.

Promises that what is asked for again is what has been silent, never what is merely long in coming over a slow line, and
that the requests which are not needed any more are ended.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import asyncio

PATIENCE = 2.0
"""Seconds without a byte, after which a request is made beside the one that is silent."""
_MOST = 3
"""Requests for one thing at a time."""

_Answer = TypeVar("_Answer")


def soonest(ask: Callable[[Callable[[], None]], Awaitable[_Answer]]) -> _Answer:
    """What the first of these requests answers. `ask` makes one, and calls what it is given whenever bytes have come.

    What `ask` raises is raised when no other request is on its way. Callable from any thread, also one that runs an
    event loop.
    """
    import asyncio

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_first(ask))
    with ThreadPoolExecutor(1, thread_name_prefix="soonest") as own:
        return own.submit(lambda: asyncio.run(_first(ask))).result()


async def _first(ask: Callable[[Callable[[], None]], Awaitable[_Answer]]) -> _Answer:
    import asyncio

    heard = time.monotonic()

    def hear() -> None:
        nonlocal heard
        heard = time.monotonic()

    async def one() -> _Answer:
        return await ask(hear)

    tasks: set[asyncio.Task[_Answer]] = set()
    try:
        while True:
            silent = time.monotonic() - heard
            if not tasks or (silent >= PATIENCE and len(tasks) < _MOST):
                tasks.add(asyncio.ensure_future(one()))
                hear()
                silent = 0.0
            done, _ = await asyncio.wait(
                tasks, timeout=max(PATIENCE - silent, 0.05), return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if task.exception() is None or len(tasks) == 1:
                    return task.result()
                tasks.remove(task)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
