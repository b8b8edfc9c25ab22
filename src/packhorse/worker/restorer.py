"""The gate from the restorer's side: write leases on files that are there but for their bytes.

Promises that a file is let go of only when it is whole, that a file which somebody waits for is asked for next, and that
the command ends before anything is let go of when the supervisor is gone.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packhorse.errors import EXIT_SUPERVISOR
from packhorse.root import PERSISTENT
from packhorse.snapshot.frames import MEDIUM_FILE
from packhorse.snapshot.scan import readable
from packhorse.transfer.line import Wanted
from packhorse.transfer.opening import Held
from packhorse.worker import gate, tree, write_leases
from packhorse.worker.link import Arrived, Child, Link, Start

_DIRECTORIES = [os.fsencode(name) for name in PERSISTENT]
_RESERVE = 256
"""Descriptors that are left for everything else."""


@dataclass
class _Lease:
    number: int
    held: Held
    told: bool = False
    """Whether the supervisor has a copy."""
    asked: bool = False
    """Whether somebody waited for it."""


class Restorer:
    """The files that this process holds back, and its link to the supervisor.

    Make it before anything starts a thread: the signal that tells of openers must be blocked in all of them.
    """

    def __init__(self, link: Link, warn: Callable[[str], None], patient: str = "") -> None:
        """`patient` is that of `Wanted`."""
        signal.pthread_sigmask(signal.SIG_BLOCK, write_leases.SIGNALS)
        self.wanted = Wanted(patient)
        self.opened: list[tuple[bytes, float]] = []
        """The files that somebody waited for, and how many seconds after the start."""
        self._there: dict[bytes, float] = {}
        """The files that nobody waited for, and how many seconds after the start they had arrived."""
        self._link, self._warn = link, warn
        self._leases: dict[bytes, _Lease] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._started = 0.0
        self._child = 0
        self._done = False
        threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    @property
    def most(self) -> int:
        """How many files can be held back at a time: as many as may be open here and in the supervisor."""
        return max(write_leases.most_open_files() - _RESERVE, 0)

    def hold(self, files: Sequence[Held]) -> set[bytes]:
        """Hold these back from now on. Returns the paths of those that cannot be, and warns of them."""
        refused: dict[bytes, OSError] = {}
        for held in files:
            try:
                write_leases.take(held.descriptor, os.getpid(), write_leases.WANTED)
            except OSError as error:
                refused[held.path] = error
            else:
                self._leases[held.path] = _Lease(next(self._numbers), held)
        if refused:
            path, first = next(iter(refused.items()))
            others = f" and {len(refused) - 1} other files" if len(refused) > 1 else ""
            why = "somebody has it open" if first.errno == errno.EAGAIN else first.strerror
            self._warn(
                f"{readable(path)}{others} cannot be held back until it is there ({why}), so the command starts later"
            )
        return set(refused)

    def start(self) -> None:
        """Let the command start; from now on openers are heard."""
        with self._lock:
            self._started = time.monotonic()
            for lease in self._leases.values():
                lease.told = True
            held = [
                (lease.number, lease.held.descriptor, lease.held.program) for lease in self._leases.values()
            ]
            self._link.hold(held)
            self._link.send(Start())
        threading.Thread(target=self._hear, name="openers", daemon=True).start()

    def arrived(self, path: bytes, descriptor: int) -> None:
        """Let go of a file, and close its descriptor."""
        with self._lock:
            lease = self._leases.pop(path)
            os.close(descriptor)
            if not lease.asked:
                self._there[path] = time.monotonic() - self._started if lease.told else 0.0
            if lease.told:
                with contextlib.suppress(OSError):  # the listener sees the end of the link
                    self._link.send(Arrived((lease.number,)))

    def used(self, root: Path, known: Collection[bytes]) -> list[tuple[bytes, float]]:
        """What the command needed so far, in order, with seconds after the start.

        That is what somebody waited for, and what is mapped now although it came before anybody asked: by the time of its
        arrival, or last where it was there at the start. The latter two without those that are `known`.
        """
        now = time.monotonic() - self._started
        waited = {path for path, _ in self.opened}
        base = os.path.realpath(os.fsencode(root)) + b"/"  # as the kernel names what is mapped
        found = [
            (path, self._there.get(path, now))
            for path in self._mapped(base)
            if path not in known and path not in waited
        ]
        return sorted([*self.opened, *found], key=lambda each: each[1])

    def _mapped(self, prefix: bytes) -> Iterable[bytes]:
        """The files below `prefix` that the command has mapped, as a rule in the order in which it did: the kernel
        begins with the highest addresses."""
        found: dict[bytes, None] = {}
        command = [self._child] if self._child else []
        for pid in (*command, *tree.descendants(tree.processes(), command)):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:
                names = [line.split(None, 5)[-1].rstrip(b"\n") for line in maps]
                found.update(dict.fromkeys(reversed(names)))
        for name in found:
            path = name.removeprefix(prefix)
            with contextlib.suppress(OSError):
                if (
                    path != name
                    and path.split(b"/")[0] in _DIRECTORIES
                    and os.stat(name).st_size >= MEDIUM_FILE
                ):
                    yield path

    def finish(self) -> None:
        """Everything is there: the end of the link means nothing any more."""
        self._done = True

    def _hear(self) -> None:
        while True:
            write_leases.wait()
            with self._lock:
                new = [
                    lease
                    for lease in self._leases.values()
                    if not lease.asked and write_leases.wanted(lease.held.descriptor)
                ]
            for lease in new:
                lease.asked = True
                self.opened.append((lease.held.path, time.monotonic() - self._started))
                lease.held.want()

    def _listen(self) -> None:
        try:
            while (received := self._link.receive()) is not None:
                if isinstance(received[0], Child):
                    self._child = received[0].pid
        except OSError:
            pass
        if not self._done:
            gate.end_orphans(self._child, self._warn)
            os._exit(EXIT_SUPERVISOR)
