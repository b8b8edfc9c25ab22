"""While a command runs the disk takes what was restored, and nobody waits for it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from tests.conftest import Packhorse
from tests.transfer.workers import another_boot
from tests.worker.conftest import Start, alive, python, until

from packhorse.snapshot.index import Index
from packhorse.snapshot.scan import signature_of

FLUSHED = ".packhorse/index.flushed"
DRIVER = """
import os, sys
from packhorse.cli import main
from packhorse.worker import run

class Invocation(run.Invocation):
    def own(self, name, *arguments):
        stuck = os.environ.get("STUCK")
        return [sys.executable, "-c", stuck] if stuck and name == "flush" else super().own(name, *arguments)

def soon(action):
    def called(call, **options):
        return action(Invocation(**{**vars(call), "flush_every": 0.1}), **options)
    return called

run.run, run.execute = soon(run.run), soon(run.execute)
main()
"""
"""packhorse, but it looks ten times a second for what is to be flushed, and flushes with a program of the test."""
STUCK = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(os.open(os.environ["PACKHORSE_ROOT"] + "/stuck", os.O_CREAT | os.O_WRONLY), b"%d" % os.getpid())
time.sleep(600)
"""
UNTIL = """
def until(name):
    while not os.path.exists(os.environ["PACKHORSE_ROOT"] + "/" + name): time.sleep(0.01)
"""


class Soon(Packhorse):
    """That packhorse."""

    @property
    def command(self) -> list[str]:
        """The words before the arguments."""
        return [sys.executable, "-c", DRIVER]


@pytest.fixture
def packhorse(packhorse: Packhorse, root_path: Path) -> Packhorse:
    """A worker that lost its root, which another one had saved."""
    (root_path / "models").mkdir(parents=True, mode=0o700)
    root_path.chmod(0o700)
    (root_path / "models/model").write_bytes(os.urandom(3_000_000))
    assert packhorse("push").returncode == 0
    root_path.rename(root_path.with_name("lost"))
    return Soon(packhorse.environ, packhorse.directory)


def _trusted(root: Path) -> bool:
    """Whether the model need not be read."""
    signature = signature_of((root / "models/model").stat())
    return Index(root / ".packhorse/index").digests(b"models/model", signature) is not None


def test_while_a_command_runs_what_was_restored_is_flushed(packhorse: Packhorse, root_path: Path) -> None:
    assert packhorse("run", *python(f"{UNTIL}until({FLUSHED!r})")).returncode == 0
    another_boot(root_path)
    assert _trusted(root_path)


def test_a_root_that_cannot_be_looked_at_ends_no_command(packhorse: Packhorse) -> None:
    program = """
private = os.environ["PACKHORSE_ROOT"] + "/.packhorse"
def looks():
    lines = open(f"/proc/{os.getppid()}/status").readlines()
    return int(next(line.split()[1] for line in lines if line.startswith("voluntary")))
os.rename(private, private + "-away")
open(private, "w").close()
before = looks()
while looks() < before + 20: time.sleep(0.01)
os.unlink(private)
os.rename(private + "-away", private)
sys.exit(3)
"""
    assert packhorse("run", *python(program)).returncode == 3


def test_what_was_pulled_is_flushed_while_a_command_is_executed(
    packhorse: Packhorse, root_path: Path
) -> None:
    assert packhorse("pull").returncode == 0
    assert packhorse("exec", *python(f"{UNTIL}until({FLUSHED!r})")).returncode == 0
    another_boot(root_path)
    assert _trusted(root_path)


def test_a_command_that_ends_before_is_not_waited_for(packhorse: Packhorse, root_path: Path) -> None:
    assert packhorse("run", "--", "true").returncode == 0
    another_boot(root_path)
    assert not _trusted(root_path)


@pytest.mark.parametrize("command", ["run", "exec"])
def test_the_end_does_not_wait_for_the_disk(
    start: Start, packhorse: Packhorse, root_path: Path, command: str
) -> None:
    assert packhorse("pull").returncode == 0
    started = start(command, *python("say('up'); signal.pause()"), env={"STUCK": STUCK})
    assert started.line() == "up"
    process = int(until(lambda: (root_path / "stuck").exists() and (root_path / "stuck").read_text()))
    assert alive(process)
    started.send(signal.SIGTERM)
    assert started.wait() == 128 + signal.SIGTERM, started.errors()
    until(lambda: not alive(process))
