"""The profile of a command that starts before everything is there: read while the restore begins, and refined for the next start.

Promises that a store which fails or is slow costs an order, never a boot, that a profile which could not be read is not
replaced by what one start saw, and that what was learnt is kept although the restore is ended before its time.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

from packhorse.errors import PackhorseError
from packhorse.snapshot.order import Opened, refined
from packhorse.store import profiles
from packhorse.store.objects import Store

_PATIENCE = 5.0
"""The most seconds that the order of files waits for a profile."""
_PARTING = 2.0
"""The most seconds from SIGTERM to the end. The supervisor has less patience."""


class Learning:
    """One profile in one boot. All that asks the store for it does so in one thread."""

    def __init__(
        self,
        store: Store,
        tag: str,
        name: str,
        command: str,
        used: Callable[[Collection[bytes]], list[tuple[bytes, float]]],
        warn: Callable[[str], None],
    ) -> None:
        """`used` is that of the restorer, but for the root; `command` is for people."""
        self._store, self._tag, self._name, self._command = store, tag, name, command
        self._used, self._warn = used, warn
        self._files: tuple[Opened, ...] | None = None
        """Of the profile; None while it was not read."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="profile")
        self._last: Future[None] | None = None

    def read(self) -> None:
        """Begin to ask for the profile."""
        self._last = self._thread.submit(self._read_or_warn)

    @property
    def files(self) -> Sequence[Opened]:
        """Those of the profile, when the store has answered; none where it has none, cannot be read, or takes too long."""
        if self._last is not None:
            futures.wait([self._last], _PATIENCE)
        return self._files or ()

    def refine(self) -> None:
        """Begin to keep what the command needed so far. A store that fails keeps the old profile."""
        self._last = self._thread.submit(self._refine)

    def wait(self) -> None:
        """Wait for what was begun."""
        if self._last is not None:
            self._last.result()

    def refine_at_the_end(self) -> None:
        """From now on SIGTERM ends this process when what was learnt is kept, or could not be soon.

        Call it in the main thread.
        """
        ends: queue.SimpleQueue[int] = queue.SimpleQueue()  # which a handler may put into

        def end() -> None:
            number = ends.get()
            with contextlib.suppress(Exception):
                self._thread.submit(self._refine).result(_PARTING)
            os._exit(128 + number)

        threading.Thread(target=end, name="end", daemon=True).start()
        signal.signal(signal.SIGTERM, lambda number, frame: ends.put(number))

    def _read_or_warn(self) -> None:
        try:
            self._read()
        except (PackhorseError, OSError) as error:
            why = error.what if isinstance(error, PackhorseError) else f"{error.strerror or error}."
            self._warn(f"the profile {self._name} cannot be read, so files come in the usual order: {why}")

    def _read(self) -> None:
        profile = profiles.read(self._store, self._tag, self._name, self._warn)
        self._files = profile.files if profile is not None else ()

    def _refine(self) -> None:
        with contextlib.suppress(PackhorseError, OSError):
            if self._files is None:
                if not self._used(()):
                    return  # so the store need not be asked
                self._read()
            before = self._files or ()
            files = refined(before, self._used({opened.path for opened in before}))
            if files != before:
                profile = profiles.Profile(name=self._name, command=self._command, files=files)
                profiles.write(self._store, self._tag, profile)
                self._files = files
