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
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from packhorse import atomic, redirect, session
from packhorse.config import Config
from packhorse.errors import EXIT_SUPERVISOR, CannotStartError, ConfigError, PackhorseError
from packhorse.root import Root
from packhorse.session import Session
from packhorse.worker import path_report
from packhorse.worker.supervise import ENDING, Process, Stopped, Supervisor

if TYPE_CHECKING:
    from packhorse.worker.gate import Gate

OWN = "import sys; sys.path = [p for p in sys.path if p]; from packhorse.cli import main; main()"
"""Runs packhorse (`python -c`) without the working directory, where a file may be called like a module of ours."""

_MARGIN = 0.5
"""Seconds between the deadline a backup is told and the time at which it is killed."""
_CLEANING = 0.2
"""Seconds of `grace` kept for the cleaning after the backup."""
_IMPATIENCE = 0.5
"""Seconds from SIGTERM to SIGKILL for a backup that is to end at once."""


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

    def own(self, name: str, *arguments: str) -> list[str]:
        """The command line of a process of packhorse's own."""
        return [sys.executable, "-c", OWN, name, *arguments, *self.flags]


Beside: TypeAlias = Callable[[Session], contextlib.AbstractContextManager[Callable[[int], None]]]


class Status:
    """The status file, replaced at each change of phase."""

    def __init__(self, file: Path | None, warn: Callable[[str], None]) -> None:
        self._file = file
        self._warn = warn
        self._since = time.monotonic()
        self.facts: dict[str, Any] = {
            "phase": "",
            "pid": None,
            "exit_code": None,
            "boot": None,
            "restoring": False,
            "backup": None,
            "seconds": {},
        }

    def enter(self, phase: str) -> None:
        """Begin a phase: booting, running, backing-up or ended."""
        now = time.monotonic()
        if before := self.facts["phase"]:
            self.facts["seconds"][before] = round(now - self._since, 3)
        self.facts["phase"] = phase
        self._since = now
        try:
            self.write()
        except OSError as error:
            if not before:
                raise ConfigError(
                    f"The status file {self._file} cannot be written: {error.strerror}.",
                    "Choose another with --status-file.",
                ) from error
            self._warn(f"the status file cannot be written: {error.strerror}")

    def write(self) -> None:
        """Replace the file."""
        if self._file is not None:
            content = msgspec.json.format(msgspec.json.encode(self.facts)) + b"\n"
            atomic.write_file(self._file, content, mode=0o644)


def run(call: Invocation, *, snapshot: str = "", status_file: Path | None = None, look: float = 0.0) -> int:
    """Restore, run the command, save; returns the exit code. Raises PackhorseError before the command ran.

    `look` is that of Gate.
    """
    status = Status(status_file, call.speech.warn)
    status.enter("booting")
    code = EXIT_SUPERVISOR
    try:
        with _session(call) as opened:
            backups = _Backups(call, opened, status)
            gate = _gate(call, opened, status, look)
            code = _boot_and_run(call, opened, snapshot, status, backups, gate)
            if gate is not None and gate.failure and _may_install(call, snapshot):
                call.speech.warn("starting once more when all is restored, as run.on-restore-failure says")
                status.enter("booting")
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
        with _session(call) as opened:
            environ = _environment(call, opened)
            if beside is None:
                return _child(call, opened, environ, lambda pid: None)
            with beside(opened) as on_start:
                return _child(call, opened, environ, on_start)
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
    call: Invocation, opened: Session, snapshot: str, status: Status, backups: _Backups, gate: Gate | None
) -> int:
    """Boot, then run the command; with a gate the boot may go on meanwhile."""
    try:
        code = _boot(call, opened, snapshot, status, gate)
        return code or _run(call, opened, status, backups, gate)
    finally:
        if gate is not None:
            gate.close()
            status.facts["restoring"] = False


def _gate(call: Invocation, opened: Session, status: Status, look: float) -> Gate | None:
    if call.config.run.start == "complete":
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
        return 0
    supervisor = call.supervisor

    def on_signal(process: Process, number: int) -> None:
        if number in ENDING:
            process.send(number)
            supervisor.at(
                time.monotonic() + call.config.run.stop_timeout, lambda: process.send(signal.SIGKILL)
            )

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
            code = gate.code or (1 if gate.failure else 0)
            status.facts["restoring"] = gate.restoring
            if not gate.restoring:
                supervisor.end_leftovers(restorer, orphans=False)
    except CannotStartError as error:
        raise PackhorseError(error.what, error.remedy) from error  # it is not the command that cannot start
    status.facts["boot"] = read_facts(result) or status.facts["boot"]
    if supervisor.stopped_by:
        return 128 + supervisor.stopped_by
    return EXIT_SUPERVISOR if code else 0


def _nothing_to_restore(config: Config, root: Root) -> bool:
    """Whether it is certain, from a look at the disk alone, that there is nothing to install or restore."""
    if config.environment.configured or config.run.on_missing == "fail" or root.state().state == "partial":
        return False
    directory = config.storage.directory
    return directory is not None and not os.path.exists(directory / "tags" / config.storage.tag)


def _run(call: Invocation, opened: Session, status: Status, backups: _Backups, gate: Gate | None) -> int:
    restoring = gate is not None and gate.restoring
    environ = _environment(call, opened, partial=restoring)
    if gate is not None and restoring:
        environ |= gate.marked
    for line in path_report.lines(call.root, environ, call.config.run.app_path):
        call.speech.note(line)

    def on_start(pid: int) -> None:
        status.facts["pid"] = pid
        status.enter("running")
        if gate is not None:
            gate.child_started(pid)
        backups.begin(gate)

    code = _child(call, opened, environ, on_start)
    return EXIT_SUPERVISOR if gate is not None and gate.ended_child else code


def _environment(call: Invocation, opened: Session, *, partial: bool = False) -> dict[str, str]:
    """Of the child; `partial`: the rest of the root is on its way."""
    with call.supervisor.interruptible():
        _require_usable(call, partial=partial)
    changed = redirect.changes(
        call.root,
        call.environ,
        tmp=opened.tmp,
        build=opened.build,
        app_path=call.config.run.app_path,
        keep_downloads=call.config.environment.keep_downloads,
    )
    redirect.prepare(call.root)
    return redirect.environment(call.environ, changed)


def _child(
    call: Invocation, opened: Session, environ: Mapping[str, str], on_start: Callable[[int], None]
) -> int:
    with call.supervisor.interruptible():
        packages = call.root.use_packages()
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
        os.close(packages)


class _Backups:
    """The processes that save what changed: now and then while the child runs, and once after it."""

    def __init__(self, call: Invocation, opened: Session, status: Status) -> None:
        self._call = call
        self._result = opened.build / "backup.json"
        self._status = status
        self._running: Process | None = None
        self._finishing = False
        self._hurried = False
        self._given_up = False
        self._gate: Gate | None = None

    def begin(self, gate: Gate | None) -> None:
        """Start one every `backup_every` seconds from now on, but for the time of a restore."""
        self._gate = gate
        if self._call.config.run.backup and self._call.config.run.backup_every:
            self._call.supervisor.every(self._call.config.run.backup_every, self._start_periodic)

    def finish(self) -> None:
        """Save what is left to save: within `grace` after a SIGTERM, else as long as it takes.

        A SIGTERM that arrives meanwhile has a backup without a deadline begin again with one, so that what is
        stored by then gets into the tag. Any further signal ends it at once.
        """
        if not self._call.config.run.backup or (self._running is None and self._nothing_to_save()):
            return
        self._status.enter("backing-up")
        self._finishing = True
        self._wait()
        while not self._given_up:
            ends = self._call.supervisor.grace_ends
            self._start_final(ends)
            self._wait()
            if ends is not None or self._call.supervisor.grace_ends is None:
                return

    def _nothing_to_save(self) -> bool:
        """Whether it is certain without a process of its own: a backup only ever adds, and there is nothing."""
        root = self._call.root
        try:
            return not any(os.listdir(root.path / name) for name in self._call.config.run.backup)
        except OSError:
            return False

    def _start_periodic(self) -> None:
        restoring = self._gate is not None and self._gate.restoring
        if self._running is None and not self._call.supervisor.stopping and not restoring:
            self._start()

    def _start_final(self, ends: float | None) -> None:
        if ends is None:
            self._start()
        elif (left := ends - _CLEANING - _MARGIN - time.monotonic()) > 0:
            self._start("--deadline", f"{left:.2f}")
        else:
            self._record("There was no time left for a backup.")

    def _start(self, *arguments: str) -> None:
        argv = self._call.own("backup", "--result", str(self._result), *arguments)
        environ = redirect.own(self._call.environ)
        try:
            self._running = self._call.supervisor.start(argv, environ, own=True, on_end=self._ended)
        except CannotStartError as error:
            self._record(str(error))

    def _wait(self) -> None:
        if (process := self._running) is None:
            return
        supervisor = self._call.supervisor

        def kill() -> None:
            process.send(signal.SIGKILL)

        def on_signal(number: int) -> None:
            if number not in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
                return
            self._hurried = number == signal.SIGTERM and not limited
            self._given_up = not self._hurried
            process.send(signal.SIGTERM)
            supervisor.at(time.monotonic() + _IMPATIENCE, kill)

        limited = (ends := self._call.supervisor.grace_ends) is not None
        if ends is not None:
            supervisor.at(ends - _CLEANING, kill)
        supervisor.wait(process, on_signal)
        self._hurried = False
        supervisor.end_leftovers(process, orphans=False)

    def _ended(self, code: int) -> None:
        self._running = None
        if not code:
            self._record("")
        elif self._hurried or (self._call.supervisor.stopping and not self._finishing):
            pass  # ended by us, and another follows
        elif self._given_up:
            self._record("The backup was ended by a signal.")
        else:
            self._record(f"The backup ended with exit code {code}.")

    def _record(self, error: str) -> None:
        facts = read_facts(self._result) or {}
        if error:
            facts["error"] = error
            self._call.speech.warn(f"not everything is saved: {error}")
        self._status.facts["backup"] = facts
        with contextlib.suppress(OSError):
            self._status.write()


def _require_usable(call: Invocation, *, partial: bool) -> None:
    """Refuse an environment that is not whole, or was made for another Python. Raises PackhorseError."""
    state = call.root.state()
    if state.state == "partial" and not partial:
        raise PackhorseError(
            f"The environment in {call.root.path} is only partly restored.",
            "Run `packhorse pull` to finish it.",
        )
    if not state.soabi:
        return
    from packhorse.install.interpreter import worker_interpreter

    python = worker_interpreter(call.config.environment.python, call.environ)
    if (python.soabi, python.platform) != (state.soabi, state.platform):
        raise PackhorseError(
            f"The environment in {call.root.path} was made for {state.soabi} on {state.platform}, but "
            f"{python.path} is {python.soabi} on {python.platform}.",
            "Run `packhorse install` to make it anew, or name the right Python by environment.python.",
        )


def read_facts(result: Path) -> dict[str, Any] | None:
    """What a process of packhorse's own left in its result file, which is removed."""
    try:
        facts: dict[str, Any] = msgspec.json.decode(result.read_bytes(), type=dict[str, Any])
        result.unlink()
    except (OSError, msgspec.DecodeError):
        return None
    return facts
