"""Pulls beside which a command could start, for the tests; as a program, one that is killed at a chosen moment.

    python -m tests.transfer.openings ROOT STORE MOMENT [GPUS]

MOMENT is one of "held", "published", "started", "arrived" and "late", or empty.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.transfer.workers import Worker

from packhorse.config import Storage
from packhorse.snapshot.order import ranks
from packhorse.transfer.line import Wanted
from packhorse.transfer.opening import Held, Opening, PullResult

PATIENCE = 20.0


class Holder:
    """A gate that holds nobody back, so that a test sees what is there meanwhile. `patient` is that of Wanted."""

    def __init__(self, patient: str = "", most: int = 1000) -> None:
        self.wanted = Wanted(patient)
        self.most = most
        self.refused: set[bytes] = set()
        """Files that cannot be held."""
        self.held: dict[bytes, Held] = {}
        self.order: list[bytes] = []
        """What has arrived."""
        self.on_arrival: Callable[[bytes], None] = lambda path: None
        self._news = threading.Condition()

    def hold(self, files: Sequence[Held]) -> set[bytes]:
        """Remember them, but for those that are to be refused."""
        self.held |= {each.path: each for each in files if each.path not in self.refused}
        return {each.path for each in files} & self.refused

    def arrived(self, path: bytes, descriptor: int) -> None:
        """Let go of a file."""
        os.close(descriptor)
        self.on_arrival(path)
        with self._news:
            self.order.append(path)
            self._news.notify_all()

    def want(self, *paths: bytes) -> None:
        """Somebody opens these files, and waits until they are there."""
        for path in paths:
            self.held[path].want()
        with self._news:
            assert self._news.wait_for(lambda: set(paths) <= set(self.order), PATIENCE)

    def release(self) -> None:
        """Let the others come as well."""
        self.wanted.patient = ""
        self.wanted.wake()


def opened(
    worker: Worker, holder: Holder | None, start: Callable[[], None] = lambda: None, **options: Any
) -> PullResult:
    """Pull as an early (with a holder) or ready worker does; `start` is called when the command may start."""

    def began(result: PullResult) -> None:
        start()

    return worker.pull(opening=Opening(began, ranks, holder), **options)


class _Watch:
    """Kills this process when what is cold begins to come."""

    def __init__(self) -> None:
        self.late = False

    def stage(self, name: str, total: int | None = None) -> None:
        self.late = name.startswith("restoring code")

    def advance(self, count: int) -> None:
        if self.late:
            _die()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(worker: Worker, moment: str, gpus: str = "") -> int:
    """Pull in a process that is killed at a moment; returns how it ended."""
    words = [str(worker.path), worker.storage.url, moment, gpus]
    done = subprocess.run(
        [sys.executable, "-m", "tests.transfer.openings", *words],
        cwd=Path(__file__).parents[2],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def _main(root: str, store: str, moment: str, gpus: str) -> None:
    worker = Worker(Path(root), Storage(url=store))
    assert worker.root
    holder = Holder("never")

    def start() -> None:
        if moment == "started":
            _die()
        if moment == "arrived":
            holder.on_arrival = lambda path: _die() if holder.order else None
        holder.release()

    if moment == "held":
        holder.hold = lambda files: _die()  # type: ignore[method-assign]
    options: dict[str, Any] = {"connections": 1, "threads": 1, "gpus": tuple(map(int, gpus.split()))}
    opened(worker, holder, start, progress=_Watch() if moment == "late" else None, **options)


if __name__ == "__main__":
    _main(*sys.argv[1:])
