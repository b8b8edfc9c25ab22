"""Job control of the controlling terminal: the child has it as if nobody stood between.

Promises that a stop of the child stops this whole job, and that the shell above can continue it. Knows nothing of
what the child is.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packhorse.worker.supervise import Process


class Terminal:
    """Job control of the controlling terminal, as a shell does it for its jobs (credentials(7), tcsetpgrp(3))."""

    def __init__(self, pausing: Callable[[], AbstractContextManager[None]]) -> None:
        """`pausing` is entered while this process itself is stopped."""
        self._pausing = pausing
        try:
            self._descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            self._descriptor = -1
        self._lent = False
        self._wanted = False

    @property
    def there(self) -> bool:
        """Whether this process has a controlling terminal."""
        return self._descriptor >= 0

    def offer(self, child: Process) -> None:
        """Hand over the terminal if it is ours and the child has it as stdin and stdout.

        In `packhorse exec -- CMD | less` it stays with our group; a child that needs it all the same is
        stopped for want of it (SIGTTIN, SIGTTOU), and then gets it.
        """
        self._wanted = os.isatty(0) and os.isatty(1)
        if self._wanted and self._in_front() == os.getpgrp():
            self._lend(child)

    def take_back(self) -> None:
        """Take the terminal from whoever of ours has it."""
        if self._lent:
            self._put_in_front(os.getpgrp())
            self._lent = False

    def stopped(self, process: Process, number: int) -> None:
        """A process was stopped: stop this whole job with it, so that the shell above learns of it."""
        if not self.there:
            return
        if number in (signal.SIGTTIN, signal.SIGTTOU) and self._in_front() in (os.getpgrp(), process.pid):
            self._lend(process)
            process.send(signal.SIGCONT)
            return
        if number == signal.SIGSTOP and not self._lent:
            return  # somebody else's doing, and theirs to continue
        process.stop_signal = number
        self.take_back()
        mirrored = signal.SIGTSTP if number == signal.SIGSTOP else number
        with self._pausing():
            blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, [mirrored])
            os.kill(0, mirrored)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Where no shell could continue us (an orphaned process group) the kernel does not stop us.
        if signal.SIGCONT not in signal.sigpending() and self._in_front() == os.getpgrp():
            self.resume(process)

    def resume(self, process: Process) -> None:
        """Continue a process, with the terminal if that is ours again."""
        if process.stop_signal and self._wanted and self._in_front() == os.getpgrp():
            self._lend(process)
        process.stop_signal = 0
        process.send(signal.SIGCONT)

    def _lend(self, process: Process) -> None:
        self._wanted = self._lent = True
        self._put_in_front(process.pid)

    def _in_front(self) -> int:
        try:
            return os.tcgetpgrp(self._descriptor)
        except OSError:
            return -1

    def _put_in_front(self, group: int) -> None:
        with contextlib.suppress(OSError):  # it hung up, or the group is gone
            os.tcsetpgrp(self._descriptor, group)
