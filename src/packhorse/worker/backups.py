"""The processes that save what changed: now and then while the command runs, and once after it.

Promises that at most one runs at a time, that none goes beyond `grace`, and that what is not saved is told. What such
a process does stands in `backup`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from packhorse import redirect
from packhorse.errors import CannotStartError
from packhorse.session import Session
from packhorse.worker.status import Status, read_facts
from packhorse.worker.supervise import Process

if TYPE_CHECKING:
    from packhorse.worker.gate import Gate
    from packhorse.worker.run import Invocation

_MARGIN = 0.5
"""Seconds between the deadline a backup is told and the time at which it is killed."""
_CLEANING = 0.2
"""Seconds of `grace` kept for the cleaning after the backup."""
_IMPATIENCE = 0.5
"""Seconds from SIGTERM to SIGKILL for a backup that is to end at once."""


class Backups:
    """Those of one run."""

    def __init__(self, call: Invocation, opened: Session, status: Status) -> None:
        self._call = call
        self._result = opened.build / "backup.json"
        self._status = status
        self._running: Process | None = None
        self._finishing = False
        self._hurried = False
        self._given_up = False
        self._gate: Gate | None = None
        self._begun = False

    def begin(self, gate: Gate | None) -> None:
        """Start one every `backup_every` seconds from now on, but for the time of a restore. To be called for each start of
        the command."""
        self._gate = gate
        every = self._call.config.run.backup_every
        if self._call.config.run.backup and every and not self._begun:
            self._begun = True
            self._call.supervisor.every(every, self._start_periodic)

    def finish(self) -> None:
        """Save what is left to save: within `grace` after a SIGTERM, else as long as it takes.

        A SIGTERM that arrives meanwhile has a backup without a deadline begin again with one, so that what is
        stored by then gets into the tag. Any further signal ends it at once.
        """
        if not self._call.config.run.backup or (self._running is None and self._nothing_to_save()):
            return
        self._status.enter("backing-up")
        self._finishing = True
        if self._running is not None and self._call.supervisor.grace_ends is not None:
            self._end_soon(self._running)
            self._hurried = True
        self._wait()
        while not self._given_up:
            ends = self._call.supervisor.grace_ends
            self._start_final(ends)
            self._wait()
            if ends is not None or self._call.supervisor.grace_ends is None:
                return

    def _nothing_to_save(self) -> bool:
        """Whether it is certain without a process of its own: a backup only ever adds, and there is nothing."""
        root = self._call.root
        try:
            return not any(os.listdir(root.path / name) for name in self._call.config.run.backup)
        except OSError:
            return False

    def _start_periodic(self) -> None:
        restoring = self._gate is not None and self._gate.restoring
        runs = self._status.facts["phase"] == "running" and not self._call.supervisor.stopping
        if self._running is None and runs and not restoring:
            self._start()

    def _start_final(self, ends: float | None) -> None:
        if ends is None:
            self._start()
        elif (left := ends - _CLEANING - _MARGIN - time.monotonic()) > 0:
            self._start("--deadline", f"{left:.2f}")
        else:
            self._record("There was no time left for a backup.")

    def _start(self, *arguments: str) -> None:
        argv = self._call.own("backup", "--result", str(self._result), *arguments)
        environ = redirect.own(self._call.environ)
        try:
            self._running = self._call.supervisor.start(argv, environ, own=True, on_end=self._ended)
        except CannotStartError as error:
            self._record(str(error))

    def _wait(self) -> None:
        if (process := self._running) is None:
            return
        supervisor = self._call.supervisor

        def on_signal(number: int) -> None:
            if number not in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                return
            self._hurried = number == signal.SIGTERM and not limited
            self._given_up = not self._hurried
            self._end_soon(process)

        limited = (ends := self._call.supervisor.grace_ends) is not None
        if ends is not None:
            supervisor.at(ends - _CLEANING, lambda: process.send(signal.SIGKILL))
        supervisor.wait(process, on_signal)
        self._hurried = False
        supervisor.end_leftovers(process, orphans=False)

    def _end_soon(self, process: Process) -> None:
        process.send(signal.SIGTERM)
        self._call.supervisor.at(time.monotonic() + _IMPATIENCE, lambda: process.send(signal.SIGKILL))

    def _ended(self, code: int) -> None:
        self._running = None
        if not code:
            self._record("")
        elif self._hurried or (self._call.supervisor.stopping and not self._finishing):
            pass  # ended by us, and another follows
        elif self._given_up:
            self._record("The backup was ended by a signal.")
        else:
            self._record(f"The backup ended with exit code {code}.")

    def _record(self, error: str) -> None:
        facts = read_facts(self._result) or {}
        if error:
            facts["error"] = error
            self._call.speech.warn(f"not everything is saved: {error}")
        self._status.facts["backup"] = facts
        with contextlib.suppress(OSError):
            self._status.write()
