"""What stopping a tree promises: after it nothing runs, and nobody notices afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.worker.conftest import alive, python, until

from packhorse.worker import tree
from packhorse.worker.tree import Tree


class Grown:
    """A process and what it starts, which is stopped and continued from outside of it."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command[2:]] if command[0] == "--" else command, stdout=subprocess.PIPE
        )
        apart = tree.processes().keys() - {self.process.pid}
        mine = [pid for pid in apart if tree.processes().get(pid, (0,))[0] == os.getpid()]
        self.tree = Tree(os.getpid(), lambda: mine)

    def line(self) -> str:
        """The next line it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def states(self) -> set[str]:
        """The states of all threads."""
        found = set()
        for pid in self.tree.members():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                for thread in os.listdir(f"/proc/{pid}/task"):
                    stat = Path(f"/proc/{pid}/task/{thread}/stat").read_text()
                    found.add(stat.rpartition(")")[2].split()[0])
        return found


@pytest.fixture
def grown() -> Iterator[list[Grown]]:
    """Trees that are cut down at the end."""
    all_of_them: list[Grown] = []
    yield all_of_them
    for each in all_of_them:
        each.tree.kill()
        each.process.wait()
        if each.process.stdout is not None:
            each.process.stdout.close()


MANY = """
import threading
for n in range(5): threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
children = [subprocess.Popen(["sleep", "1000"]) for n in range(40)]
say("up")
while True: subprocess.run(["true"])
"""


def test_all_threads_of_all_processes_are_stopped_and_continued(grown: list[Grown]) -> None:
    each = Grown(*python(MANY))
    grown.append(each)
    assert each.line() == "up"
    for _ in range(20):
        assert each.tree.stop()
        assert each.states() <= {"T", "Z", "D"}  # a vfork's parent waits in D for its child
        before = each.tree.members()
        assert each.tree.stopped_here(each.process.pid)
        assert each.tree.members() == before
        each.tree.resume()
        assert not each.tree.stopped
    until(lambda: "T" not in each.states())


def test_processes_that_fork_all_the_time_are_stopped(grown: list[Grown]) -> None:
    program = """
say("up")
os.fork()
import threading
def spawn():
    while True: subprocess.run(["sh", "-c", "true & true; wait"])  # no orphans: here nobody may be there to reap them
for n in range(3): threading.Thread(target=spawn).start()
"""
    each = Grown(*python(program))
    grown.append(each)
    each.line()
    for _ in range(3):
        assert each.tree.stop()
        members = each.tree.members()
        assert each.states() <= {"T", "Z", "D"}
        assert each.tree.members() == members
        each.tree.resume()


def test_a_parent_does_not_see_its_children_stop(grown: list[Grown]) -> None:
    program = """
children = [subprocess.Popen(["sleep", "1000"]) for n in range(20)]
say("up")
pid, status = os.waitpid(-1, os.WUNTRACED)
say(os.WIFSTOPPED(status))
"""
    each = Grown(*python(program))
    grown.append(each)
    each.line()
    for _ in range(30):
        assert each.tree.stop()
        each.tree.resume()
    os.kill(each.tree.members()[-1], signal.SIGKILL)
    assert each.line() == "False"


def test_who_is_continued_by_somebody_else_is_stopped_again(grown: list[Grown]) -> None:
    each = Grown("sleep", "1000")
    grown.append(each)
    assert each.tree.stop()
    each.process.send_signal(signal.SIGCONT)
    assert each.tree.stop()
    assert each.states() == {"T"}
    each.tree.resume()
    until(lambda: each.states() == {"S"})


def test_where_not_all_stop_in_the_time_there_is_all_run_on(grown: list[Grown]) -> None:
    each = Grown("sleep", "1000")
    grown.append(each)
    assert not each.tree.stop(0)
    assert not each.tree.stopped
    until(lambda: each.states() == {"S"})


def test_who_was_stopped_before_stays_so(grown: list[Grown]) -> None:
    each = Grown("sleep", "1000")
    grown.append(each)
    each.process.send_signal(signal.SIGSTOP)
    until(lambda: each.states() == {"T"})
    assert each.tree.stop()
    assert not each.tree.stopped_here(each.process.pid)
    each.tree.resume()
    assert each.states() == {"T"}


def test_all_are_killed_also_who_is_stopped_or_has_a_session_of_its_own(grown: list[Grown]) -> None:
    program = """
children = [subprocess.Popen(["sleep", "1000"], start_new_session=True) for n in range(3)]
say(*(child.pid for child in children))
time.sleep(1000)
"""
    each = Grown(*python(program))
    grown.append(each)
    pids = [*map(int, each.line().split()), each.process.pid]
    assert each.tree.stop()
    assert each.tree.kill()
    assert not any(map(alive, pids))
