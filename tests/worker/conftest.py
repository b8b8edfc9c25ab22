"""What the tests of the worker share: real supervisors, started in the background and watched."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import Packhorse

PATIENCE = 20.0
"""Seconds in which anything that is awaited has to happen."""


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for a condition to hold, and return its value."""
    end = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def pending(pid: int, number: int) -> bool:
    """Whether a signal that was sent to a process has not been taken yet."""
    waiting = Path(f"/proc/{pid}/status").read_text().partition("ShdPnd:")[2].split()[0]
    return bool(int(waiting, 16) >> (number - 1) & 1)


class Started:
    """A supervisor in the background; its child speaks in lines on stdout."""

    def __init__(self, argv: list[str], environ: Mapping[str, str], directory: Path) -> None:
        self.stderr = directory / f"stderr-{time.monotonic_ns()}"
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                argv,
                env=dict(environ),
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
        self._received = b""

    @property
    def pid(self) -> int:
        """The process id of the supervisor."""
        return self.process.pid

    def line(self) -> str:
        """The next line that the child prints."""
        assert self.process.stdout is not None
        while b"\n" not in self._received:
            ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
            assert ready, f"waited in vain for a line: {self.errors()}"
            more = os.read(self.process.stdout.fileno(), 4096)
            assert more, f"stdout ended: {self.errors()}"
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    def send(self, number: int) -> None:
        """Send the supervisor a signal."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code of the supervisor."""
        return self.process.wait(timeout=PATIENCE)

    def errors(self) -> str:
        """What it wrote to stderr so far."""
        return self.stderr.read_text(errors="backslashreplace")


Start = Callable[..., Started]


@pytest.fixture
def environ(environ: dict[str, str], root_path: Path) -> dict[str, str]:
    """One root for all commands of a test, and nothing to save unless the test says so."""
    return {**environ, "PACKHORSE_ROOT": str(root_path), "PACKHORSE_RUN_BACKUP": "[]"}


@pytest.fixture
def start(packhorse: Packhorse) -> Iterator[Start]:
    """Starts `packhorse ARGUMENTS`, with `env` on top of the environment; `before` is put in front of it."""
    started: list[Started] = []

    def start(
        *arguments: str | Path, env: Mapping[str, str] | None = None, before: tuple[str, ...] = ()
    ) -> Started:
        argv = [*before, *packhorse.command, *map(str, arguments)]
        started.append(Started(argv, {**packhorse.environ, **(env or {})}, packhorse.directory))
        return started[-1]

    yield start
    for each in started:
        each.process.send_signal(signal.SIGTERM)  # a supervisor that is killed leaves its child alone
        with contextlib.suppress(subprocess.TimeoutExpired):
            each.process.wait(timeout=PATIENCE)
        each.process.kill()
        each.process.wait()
        if each.process.stdout is not None:
            each.process.stdout.close()


def python(program: str) -> tuple[str, ...]:
    """The command of a child that runs a program.

    In it `say` prints a line at once, and `taking(...)` holds signals back for `take`, so that none comes between
    a look and a wait, where a Python handler would not see it.
    """
    return ("--", sys.executable, "-c", _PREAMBLE + program)


_PREAMBLE = r"""
import os, signal, subprocess, sys, time
def say(*words): os.write(1, (" ".join(map(str, words)) + "\n").encode())
def taking(*numbers): signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
def take(*numbers): return signal.Signals(signal.sigwait(numbers)).name
"""


PATIENT = (
    sys.executable,
    "-c",
    "import sys; from packhorse.worker import supervise; supervise.LEFTOVER_PATIENCE = 1000.0; "
    "del sys.argv[1:4]; from packhorse.cli import main; main()",
)
"""What is put in front of a supervisor for which what a command leaves behind has all the time to end by itself."""


def status(file: Path) -> dict[str, Any]:
    """The status file; {} while there is none."""
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    return facts


def ephemeral(root: Path) -> list[str]:
    """What lies in the ephemeral directories."""
    return [name for directory in ("tmp", "build") for name in os.listdir(root / directory)]


@contextlib.contextmanager
def held_back(file: Path) -> Iterator[None]:
    """Whoever opens `file` waits: a write lease is on it (fcntl(2), F_SETLEASE)."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    descriptor = os.open(file, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    try:
        yield
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)
