"""`run` and `exec`: a command in the environment of a root, restored before and saved after.

Promises that the ephemeral directories are emptied whatever happens, that after SIGTERM everything ends within
`grace`, and that the command's exit code wins. What restores and saves runs in processes of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from packhorse import redirect, session
from packhorse.config import Config
from packhorse.errors import EXIT_SUPERVISOR, CannotStartError, PackhorseError
from packhorse.root import Root
from packhorse.session import Session
from packhorse.worker import path_report
from packhorse.worker.backups import Backups
from packhorse.worker.flushing import Flushing
from packhorse.worker.status import Status, read_facts
from packhorse.worker.supervise import ENDING, Process, Stopped, Supervisor

if TYPE_CHECKING:
    from packhorse.install.interpreter import Interpreter
    from packhorse.worker.gate import Gate

OWN = "import sys; sys.path = [p for p in sys.path if p]; from packhorse.cli import main; main()"
"""Runs packhorse (`python -c`) without the working directory, where a file may be called like a module of ours."""


@dataclass(frozen=True)
class Speech:
    """How lines reach people: notes, and warnings, which come even where notes are not wanted."""

    note: Callable[[str], None]
    warn: Callable[[str], None]


@dataclass(frozen=True)
class Invocation:
    """What `run` and `exec` are called with. `flags` are those that packhorse's own processes get too."""

    config: Config
    root: Root
    command: Sequence[str]
    environ: Mapping[str, str]
    flags: Sequence[str]
    speech: Speech
    supervisor: Supervisor
    profile: str = ""
    """The name of the profile that an early start goes by; by default the command's own."""
    flush_every: float = 60.0
    """Seconds between two looks whether something is to be flushed."""

    def own(self, name: str, *arguments: str) -> list[str]:
        """The command line of a process of packhorse's own."""
        return [sys.executable, "-c", OWN, name, *arguments, *self.flags]


Beside: TypeAlias = Callable[[Session], contextlib.AbstractContextManager[Callable[[int], None]]]


def run(call: Invocation, *, snapshot: str = "", status_file: Path | None = None, look: float = 0.0) -> int:
    """Restore, run the command, save; returns the exit code. Raises PackhorseError before the command ran.

    `look` is that of Gate.
    """
    status = Status(status_file, call.speech.warn)
    status.enter("booting")
    code = EXIT_SUPERVISOR
    try:
        with _session(call) as opened:
            backups = Backups(call, opened, status)
            gate = _gate(call, opened, status, look)
            code = _boot_and_run(call, opened, snapshot, status, backups, gate)
            ended_here = gate is not None and (gate.ended_child or status.facts["pid"] is None)
            if gate is not None and gate.failure and ended_here and _may_install(call, snapshot):
                call.speech.warn("starting once more when all is restored, as run.on-restore-failure says")
                status.enter("booting")
                with call.supervisor.interruptible():
                    opened.empty()  # of what the command left that was ended
                code = _boot_and_run(call, opened, snapshot, status, backups, None)
            if status.facts["pid"] is not None:
                backups.finish()
    except Stopped as stopped:
        code = stopped.exit_code
    except CannotStartError as error:
        code = error.exit_code
        raise
    finally:
        status.facts["exit_code"] = code
        status.enter("ended")
    return code


def execute(call: Invocation, beside: Beside | None = None) -> int:
    """Run the command in the environment of the root as it is; returns the exit code. Raises PackhorseError.

    `beside` is entered just before the command starts, gives what is called with its process id, and is left when it
    has ended.
    """
    try:
        with _session(call) as opened, _packages(call) as packages:
            environ = _environment(call, opened)
            if beside is None:
                return _child(call, opened, packages, environ)
            with beside(opened) as on_start:
                return _child(call, opened, packages, environ, on_start)
    except Stopped as stopped:
        return stopped.exit_code


@contextlib.contextmanager
def _session(call: Invocation) -> Iterator[Session]:
    supervisor = call.supervisor
    with supervisor.interruptible():
        for path in session.clean(call.root):
            call.speech.warn(f"{path} is left over and cannot be removed")
        opened = Session(call.root)

    def heartbeat() -> None:
        with contextlib.suppress(OSError):
            opened.heartbeat()

    supervisor.every(session.SILENCE / 6, heartbeat)
    try:
        yield opened
    finally:
        # Whatever goes wrong here, the next start cleans, and the command's code wins.
        with contextlib.suppress(Stopped, OSError), supervisor.interruptible(supervisor.grace_ends):
            opened.close()


def _boot_and_run(
    call: Invocation, opened: Session, snapshot: str, status: Status, backups: Backups, gate: Gate | None
) -> int:
    """Boot, then run the command; with a gate the boot may go on meanwhile."""
    try:
        code = _boot(call, opened, snapshot, status, gate)
        if code:
            return code
        with _packages(call) as packages:
            return _run(call, opened, packages, status, backups, gate)
    finally:
        if gate is not None:
            gate.close()
            status.facts["restoring"] = False


def _gate(call: Invocation, opened: Session, status: Status, look: float) -> Gate | None:
    if call.config.run.start == "complete":
        return None
    if not call.supervisor.adopts:
        call.speech.warn(
            f'run.start = "{call.config.run.start}" cannot work here, so the command starts when all is there: the '
            "system does not hand over orphans (PR_SET_CHILD_SUBREAPER), so nobody could see to all of its processes"
        )
        return None
    from packhorse.worker.gate import Gate

    def on_complete() -> None:
        status.facts["boot"] = read_facts(_boot_result(opened)) or status.facts["boot"]
        status.facts["restoring"] = False
        with contextlib.suppress(OSError):
            status.write()

    return Gate(call.supervisor, call.speech.warn, on_complete=on_complete, look=look)


def _may_install(call: Invocation, snapshot: str) -> bool:
    config = call.config
    return (
        not snapshot
        and not call.supervisor.stopped_by
        and config.run.on_restore_failure == "install"
        and config.environment.configured
    )


def _boot_result(opened: Session) -> Path:
    return opened.build / "boot.json"


def _boot(call: Invocation, opened: Session, snapshot: str, status: Status, gate: Gate | None) -> int:
    """Make the root ready, or ready enough for the gate; returns 0 or the exit code to end with."""
    if not snapshot and _nothing_to_restore(call.config, call.root):
        if why := path_report.nothing(call.config, call.root):
            with call.supervisor.interruptible():  # stderr may be a pipe that nobody reads
                call.speech.note(why)
        return 0
    supervisor = call.supervisor

    def on_signal(process: Process, number: int) -> None:
        if number in ENDING:
            process.send(number)
            supervisor.at(
                time.monotonic() + call.config.run.stop_timeout, lambda: process.send(signal.SIGKILL)
            )
        elif number == signal.SIGTSTP:  # Ctrl-Z; this job stops with it
            process.send(number)

    result = _boot_result(opened)
    wanted = ["--snapshot", snapshot] if snapshot else []
    argv = call.own("boot", "--result", str(result), *wanted)
    environ = redirect.own(call.environ)
    try:
        if gate is None:
            code = supervisor.run_own(argv, environ, on_signal)
        else:
            from packhorse import profile_name

            profile = call.profile or profile_name.name_of(call.command)
            argv += ["--profile", profile, profile_name.shown(call.command)]
            restorer = gate.open(argv, environ)
            supervisor.wait_until(
                lambda: gate.started or gate.code is not None, lambda number: on_signal(restorer, number)
            )
            code = 1 if gate.failure else 0 if gate.started else gate.code or 0
            status.facts["restoring"] = gate.restoring
            if not gate.restoring:
                supervisor.end_leftovers(restorer, orphans=False)
    except CannotStartError as error:
        raise PackhorseError(error.what, error.remedy) from error  # it is not the command that cannot start
    status.facts["boot"] = read_facts(result) or status.facts["boot"]
    if supervisor.stopped_by:
        return 128 + supervisor.stopped_by
    if code > 128:  # it could not say so itself
        from packhorse.install.process import signal_name

        raise PackhorseError(
            f"The process that restores was {signal_name(code - 128)}.",
            "Start again to go on with it, with more memory if that was short.",
        )
    return EXIT_SUPERVISOR if code else 0


def _nothing_to_restore(config: Config, root: Root) -> bool:
    """Whether it is certain, from a look at the disk alone, that there is nothing to install or restore."""
    if config.environment.configured or config.run.on_missing == "fail" or root.state().state == "partial":
        return False
    directory = config.storage.directory
    if directory is None:
        return False
    try:
        os.stat(directory / "tags" / config.storage.tag)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass  # the boot says what is wrong with the store
    return False


@contextlib.contextmanager
def _packages(call: Invocation) -> Iterator[int]:
    """Have nobody exchange `packages/`, from before it is known that they can be used until the command has ended."""
    with call.supervisor.interruptible():
        descriptor = call.root.use_packages()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _run(
    call: Invocation, opened: Session, packages: int, status: Status, backups: Backups, gate: Gate | None
) -> int:
    environ = _environment(call, opened, partial=gate is not None and gate.started)
    if gate is not None and gate.restoring:
        environ |= gate.marked
    with call.supervisor.interruptible():  # stderr may be a pipe that nobody reads
        for line in path_report.lines(call.root, environ, call.config.run.app_path):
            call.speech.note(line)

    def on_start(pid: int) -> None:
        status.facts["pid"] = pid
        status.enter("running")
        if gate is not None:
            gate.child_started(pid)
        backups.begin(gate)

    if gate is not None and not gate.await_command(call.command[0], environ):
        return EXIT_SUPERVISOR
    code = _child(call, opened, packages, environ, on_start, gate)
    return EXIT_SUPERVISOR if gate is not None and gate.ended_child else code


def _environment(call: Invocation, opened: Session, *, partial: bool = False) -> dict[str, str]:
    """Of the child; `partial`: the rest of the root is on its way."""
    with call.supervisor.interruptible():
        python = _require_usable(call, partial=partial)
    changed = redirect.changes(
        call.root,
        call.environ,
        tmp=opened.tmp,
        build=opened.build,
        app_path=call.config.run.app_path,
        keep_downloads=call.config.environment.keep_downloads,
    )
    redirect.prepare(call.root)
    environ = redirect.environment(call.environ, changed)
    if python is not None:
        with call.supervisor.interruptible():
            if why := path_report.other_python(call.command[0], environ, python.soabi, python.path):
                call.speech.warn(why)
    return environ


def _child(
    call: Invocation,
    opened: Session,
    packages: int,
    environ: Mapping[str, str],
    on_start: Callable[[int], None] = lambda pid: None,
    gate: Gate | None = None,
) -> int:
    flushing = Flushing(call)
    flushing.begin(gate)
    try:
        return call.supervisor.run_child(
            call.command,
            environ,
            stop_timeout=call.config.run.stop_timeout,
            # A child that outlives a killed supervisor keeps its TMPDIR and its packages.
            keep=(opened.descriptor, packages),
            on_start=on_start,
        )
    finally:
        flushing.end()


def _require_usable(call: Invocation, *, partial: bool) -> Interpreter | None:
    """Refuse an environment that is not whole, or was made for another Python. Raises PackhorseError.

    Returns the Python it was made for, if it was made for one.
    """
    state = call.root.state()
    if state.state == "partial" and not partial:
        raise PackhorseError(
            f"The environment in {call.root.path} is only partly restored.",
            "Run `packhorse pull` to finish it.",
        )
    if not state.soabi:
        return None
    from packhorse.install.interpreter import worker_interpreter

    python = worker_interpreter(call.config.environment.python, call.environ)
    if (python.soabi, python.platform) != (state.soabi, state.platform):
        raise PackhorseError(
            f"The environment in {call.root.path} was made for {state.soabi} on {state.platform}, but "
            f"{python.path} is {python.soabi} on {python.platform}.",
            "Run `packhorse install` to make it anew, or name the right Python by environment.python.",
        )
    return python
