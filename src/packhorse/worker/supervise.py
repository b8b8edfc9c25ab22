"""Supervision of processes: signals, orphans, the terminal and the end, without threads and without polling.

Promises that a signal reaches whom it is meant for, that nothing which the child left behind outlives the
supervisor, and that waiting costs nothing. Knows nothing of roots, stores or configuration. Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType

from packhorse.worker import tree
from packhorse.worker.executable import cannot_start, find_executable
from packhorse.worker.terminal import Terminal
from packhorse.worker.tree import Tree

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""The signals after which a child has its stop-timeout to end."""
ENDING = (*STOPPING, signal.SIGHUP, signal.SIGQUIT)
"""The signals that mean the end to a process which does not handle them."""
MESSAGE = signal.SIGRTMIN + 2
"""The signal by which the supervisor learns that a message came (F_SETSIG); SIGIO where too many are on their way."""
_FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
_RESET = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGTERM,
)  # Python ignores the first two, who started us maybe the third

LEFTOVER_PATIENCE = 1.0
"""Seconds from SIGTERM to SIGKILL for what the child left behind."""
_KILL_PATIENCE = 5.0
_UNREAD = 0.25
"""Seconds between two looks whether a full stderr takes a line again."""
_KILLING = 0.3
"""Seconds of the grace kept for killing what did not end by itself."""
LONGEST_ALARM = 1e9  # setitimer(2) refuses what the system cannot count; `grace` may be meant as forever
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_LOWEST_INHERITED = 100  # a lock must not lie where a shell script says `exec 3>file`


class Stopped(BaseException):
    """A signal arrived inside `Supervisor.interruptible`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Process:
    """A process started here, the leader of its own process group; `code` is None while it lives."""

    def __init__(self, pid: int, on_end: Callable[[int], None] | None = None) -> None:
        self.pid = pid
        self.code: int | None = None
        self.outlasts_child = False
        """Whether the child may need it as long as it lives."""
        self.stop_signal = 0
        """The signal that a process stopped by job control was stopped with."""
        self.on_end = on_end

    def send(self, number: int) -> None:
        """Send a signal to its group, or to it alone where it left that group."""
        if self.code is not None:
            return
        try:
            os.killpg(self.pid, number)
        except PermissionError:
            pass
        except ProcessLookupError:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


class Supervisor:
    """Starts processes and serves the signals, timers and the terminal until they have ended.

    From its creation to the end of this process the signals it serves are blocked; there is one of it.
    """

    def __init__(self) -> None:
        self.stopped_by = 0
        """The first signal of ENDING that arrived, 0 for none."""
        self.stopping = False
        """Whether one of STOPPING arrived while the child ran."""
        self.grace = math.inf
        """Seconds after SIGTERM by which everything ends."""
        self._terminated_at: float | None = None
        self._processes: dict[int, Process] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._on_signal: Callable[[int], None] = lambda number: None
        self.on_message: Callable[[], None] = lambda: None
        """Called when MESSAGE arrived."""
        self.pausing: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
        """Entered while job control stops this process itself."""
        self.tree = Tree(os.getpid(), lambda: self._strangers | self._own)
        self._own: set[int] = set()
        self._late: list[Callable[[], None]] = []
        self._unsaid: list[Callable[[], None]] = []
        """What a full stderr has not taken yet."""
        self._open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._terminal = Terminal(lambda: self.pausing())  # noqa: PLW0108  (it is replaced)
        # SIGTERM is served even where it was ignored; the others stay ignored, as `nohup` wants it.
        self._served = {
            number
            for number in (*_FORWARDED, signal.SIGCONT)
            if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN
        } | {signal.SIGCHLD, signal.SIGIO, MESSAGE}
        if self._terminal.there:
            self._served.add(signal.SIGTSTP)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored nobody learns how a child ended
        signal.pthread_sigmask(signal.SIG_BLOCK, self._served | {signal.SIGTTOU, signal.SIGALRM})
        # Whoever replaced itself by this process (`sidecar & exec packhorse run ...`) may have left it children.
        self._strangers = (
            {pid for pid, seen in tree.processes().items() if seen.parent == os.getpid()}
            if _has_children()
            else set[int]()
        )
        self.adopts = os.getpid() == 1 or _become_subreaper()
        """Whether orphans of what is started here are handed to this process."""

    # --- processes ---

    def start(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        keep: Sequence[int] = (),
        own: bool = False,
        on_end: Callable[[int], None] | None = None,
    ) -> Process:
        """Start a process in a group of its own. `on_end` is called with its exit code.

        It inherits the descriptors `keep`. One of packhorse's `own` reads nothing and has no stdout but stderr.
        Raises CannotStartError.
        """
        executable = find_executable(argv[0], environ)
        lowest = min(_LOWEST_INHERITED, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        inherited = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, lowest) for descriptor in keep]
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            if raised != self._open_files:
                resource.setrlimit(resource.RLIMIT_NOFILE, self._open_files)
            pid = os.posix_spawn(
                executable,
                list(argv),
                environ,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, 2, 1),
                ]
                if own
                else [],
                setpgroup=0,
                # Our own processes write to the terminal from the background (SIGTTOU under `stty tostop`).
                setsigmask=[signal.SIGTTOU] if own else [],
                setsigdef=_RESET,
            )
        except OSError as error:
            raise cannot_start(argv[0], executable, error) from error
        finally:
            if raised != self._open_files:
                resource.setrlimit(resource.RLIMIT_NOFILE, raised)
            for descriptor in inherited:
                os.close(descriptor)
        self._processes[pid] = process = Process(pid, on_end)
        if own:
            self._own.add(pid)
        return process

    def run_child(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        *,
        stop_timeout: float,
        keep: Sequence[int] = (),
        on_start: Callable[[int], None] = lambda pid: None,
    ) -> int:
        """Run the one process that all this is for; return its exit code (128 + n for signal n).

        It gets the terminal and the signals that arrive here. SIGTERM and SIGINT end what runs beside it, too, and
        `stop_timeout` seconds later it is killed. What it leaves behind is ended before this returns. `on_start`
        is called with its process id. Raises CannotStartError.
        """
        child = self.start(argv, environ, keep=keep)

        def on_signal(number: int) -> None:
            child.send(number)
            if number in STOPPING:
                self.stopping = True
                for process in self._processes.values():
                    if process is not child and not process.outlasts_child:
                        process.send(signal.SIGTERM)
                self.at(time.monotonic() + stop_timeout, lambda: child.send(signal.SIGKILL))

        try:
            self._terminal.offer(child)
            on_start(child.pid)
            return self.wait(child, on_signal)
        finally:
            self._terminal.take_back()
            self.end_leftovers(child)

    def run_own(
        self,
        argv: Sequence[str],
        environ: Mapping[str, str],
        on_signal: Callable[[Process, int], None],
    ) -> int:
        """Run a process of packhorse's own, and end what it leaves behind in its group; return its exit code.

        `on_signal` decides what a signal means for it.
        """
        process = self.start(argv, environ, own=True)
        try:
            return self.wait(process, lambda number: on_signal(process, number))
        finally:
            self.end_leftovers(process, orphans=False)

    def wait(self, process: Process, on_signal: Callable[[int], None]) -> int:
        """Serve signals and timers until `process` has ended; return its exit code."""
        self.wait_until(lambda: process.code is not None, on_signal)
        assert process.code is not None
        return process.code

    def wait_until(self, reached: Callable[[], bool], on_signal: Callable[[int], None]) -> None:
        """Serve signals and timers until something is reached that one of them brings about."""
        self._on_signal = on_signal
        try:
            while not reached():
                self._serve()
        finally:
            self._on_signal = lambda number: None

    def end_leftovers(self, process: Process, *, orphans: bool = True) -> None:
        """End what `process` left behind: members of its group and, with `orphans`, whatever was handed to us.

        What those have started in turn is theirs to end, or is handed to us when they have ended.
        """
        for number, patience in ((signal.SIGTERM, LEFTOVER_PATIENCE), (signal.SIGKILL, _KILL_PATIENCE)):
            until = time.monotonic() + patience
            if number == signal.SIGTERM:
                until = self.within_grace(until, _KILLING)
            if number == signal.SIGTERM and self.tree.stopped:
                continue  # who is stopped for want of a file must not run on
            told: set[int] = set()
            while (left := self._leftovers(process.pid, orphans)) and time.monotonic() < until:
                for pid in left - told if number == signal.SIGTERM else left:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, number)
                        os.kill(pid, signal.SIGCONT)
                told |= left
                self._serve(until)

    def _leftovers(self, group: int, orphans: bool) -> set[int]:
        if self.adopts and not _has_children():
            return set()  # no need to look through /proc
        alive = tree.processes()
        found = {pid for pid, seen in alive.items() if seen.group == group}
        if orphans:
            found |= {pid for pid, seen in alive.items() if seen.parent == os.getpid()}
            found -= self._strangers | self._processes.keys()
        return found

    def allow_more_open_files(self) -> None:
        """Raise the limit of this process as far as it may; what is started keeps the one that there was."""
        hard = self._open_files[1]
        with contextlib.suppress(OSError, ValueError):  # refused where fs.nr_open is lower by now
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def resume(self) -> None:
        """Continue what was stopped with `tree.stop`, and catch up with what job control did meanwhile."""
        self.tree.resume()
        late, self._late = self._late, []
        for action in late:
            action()

    # --- signals and timers ---

    @property
    def grace_ends(self) -> float | None:
        """When (time.monotonic) everything must have ended; None while no SIGTERM arrived."""
        return None if self._terminated_at is None else self._terminated_at + self.grace

    def within_grace(self, due: float, kept: float) -> float:
        """`due`, or `kept` seconds before everything must have ended where that is sooner."""
        return due if self.grace_ends is None else min(due, self.grace_ends - kept)

    def at(self, due: float, action: Callable[[], None]) -> None:
        """Call `action` at the time `due` (time.monotonic), or as soon as somebody waits after it."""
        self._timers.append((due, action))

    def every(self, seconds: float, action: Callable[[], None]) -> None:
        """Call `action` again and again."""

        def again() -> None:
            self.at(time.monotonic() + seconds, again)
            action()

        self.at(time.monotonic() + seconds, again)

    @contextlib.contextmanager
    def interruptible(self, until: float | None = None) -> Iterator[None]:
        """Work of this process itself, given up by Stopped when a signal says so, or at the time `until`."""
        numbers = [*(number for number in ENDING if number in self._served), signal.SIGALRM]

        def stop(number: int, frame: FrameType | None) -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # one is enough
            self._note(number)
            raise Stopped(number)

        before = [signal.signal(number, stop) for number in numbers]
        try:
            if until is not None:
                _alarm(until)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def unhurried(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """`say`, which prints to stderr, for use while others wait for this process: it never waits for a reader.

        What a full stderr does not take is printed when there is room, or by `say_the_rest`.
        """

        def said(text: str) -> None:
            self._unsaid.append(lambda: say(text))
            if len(self._unsaid) == 1:
                self._say()

        return said

    def _say(self) -> None:
        while self._unsaid and select.select([], [2], [], 0)[1]:
            self._unsaid.pop(0)()
        if self._unsaid:
            self.at(time.monotonic() + _UNREAD, self._say)

    def say_the_rest(self) -> None:
        """Wait for whoever reads stderr, until a signal or the end of `grace`."""
        with contextlib.suppress(Stopped), self.interruptible(self.grace_ends):
            while self._unsaid:
                self._unsaid.pop(0)()

    def _note(self, number: int) -> None:
        if number in ENDING and not self.stopped_by:
            self.stopped_by = number
        if number == signal.SIGTERM and self._terminated_at is None:
            self._terminated_at = time.monotonic()

    def _serve(self, until: float | None = None) -> None:
        """Wait for one signal, the next timer or `until`, and serve what is due."""
        due = [time_ for time_, _ in self._timers] + ([until] if until is not None else [])
        if due:
            _alarm(min(due))
        # Not sigtimedwait: when this process is stopped until the time is over, Python's gives a signal that never came.
        taken = signal.sigwaitinfo(self._served | {signal.SIGALRM}).si_signo
        if due:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.sigtimedwait([signal.SIGALRM], 0)  # one that came meanwhile must not interrupt other work
        if taken != signal.SIGALRM:
            self._take(taken)
        now = time.monotonic()
        ready = [timer for timer in self._timers if timer[0] <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for _, action in ready:
            action()

    def _take(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
        elif number in (MESSAGE, signal.SIGIO):
            self.on_message()
        elif number == signal.SIGCONT and self.tree.stopped:
            self._late.append(lambda: self._take(number))
        elif number == signal.SIGCONT:
            for process in self._processes.values():
                self._terminal.resume(process)
        else:
            self._note(number)
            self._on_signal(number)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            process = self._processes.get(pid)
            if os.WIFSTOPPED(status):
                self._stopped(process, os.WSTOPSIG(status))
                continue
            if process is None:  # an orphan
                self._strangers.discard(pid)
                continue
            del self._processes[pid]
            self._own.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            process.code = code if code >= 0 else 128 - code
            if process.on_end is not None:
                process.on_end(process.code)

    def _stopped(self, process: Process | None, number: int) -> None:
        if process is None or self.tree.stopped_here(process.pid):
            return
        if self.tree.stopped:
            self._late.append(lambda: self._stopped(process, number))
        else:
            self._terminal.stopped(process, number)


def _alarm(due: float) -> None:
    """Have SIGALRM sent at the time `due`, or before it where that is decades away."""
    signal.setitimer(signal.ITIMER_REAL, min(max(due - time.monotonic(), 1e-6), LONGEST_ALARM))


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _become_subreaper() -> bool:
    """Have orphaned descendants handed to this process (PR_SET_CHILD_SUBREAPER(2const)); False if refused."""
    import ctypes

    return bool(ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
