"""`profile`: a command runs as `exec` runs it, while a process beside it records which files are opened.

Promises that the command's output and exit code are its own, and that it goes on whatever becomes of the recorder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from packhorse import profile_name, redirect
from packhorse.errors import EXIT_SUPERVISOR, CannotStartError, PackhorseError
from packhorse.session import Session
from packhorse.worker import run
from packhorse.worker.status import Status, read_facts
from packhorse.worker.supervise import Process

_PATIENCE = 60.0
"""Seconds that storing a profile may take when no SIGTERM limits it."""


class Recorded(msgspec.Struct):
    """What was recorded. Bytes are those of the files."""

    name: str
    tag: str
    files: int = 0
    """Files of 64 KiB and more that were opened."""
    bytes: int = 0
    large_files: int = 0
    """All of that size that the root has."""
    large_bytes: int = 0
    skipped: int = 0
    """Those that could not be watched."""
    error: str = ""
    """Why the profile is not stored."""


def profile(call: run.Invocation, *, name: str, seconds: float, status_file: Path | None) -> int:
    """Run the command, recording for at most `seconds` (0 for as long as it runs); returns its exit code.

    Raises PackhorseError before the command ran.
    """
    status = Status(status_file, call.speech.warn)
    del status.facts["boot"], status.facts["backup"]
    status.facts["profile"] = None
    status.enter("preparing")

    @contextlib.contextmanager
    def recorder(opened: Session) -> Iterator[Callable[[int], None]]:
        result = opened.build / "profile.json"
        process = _start(call, result, name or profile_name.name_of(call.command), seconds)

        def on_start(pid: int) -> None:
            status.facts["pid"] = pid
            status.enter("running")

        try:
            yield on_start
        except BaseException:
            process.send(signal.SIGKILL)  # nothing ran that would have a profile
            call.supervisor.wait(process, lambda number: None)
            raise
        status.enter("storing")
        status.facts["profile"] = _finish(call, process, result)

    code = EXIT_SUPERVISOR
    try:
        code = run.execute(call, recorder)
    except CannotStartError as error:
        code = error.exit_code
        raise
    finally:
        status.facts["exit_code"] = code
        status.enter("ended")
    return code


def _start(call: run.Invocation, result: Path, name: str, seconds: float) -> Process:
    """The recorder, once it watches. Raises PackhorseError where it cannot."""
    supervisor = call.supervisor
    watching, told = os.pipe()
    try:
        os.set_inheritable(told, True)
        argv = call.own(
            *("record", "--result", str(result), "--ready", str(told), "--name", name),
            *("--command", profile_name.shown(call.command), "--for", str(seconds)),
        )
        try:
            process = supervisor.start(argv, redirect.own(call.environ), own=True)
        except CannotStartError as error:
            raise PackhorseError(error.what, error.remedy) from error
        finally:
            os.close(told)
        try:
            with supervisor.interruptible():
                ready = os.read(watching, 1)
        except BaseException:
            process.send(signal.SIGKILL)
            supervisor.wait(process, lambda number: None)
            raise
    finally:
        os.close(watching)
    if not ready:
        code = supervisor.wait(process, lambda number: None)
        if code > 128:  # it could not say so itself
            from packhorse.install.process import signal_name

            raise PackhorseError(
                f"The process that records was {signal_name(code - 128)}, so the command was not started.",
                "Start again, with more memory if that was short.",
            )
        raise PackhorseError(
            "Nothing can be recorded, so the command was not started.", "See the message above."
        )
    return process


def _finish(call: run.Invocation, process: Process, result: Path) -> object:
    """Have the recorder store what it has; returns what it says of it, and why where it stored nothing."""
    supervisor = call.supervisor
    limited = supervisor.grace_ends is not None

    def kill() -> None:
        process.send(signal.SIGKILL)

    def on_signal(number: int) -> None:
        nonlocal limited
        if number == signal.SIGTERM and not limited and supervisor.grace_ends is not None:
            limited = True
            supervisor.at(supervisor.grace_ends, kill)
        elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            kill()

    supervisor.at(supervisor.grace_ends or time.monotonic() + _PATIENCE, kill)
    process.send(signal.SIGTERM)
    code = supervisor.wait(process, on_signal)
    facts = read_facts(result) or {}
    if code:
        facts.setdefault("error", "The recorder was ended before the profile was stored.")
    if facts.get("error"):
        call.speech.warn(f"there is no profile: {facts['error']}")
    return facts
