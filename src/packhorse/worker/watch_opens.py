"""Which files are opened, but for small ones, in which order and when: a write lease on each tells, without privileges.

Promises that whoever opens a file goes on within some milliseconds, and at once where the watching process dies. By
whom a file is opened is not known.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable

from packhorse.snapshot.frames import MEDIUM_FILE
from packhorse.snapshot.order import Opened
from packhorse.snapshot.scan import Found
from packhorse.worker import write_leases

_SPARE = 64
"""Descriptors left to others of this process."""


class OpenWatch:
    """Watches files from its creation to `end`; every time is in seconds after `begin`.

    The signals of leases are blocked in the calling thread, and from then on in those that it starts: a thread that
    does not block them would end the process. So it is created before other threads are.
    """

    def __init__(self, base: bytes, files: Iterable[Found]) -> None:
        """Watch those of `files` below `base` that are not small; of hard-linked names the first stands for all.

        Raises the limit of open files of this process (RLIMIT_NOFILE) as far as it may; where that is not enough the
        largest are watched.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, write_leases.SIGNALS)
        watched: dict[tuple[int, int], Found] = {}
        for file in files:
            if file.kind == "file" and file.signature.size >= MEDIUM_FILE:
                watched.setdefault(file.signature.identity, file)
        self.opened: list[Opened] = []
        self.sizes = {file.path: file.signature.size for file in watched.values()}
        """Of all watched files, in bytes."""
        self._held: dict[int, bytes] = {}
        self._ended = False
        self._started = time.monotonic()
        most = write_leases.most_open_files() - len(os.listdir("/proc/self/fd")) - _SPARE
        for file in sorted(watched.values(), key=lambda file: -file.signature.size)[: max(most, 0)]:
            self._hold(os.path.join(base, file.path), file.path)
        self.skipped = len(watched) - len(self._held)
        """Files that are not watched: somebody has them open, they are somebody else's, or there are too many."""
        self._thread = threading.Thread(target=self._watch, name="opens", daemon=True)
        self._thread.start()

    def _hold(self, file: bytes, path: bytes) -> None:
        descriptor = -1
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            write_leases.take(descriptor, os.getpid(), write_leases.WANTED)
        except OSError:
            if descriptor >= 0:
                os.close(descriptor)
        else:
            self._held[descriptor] = path

    def begin(self) -> None:
        """Count the seconds from now on."""
        self._started = time.monotonic()

    def end(self) -> list[Opened]:
        """Let go of all files; returns those that were opened, in the order of the first time."""
        if not self._ended:
            self._ended = True
            signal.pthread_kill(self._thread.ident or 0, write_leases.WANTED)
            self._thread.join()
            self._let_go()
            for descriptor in self._held:
                os.close(descriptor)
            self._held.clear()
        return self.opened

    def _watch(self) -> None:
        while not self._ended:
            write_leases.wait()
            self._let_go()

    def _let_go(self) -> None:
        seconds = round(max(time.monotonic() - self._started, 0), 3)
        for descriptor, path in list(self._held.items()):
            if write_leases.wanted(descriptor):
                os.close(descriptor)  # the opener goes on
                del self._held[descriptor]
                self.opened.append(Opened(path, seconds))
