"""What the restorers of the tests share: files that are held back, and how they are filled."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

import msgspec

from packhorse import atomic
from packhorse.worker import gate, write_leases
from packhorse.worker.link import Arrived, Child, Link, Start

SIZE = 1 << 20


class Restorer:
    """Holds files back and fills them with their own first letter, or with what is given."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--result")
        parser.add_argument("--link", type=int)
        parser.add_argument("--snapshot", default="")
        parser.add_argument("--profile", nargs=2)
        self.options = parser.parse_args()
        self.link = Link.inherited(self.options.link)
        self.files: dict[str, tuple[int, int]] = {}
        signal.pthread_sigmask(signal.SIG_BLOCK, [write_leases.WANTED])

    def hold(self, *names: str, size: int = SIZE, mode: int = 0o644) -> None:
        """Make placeholders and hand them over."""
        handed = []
        for name in names:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            os.ftruncate(descriptor, size)
            write_leases.take(descriptor, os.getpid(), write_leases.WANTED)
            self.files[name] = len(self.files), descriptor
            handed.append((self.files[name][0], descriptor, bool(mode & 0o111)))
        self.link.hold(handed)

    def start(self) -> None:
        """Let the child start, and wait until it has."""
        self.record("started")
        self.link.send(Start())
        message = self.link.receive()
        assert message is not None
        assert isinstance(message[0], Child)
        self.child = message[0].pid

    def record(self, action: str) -> None:
        """Write the result."""
        atomic.write_file(Path(self.options.result), msgspec.json.encode({"action": action}))

    def wanted(self, name: str, times: int = 1) -> None:
        """Wait until a file is asked for; with `times`, which count for the only file, so often (once a renewal)."""
        if times > 1:
            for _ in range(times):
                signal.sigwait([write_leases.WANTED])
        while not write_leases.wanted(self.files[name][1]):
            signal.sigwait([write_leases.WANTED])

    def fill(self, *names: str, content: bytes = b"") -> None:
        """Fill files and let go of them."""
        for name in names:
            number, descriptor = self.files[name]
            os.pwrite(descriptor, content or os.path.basename(name)[:1].encode() * SIZE, 0)
            os.close(descriptor)
            self.arrived(number)

    def arrived(self, number: int) -> None:
        """Tell that a file is there."""
        self.link.send(Arrived((number,)))

    def end_with_supervisor(self) -> None:
        """Wait for the end of the link, end the orphans, then let go."""
        assert self.link.receive() is None
        gate.end_orphans(self.child, lambda text: os.write(2, f"{text}\n".encode()) and None)
        os.write(2, b"orphans ended\n")


def forever() -> None:
    """Do nothing."""
    while True:
        time.sleep(1000)
