from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.worker.conftest import alive, until

from packhorse.install import process


def _run(script: str, *, timeout: float | None = None, **environ: str) -> tuple[process.Ended, list[str]]:
    lines: list[str] = []
    ended = process.run(
        ["sh", "-c", script],
        environ={**os.environ, **environ},
        directory=Path("/"),
        on_line=lines.append,
        timeout=timeout,
    )
    return ended, lines


def test_output_and_errors_arrive_as_lines() -> None:
    assert _run("echo one; echo two >&2; printf three") == ((0, False), ["one", "two", "three"])


def test_the_exit_code_and_the_signal_are_told() -> None:
    assert _run("exit 7")[0].code == 7
    assert _run("kill -SEGV $$")[0].code == -signal.SIGSEGV
    assert process.signal_name(signal.SIGSEGV) == "killed by SIGSEGV"


def test_a_child_left_behind_is_neither_waited_for_nor_leftalive() -> None:
    started = time.monotonic()

    ended, lines = _run("sleep 300 & echo $!")

    assert ended.code == 0
    assert time.monotonic() - started < 20
    until(lambda: not alive(int(lines[0])))


def test_a_command_that_takes_too_long_is_killed_with_its_children() -> None:
    ended, lines = _run("sleep 300 & echo $!; sleep 300", timeout=0.3)

    assert ended.timed_out
    until(lambda: not alive(int(lines[0])))


def test_an_exception_ends_the_command_and_its_children() -> None:
    children = []

    def interrupt(line: str) -> None:
        children.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        process.run(
            ["sh", "-c", "sleep 300 & echo $!; sleep 300"],
            environ=os.environ,
            directory=Path("/"),
            on_line=interrupt,
        )

    until(lambda: not alive(children[0]))


def test_when_packhorse_is_killed_the_command_and_its_children_end() -> None:
    script = (
        "import os, sys; from pathlib import Path; from packhorse.install import process\n"
        "process.run(['sh', '-c', 'sleep 300 & echo $! $$; sleep 300'], environ=os.environ, directory=Path('/'),"
        " on_line=lambda line: print(line, flush=True))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as packhorse:
        assert packhorse.stdout is not None
        pids = [int(word) for word in packhorse.stdout.readline().split()]
        assert all(map(alive, pids))
        packhorse.kill()

    until(lambda: not any(map(alive, pids)))


def test_the_command_has_no_input_and_no_terminal() -> None:
    assert _run("cat; tty || true; (: </dev/tty) 2>/dev/null || echo none")[1][-1] == "none"
