"""The gate: files that are not there yet are held back while the child runs, from the supervisor's side.

Promises that whoever opens such a file under the child gets its bytes or is ended, whatever becomes of the restore:
what holds a file back is let go of when it is there, or when nobody is left to read it. Knows nothing of what the
files are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from packhorse.errors import UNREADABLE
from packhorse.worker import tree, write_leases
from packhorse.worker.executable import find_executable, held_back
from packhorse.worker.link import Arrived, Child, Hold, Link, Start
from packhorse.worker.supervise import ENDING, MESSAGE, STOPPING, Process, Stopped, Supervisor

MARK = "_PACKHORSE_RESTORER"
"""The variable by which everything that descends from a child is known for it when its supervisor is gone."""
IMPATIENCE = 0.5
"""Seconds from SIGTERM to SIGKILL for a restorer that is needed no more."""
_KILLING = 0.1
"""Seconds of the grace kept for killing it."""
_RETRY = 0.25
"""Seconds between two attempts to renew a lease that could not be renewed."""
_PARTING = 1.0
"""Seconds from the end of its link in which a restorer ends by itself."""


class Gate:
    """One restore that goes on while the child runs."""

    def __init__(
        self,
        supervisor: Supervisor,
        warn: Callable[[str], None],
        *,
        on_complete: Callable[[], None] = lambda: None,
        look: float = 0.0,
    ) -> None:
        """`on_complete` is called when everything is restored. `look`: seconds between two looks at what is wanted.

        What is found wanted at two looks is renewed, so 0 stands for a quarter of what the kernel waits: half of that time is over
        then. The third quarter is for stopping the command, and in the last one it is killed if it did not stop.
        """
        self._supervisor = supervisor
        self._warn = warn
        self._on_complete = on_complete
        self._quarter = write_leases.break_time() / 4
        self._look_every = look or self._quarter
        self._link: Link | None = None
        self._restorer: Process | None = None
        self._mark = ""
        self._child = 0
        self._held: dict[int, int] = {}
        self._programs: set[int] = set()
        self._wanted: set[int] = set()
        """What was wanted at the last look."""
        self._refused: set[int] = set()
        """What could not be renewed; the child is stopped until it is there."""
        self._running_since = 0.0
        """Since when the command is being stopped in vain; 0 where it stops."""
        self._looking = False
        self._looked = 0.0
        """When that was."""
        self._warned = False
        self._ending = False
        self.started = False
        """Whether the child may start, or could."""
        self.failure = ""
        """Why the restore failed."""
        self.code: int | None = None
        """The exit code of the restorer, once it has ended and all that it sent was served."""
        self.ended_child = False
        """Whether the child was ended for a failure."""

    def open(self, argv: Sequence[str], environ: Mapping[str, str]) -> Process:
        """Start the restorer, which is told its end of the link by `--link`. Raises CannotStartError."""
        ours, theirs = Link.pair()
        self._supervisor.allow_more_open_files()
        self._supervisor.on_message = self._receive
        self._supervisor.pausing = self._pausing
        inherited = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD, 3)
        try:
            restorer = self._supervisor.start(
                [*argv, "--link", str(inherited)], environ, own=True, on_end=self._restorer_ended
            )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(inherited)
            theirs.close()
        restorer.outlasts_child = True
        self._restorer, self._link = restorer, ours
        self._mark = mark(restorer.pid)
        ours.announce(MESSAGE)
        self._receive()
        return restorer

    @property
    def restoring(self) -> bool:
        """Whether the restore is on its way."""
        return self._restorer is not None and self.code is None

    @property
    def marked(self) -> dict[str, str]:
        """What the environment of the child has in addition."""
        return {MARK: self._mark}

    def await_command(self, name: str, environ: Mapping[str, str]) -> bool:
        """Wait until all that execve(2) opens of a command is there; False where the restore failed before.

        Whoever starts a child waits for its execve(2), with copies of the descriptors that hold files back: if that
        waited for one of these, nobody could let go of it. What is there is never held back again.
        Raises CannotStartError, and Stopped where a signal says so.
        """
        executable = find_executable(name, environ)

        def on_signal(number: int) -> None:
            if number in ENDING:
                raise Stopped(number)

        self._supervisor.wait_until(
            lambda: bool(self.failure) or not (self._held and held_back(executable)), on_signal
        )
        return not self.failure

    def child_started(self, pid: int) -> None:
        """Tell the restorer."""
        self._child = pid
        if self._link is not None:
            with contextlib.suppress(OSError):  # its end is seen to by itself
                self._link.send(Child(pid))

    def close(self) -> None:
        """End the restorer if it is not through, then let go of everything. The child and what it left are gone, or are ended."""
        self._ending = True
        if self._held:
            self._supervisor.tree.kill()
        restorer = self._restorer
        if restorer is not None and restorer.code is None:

            def on_signal(number: int) -> None:
                if number in (*STOPPING, signal.SIGQUIT):
                    restorer.send(signal.SIGKILL)

            restorer.send(signal.SIGTERM)
            until = self._supervisor.within_grace(time.monotonic() + IMPATIENCE, _KILLING)
            self._supervisor.at(until, lambda: restorer.send(signal.SIGKILL))
            self._supervisor.wait(restorer, on_signal)
            self._supervisor.end_leftovers(restorer, orphans=False)
        self._let_go()

    # --- what the restorer says ---

    def _receive(self) -> None:
        while self._link is not None:
            try:
                received = self._link.receive(wait=False)
            except BlockingIOError:
                return
            except (OSError, *UNREADABLE) as error:
                self._fail(f"a message of the process that restores cannot be read: {error}")
                return
            if received is None:
                self._link.close()
                self._link = None
                if self._held and not self._ending:
                    self._supervisor.at(
                        time.monotonic() + _PARTING,  # it may be about to end with a code that says more
                        lambda: self._lost("the process that restores is gone"),
                    )
                return
            message, descriptors = received
            if isinstance(message, Hold):
                self._hold(message, descriptors)
            elif isinstance(message, Start):
                self.started = True
            elif isinstance(message, Arrived):
                self._arrived(message.numbers)

    def _hold(self, message: Hold, descriptors: list[int]) -> None:
        if len(descriptors) != len(message.numbers):
            for descriptor in descriptors:
                os.close(descriptor)
            self._fail("this process may not have as many files open as are to be held back (RLIMIT_NOFILE)")
            return
        self._held.update(zip(message.numbers, descriptors, strict=True))
        self._programs.update(message.programs)
        if not self._looking:
            self._looking = True
            self._looked = time.monotonic()
            self._supervisor.at(self._looked + self._look_every, self._look)

    def _arrived(self, numbers: Iterable[int]) -> None:
        there = [number for number in numbers if number in self._held]
        # Between the end of the lease and that of the descriptor exec(2) would fail: a writer has the file open.
        executed = any(
            number in self._programs and write_leases.wanted(self._held[number]) for number in there
        )
        if executed and not self._supervisor.tree.stop(_RETRY):
            self._supervisor.resume()  # as a rule exec(2) finds no writer all the same
        for number in there:
            os.close(self._held.pop(number))
        self._refused.difference_update(there)
        if self._supervisor.tree.stopped and not self._refused:
            self._supervisor.resume()

    def _restorer_ended(self, code: int) -> None:
        self._soon(lambda: self._settle(code))  # when all who ended at the same time are known

    def _settle(self, code: int) -> None:
        if not self._ending:
            self._receive()
            if self.started and self._held:
                self._lost(_how(code))
            elif self.started and code and not self.failure:
                self._warn(
                    f"{_how(code)} when every file was there that the command needs, so it goes on; the next start "
                    "finishes the restore"
                )
        self.code = code
        if not self.started:
            self._let_go()
        elif not self.failure and not self._ending and not self._held:
            self._let_go()
            self._on_complete()

    def _soon(self, action: Callable[[], None]) -> None:
        self._supervisor.at(time.monotonic(), action)

    # --- before the kernel's patience is over ---

    def _look(self) -> None:
        self._looking = bool(self._held)
        if not self._held:
            return
        wanted = {number for number, descriptor in self._held.items() if write_leases.wanted(descriptor)}
        before, self._looked = self._looked, time.monotonic()
        if wanted and not self._supervisor.tree.stopped and self._looked - before > 3 * self._quarter:
            # Who waited at the last look had done so for a quarter, and may have been let through.
            self._fail("packhorse itself was stopped for too long to hold files back")
            return
        due = wanted & self._wanted | self._refused
        self._wanted = wanted
        if due:
            self._renew(due)
        again = self._refused or self._running_since
        pause = min(_RETRY, self._look_every) if again else self._look_every
        self._supervisor.at(time.monotonic() + pause, self._look)

    def _renew(self, numbers: Iterable[int]) -> None:
        """Have the kernel begin its count again for those who want these files."""
        if self.code is not None:
            self._fail(_how(self.code))  # what is wanted never comes
            return
        restorer, since = self._restorer, self._running_since or time.monotonic()
        stopped = self._supervisor.tree.stop(max(since + self._quarter - time.monotonic(), 0))
        if not stopped or restorer is None:
            self._supervisor.resume()
            self._running_since = since
            if time.monotonic() - since >= min(self._look_every, self._quarter):
                self._fail_at_once(
                    "a process of the command does not stop, such as one that a debugger holds"
                )
            return  # until the next look
        self._running_since = 0.0
        self._refused = {
            number
            for number in numbers
            if number in self._held
            and not write_leases.renew(self._held[number], restorer.pid, write_leases.WANTED)
        }
        if not self._refused:
            self._supervisor.resume()
        elif not self._warned:
            self._warned = True
            self._warn(
                "a process outside of the command waits for a file that is not there yet; the command is stopped "
                "until the file is there"
            )

    @contextlib.contextmanager
    def _pausing(self) -> Iterator[None]:
        """While job control stops this process nobody would renew: so all are stopped."""
        if not self._held:
            yield
            return
        if not self._supervisor.tree.stop():
            self._fail_at_once("a process of the command does not stop with the others")
        try:
            yield
        finally:
            self._looked = time.monotonic()
            self._renew([n for n, descriptor in self._held.items() if write_leases.wanted(descriptor)])

    # --- the end ---

    def _lost(self, why: str) -> None:
        """Nobody restores any more: so the restore failed, but where all processes were told to end (systemd.kill(5)) and the
        command is about to. Until it has, or waits for a file for too long, the descriptors held here hold them back."""
        if self._held and not self._supervisor.stopping:
            self._fail(why)

    def _fail(self, why: str) -> None:
        """The restore failed: end all who may read what is not there, then let go."""
        if not self.failure and not self._ending:
            self._supervisor.tree.stop()  # so that nobody sees others end, and acts on it
            self._fail_at_once(why)

    def _fail_at_once(self, why: str) -> None:
        if self.failure or self._ending:
            return
        self.failure = why
        processes = self._supervisor.tree
        if self._restorer is not None:
            self._restorer.send(signal.SIGKILL)
        self.ended_child = self._child in tree.processes()
        processes.kill()
        self._let_go()
        # Last, since stderr may be a pipe that nobody reads.
        if self.ended_child:
            self._warn(
                f"the restore failed while the command ran ({why}), so the command was ended: files that it may read "
                "are not there. Start it again to go on with the restore."
            )
        else:
            self._warn(f"the restore failed: {why}. Start again to go on with it.")

    def _let_go(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)
        self._held.clear()
        self._refused.clear()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._supervisor.tree.stopped:
            self._supervisor.resume()


def mark(restorer: int) -> str:
    """What MARK is set to: no other process of this machine ever had the same number and start. Raises OSError."""
    return f"{restorer}-{tree.started(restorer)}"


def end_orphans(child: int, warn: Callable[[str], None]) -> None:
    """For a restorer whose supervisor is gone: end the child and all that came of it, before it lets go of any file.

    `child` is its process id, 0 where that was not told yet. Found are its group, who has the mark of the calling
    process in the environment, and who descends from either.
    """
    own = os.getpid()
    marked = f"\0{MARK}={mark(own)}\0".encode()
    known = {child} if child else set[int]()
    group = child

    def find() -> list[int]:
        alive = tree.processes()
        for pid, seen in alive.items():
            if pid != own and ((group and seen.group == group) or marked in _environment(pid)):
                known.add(pid)
        known.update(tree.descendants(alive, known, (own,)))
        return [pid for pid in known if pid in alive]

    found = find()
    tree.kill(find)
    if found:
        with contextlib.suppress(OSError):  # who read stderr may be gone as well
            warn(
                "the supervisor of the command was killed while the restore was on its way, so the command was ended: "
                "files that it may read are not there. Start it again to go on with the restore."
            )


def _environment(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"\0" + file.read() + b"\0"
    except OSError:
        return b""


def _how(code: int) -> str:
    if code > 128:
        return f"the process that restores was ended by signal {code - 128}"
    if code:
        return f"the process that restores ended with exit code {code}"
    return "the process that restores ended before every file was there"
