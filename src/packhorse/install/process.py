"""Runs one command to its end, with its output line by line, and leaves nothing of it behind.

Promises that the command and all its children in its process group are gone when the call returns or raises,
and soon after packhorse itself was killed, by kill -9 too. A process of packhorse's own, which cleans up itself, is
only asked to end: `ended`.
"""

from __future__ import annotations

import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import AnyStr, NamedTuple

_PATIENCE = 20.0
"""Seconds that a process has to end by itself when it is interrupted."""
_POLL = 0.2
_POLL_CLOSED = 0.005  # the output is closed: the end is near

# The pipe ends without a byte only when packhorse did not come to write one.
_GUARD = "import os, sys; os.read(0, 1) or os.killpg(int(sys.argv[1]), 9)"


class Ended(NamedTuple):
    """How a command ended: its exit code, -n when signal n killed it; whether it ran out of time."""

    code: int
    timed_out: bool = False


def run(
    command: Sequence[str],
    *,
    environ: Mapping[str, str],
    directory: Path,
    on_line: Callable[[str], None],
    holding: int | None = None,
    timeout: float | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run `command` in `directory` and call `on_line` with each line of its output and its errors.

    It has no terminal and no input. It inherits the descriptor `holding`. After `timeout` seconds it is killed, and
    soon after `stopping` says that nobody waits for it any more; both count as out of time.
    """
    process = subprocess.Popen(
        command,
        env=dict(environ),
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=() if holding is None else (holding,),
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            with _guarded(process.pid):
                timed_out = _read(process.pid, process.stdout.fileno(), on_line, timeout, stopping)
        finally:
            # Before the process is reaped: until then its number cannot mean another group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Ended(process.returncode, timed_out)


def _read(
    pid: int,
    descriptor: int,
    on_line: Callable[[str], None],
    timeout: float | None,
    stopping: Callable[[], bool],
) -> bool:
    """Hand on the output until the process ends; returns whether the time ran out before.

    What outlives the process may keep the pipe open: it is not waited for.
    """
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    rest, wait = b"", _POLL
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = _has_ended(pid)
            if selector.select(0 if ended else wait):
                chunk = os.read(descriptor, 1 << 16)
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    on_line(line.decode(errors="replace"))
                if not chunk:
                    selector.unregister(descriptor)
                    wait = _POLL_CLOSED
            elif ended:
                break
            if time.monotonic() > deadline or stopping():
                return True
    if rest:
        on_line(rest.decode(errors="replace"))
    return False


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, without reaping it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # who started packhorse ignores SIGCHLD: children vanish when they end
        return True


@contextlib.contextmanager
def _guarded(group: int) -> Iterator[None]:
    """Have the process group killed should packhorse die before the end of the block."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            guard.stdin.write(b"x")
            guard.stdin.flush()
        guard.stdin.close()
        guard.wait()


@contextlib.contextmanager
def ended(process: subprocess.Popen[AnyStr]) -> Iterator[subprocess.Popen[AnyStr]]:
    """The process, which has ended when the block is left: by itself, or interrupted where that is left by an exception."""
    with process.stdout or contextlib.nullcontext():
        try:
            yield process
            process.wait()
        except BaseException:
            process.terminate()
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def signal_name(number: int) -> str:
    """For messages: "killed by SIGSEGV"."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return f"killed by {name}" + (", often for want of memory" if number == signal.SIGKILL else "")
