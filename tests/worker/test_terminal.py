"""What `run` and `exec` promise on a terminal: the child has it as if packhorse were not there."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.worker.conftest import PATIENCE, alive, held_back, status, until

from packhorse.root import Root


class Console:
    """A pseudo-terminal, and a process that leads a session on it."""

    def __init__(self, argv: list[str], environ: dict[str, str], directory: str) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(directory)
                os.execvpe(argv[0], argv, environ)
            finally:
                os._exit(127)
        self.shown = ""

    def type(self, text: str) -> None:
        """Type, as a person does: `\\x03` is Ctrl-C, `\\x1a` Ctrl-Z, `\\x04` Ctrl-D."""
        os.write(self._master, text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Read on until the pattern appears, and forget what is before its end."""
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.shown)):
            ready, _, _ = select.select([self._master], [], [], max(end - time.monotonic(), 0))
            assert ready, f"waited in vain for {pattern!r}, saw {self.shown!r}"
            try:
                more = os.read(self._master, 4096)
            except OSError:
                more = b""
            assert more, f"the terminal closed before {pattern!r}, saw {self.shown!r}"
            self.shown += more.decode(errors="replace")
        self.shown = self.shown[found.end() :]
        return found

    def exit_code(self) -> int:
        """The exit code of the session's leader."""
        status = until(lambda: os.waitpid(self.pid, os.WNOHANG)[1:] if not alive(self.pid) else None)[0]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        """End the leader if it still lives."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._master)


Open = Callable[..., Console]
BASH = ("bash", "--norc", "--noprofile", "-i")


@pytest.fixture
def open_console(packhorse: Packhorse) -> Iterator[Open]:
    """Opens a console that runs the given words; `packhorse` among them stands for the whole command."""
    opened: list[Console] = []

    def open_console(*words: str) -> Console:
        first, *rest = words
        argv = [*packhorse.command, *rest] if first == "packhorse" else list(words)
        environ = {**packhorse.environ, "PS1": "$ ", "TERM": "dumb", "PH": " ".join(packhorse.command)}
        opened.append(Console(argv, environ, str(packhorse.directory)))
        return opened[-1]

    yield open_console
    for each in opened:
        each.close()


@pytest.mark.parametrize("command", ["run", "exec"])
def test_a_shell_has_the_terminal(open_console: Open, command: str) -> None:
    """Its own jobs are interrupted and stopped, not the shell; its exit code comes back."""
    console = open_console("packhorse", command, "-q", "--", *BASH)
    console.type("echo first-$((40 + 2)); tty -s && echo tty\n")
    console.expect("first-42\r\ntty")
    console.type("sleep 1000; echo slept-$?\n")
    console.expect("slept-")  # the echo of what was typed
    _when_in_front(console, "sleep")
    console.type("\x03")
    console.type("echo alive-$?\n")
    console.expect("alive-130")
    console.type("sleep 1000\n")
    _when_in_front(console, "sleep")
    console.type("\x1a")
    console.expect("Stopped")
    console.type("fg\n")
    _when_in_front(console, "sleep")
    console.type("\x03")
    console.type("exit 5\n")
    assert console.exit_code() == 5


def _when_in_front(console: Console, name: str) -> int:
    """Wait until a program is the terminal's foreground job; its process id."""

    def front() -> int:
        try:
            group = os.tcgetpgrp(console._master)
            with open(f"/proc/{group}/comm", encoding="utf-8") as file:
                return group if file.read().strip() == name else 0
        except OSError:
            return 0

    return int(until(front, f"{name} in front"))


def test_a_plain_child_is_stopped_and_continued_as_the_shells_own_job(open_console: Open) -> None:
    console = open_console(*BASH)
    console.type("$PH exec -q -- cat\n")
    _when_in_front(console, "cat")
    console.type("before\n")
    console.expect("before\r\nbefore")
    console.type("\x1a")
    console.expect("Stopped")
    console.type("echo shell-$((1 + 1))\n")
    console.expect("shell-2")
    console.type("fg\n")
    _when_in_front(console, "cat")
    console.type("after\n")
    console.expect("after\r\nafter")
    console.type("\x04")
    console.type("echo code-$?\n")
    console.expect("code-0")


def test_a_job_continued_in_the_background_asks_for_the_terminal_when_it_reads(open_console: Open) -> None:
    console = open_console(*BASH)
    console.type("$PH exec -q -- cat\n")
    _when_in_front(console, "cat")
    console.type("\x1a")
    console.expect("Stopped")
    console.type("bg; wait %1; echo waited\n")
    console.expect("Stopped")
    console.type("fg\n")
    _when_in_front(console, "cat")
    console.type("hello\n\x04")
    console.expect("hello\r\nhello")


def test_ctrl_c_ends_a_plain_child_and_the_shell_goes_on(open_console: Open) -> None:
    console = open_console(*BASH)
    console.type("$PH exec -q -- sleep 1000\n")
    _when_in_front(console, "sleep")
    console.type("\x03")
    console.type("read -r -p ask: word; echo got-$word\n")  # the terminal is the shell's again
    console.expect("ask:")
    console.type("answer\n")
    console.expect("got-answer")


def test_ctrl_z_does_nothing_where_no_shell_could_continue_the_child(open_console: Open) -> None:
    console = open_console("packhorse", "run", "-q", "--", "cat")
    _when_in_front(console, "cat")
    console.type("\x1a")
    console.expect(r"\^Z")
    console.type("still\n")
    console.expect("still\r\nstill")
    console.type("\x04")
    assert console.exit_code() == 0


def test_a_program_at_the_other_end_of_a_pipe_keeps_the_terminal(open_console: Open) -> None:
    """As with `packhorse exec -- CMD | less`, which reads its keys from the terminal."""
    console = open_console(*BASH)
    program = "sh -c 'echo line; exec sleep 1000'"
    console.type(
        f"$PH exec -q -- {program} | {{ read -r a; echo $a-$a; read -r b < /dev/tty; echo got-$b; }}\n"
    )
    console.expect("line-line")
    console.type("key\n")
    console.expect("got-key")
    console.type("\x03")
    console.type("echo alive-$((1 + 1))\n")
    console.expect("alive-2")


def test_a_child_in_a_pipe_that_reads_the_terminal_gets_it(open_console: Open) -> None:
    console = open_console(*BASH)
    program = "print('got-' + open('/dev/tty').readline())"
    console.type(f'$PH exec -q -- {sys.executable} -c "{program}" | cat\n')
    console.expect("cat\r\n")
    _when_in_front(console, os.path.basename(sys.executable))
    console.type("answer\n")
    console.expect("got-answer")


@pytest.mark.parametrize("begin", ["complete", "early"])
def test_ctrl_z_stops_a_boot_and_fg_goes_on_with_it(
    open_console: Open, packhorse: Packhorse, root_path: Path, begin: str
) -> None:
    (Root.open(root_path).models / "weights").write_text("weights")
    assert packhorse("push").returncode == 0
    shutil.rmtree(root_path)
    root = Root.open(root_path)
    packhorse.environ["PACKHORSE_RUN_START"] = begin  # type: ignore[index]
    console = open_console(*BASH)
    with root.writing():  # the pull waits for us
        console.type("$PH run -- sh -c 'echo got-$(cat $PACKHORSE_ROOT/models/weights)'\n")
        console.expect("waiting for")
        supervisor = os.tcgetpgrp(console._master)
        [boot] = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
        console.type("\x1a")
        console.expect("Stopped")
        assert _state(boot) == "T"
        console.type("fg\n")
        until(lambda: _state(boot) != "T")
    console.expect("got-weights")
    console.type("echo code-$?\n")
    console.expect("code-0")


def _state(pid: str) -> str:
    """What a process does (proc_pid_stat(5)): T where it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_ctrl_c_during_the_final_backup_ends_it(
    open_console: Open, packhorse: Packhorse, root_path: Path
) -> None:
    model = Root.open(root_path).models / "model.bin"
    model.write_bytes(b"weights")
    packhorse.environ["PACKHORSE_RUN_BACKUP"] = "models"  # type: ignore[index]
    file = packhorse.directory / "status.json"
    with held_back(model):
        console = open_console(
            "packhorse", "run", "-q", "--status-file", str(file), "--", "sh", "-c", "exit 3"
        )
        until(lambda: status(file).get("phase") == "backing-up")
        console.type("\x03")
        assert console.exit_code() == 3
    assert "error" in status(file)["backup"]


def test_a_terminal_that_hangs_up_ends_the_child(open_console: Open) -> None:
    console = open_console("packhorse", "exec", "-q", "--", "sleep", "1000")
    child = _when_in_front(console, "sleep")
    os.close(console._master)
    console._master = os.open(os.devnull, os.O_RDONLY)
    assert console.exit_code() == 128 + signal.SIGHUP
    assert not alive(child)
