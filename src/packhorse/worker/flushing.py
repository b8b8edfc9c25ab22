"""The process that has the disk take what was restored, while the command runs.

Promises that nothing waits for it: neither the restore, nor the command, nor the end. A root on a disk that outlives
the machine is so trusted after the next boot without being read again.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from packhorse import redirect
from packhorse.errors import CannotStartError
from packhorse.root import flushed_file
from packhorse.worker.supervise import Process

if TYPE_CHECKING:
    from packhorse.worker.gate import Gate
    from packhorse.worker.run import Invocation


class Flushing:
    """That of one command."""

    def __init__(self, call: Invocation) -> None:
        self._call = call
        self._running: Process | None = None
        self._gate: Gate | None = None
        self._over = False
        self._seen = self._done = 0

    def begin(self, gate: Gate | None) -> None:
        """Look every `flush_every` seconds from now on whether there is something to flush."""
        self._gate = gate
        self._call.supervisor.every(self._call.flush_every, self._look)

    def end(self) -> None:
        """End it, without waiting: while the kernel writes it cannot be ended."""
        self._over = True
        if self._running is not None:
            self._running.send(signal.SIGKILL)

    def _look(self) -> None:
        """Start it once for each index, when that was not saved again since the last look. By then the kernel has
        written most of it on its own (vm.dirty_expire_centisecs: 30 s)."""
        if self._over or self._running is not None or (self._gate is not None and self._gate.restoring):
            return
        before, self._seen = self._seen, _saved_at(self._call.root.index)
        if self._seen not in (0, self._done) and self._seen == before and not self._call.supervisor.stopping:
            self._done = self._seen
            with contextlib.suppress(CannotStartError):
                self._running = self._call.supervisor.start(
                    self._call.own("flush"), redirect.own(self._call.environ), own=True, on_end=self._ended
                )

    def _ended(self, code: int) -> None:
        self._running = None


def _saved_at(index: Path) -> int:
    """When (nanoseconds since the epoch) an index was last saved; 0 where there is none to be seen, or all is flushed."""
    saved, flushed = _time(index), _time(flushed_file(index))
    return 0 if saved == flushed else saved


def _time(path: Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # not there, or a network file system that fails for a while
        return 0
