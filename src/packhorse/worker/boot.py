"""Boot: before the child starts, make the root hold the environment of this worker.

Pulls the newest snapshot of its fingerprint; where there is none, installs and pushes under a lease, so that one
worker builds while the others wait. Runs in a process of its own, which ends before the child starts, or, with `ready`
and `early`, when the rest has been restored.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import FrameType
from typing import NamedTuple, NoReturn

import msgspec

from packhorse.errors import IntegrityError, NoSuchSnapshotError, PackhorseError, StorageError
from packhorse.progress import Progress
from packhorse.root import boot_id
from packhorse.snapshot.gpu import Choice, choice
from packhorse.snapshot.order import ranks
from packhorse.transfer.local import Local
from packhorse.transfer.opening import Opening, PullResult
from packhorse.transfer.pull import Target, find, pull
from packhorse.transfer.push import PushResult, push
from packhorse.transfer.setup import Setup
from packhorse.worker import path_report
from packhorse.worker.learning import Learning
from packhorse.worker.restorer import Restorer
from packhorse.worker.write_leases import probe

POLL = 2.0
"""Seconds between two looks at a lease that another worker holds."""


class BootFacts(msgspec.Struct):
    """How the root came to hold the environment."""

    action: str
    """`pulled`, `installed`, `unchanged` or `nothing` (nothing is configured and nothing stored); `pulling` while the
    command runs already."""
    snapshot: str = ""
    seconds: float = 0.0
    pull: PullResult | None = None
    push: PushResult | None = None
    warning: str = ""


class Early(NamedTuple):
    """What a boot needs so that the child can start before it has ended."""

    restorer: Restorer
    name: str
    """Of the profile of the child's command."""
    command: str
    """The command as the profile shows it."""
    report: Callable[[BootFacts], None]
    """Called just before the child may start, with what is known then."""
    arrivals: str = ""
    """For tests: "asked" brings large files only when somebody opens them, "once" none before somebody opens one,
    "random:7" in a random order and slowly."""


class Boot:
    """One boot."""

    def __init__(
        self,
        setup: Setup,
        progress: Progress,
        note: Callable[[str], None],
        warn: Callable[[str], None],
        early: Early | None = None,
    ) -> None:
        self.setup, self.progress, self.note, self.warn = setup, progress, note, warn
        self.config, self.early = setup.config, early
        self.learning: Learning | None = None
        self.started = False
        """Whether the child may run already."""

    def bring_up(self, snapshot: str = "") -> BootFacts:
        """Make the root ready for the child, from `snapshot` if that is given.

        Raises NoSuchSnapshotError, IntegrityError, StorageError, NoSpaceError or PackhorseError where it cannot.
        """
        started = time.monotonic()
        facts = self._bring_up(snapshot)
        if self.early is not None:
            self.early.restorer.finish()
        facts.seconds = time.monotonic() - started
        if self.learning is not None:
            self.learning.wait()
        if facts.warning:
            self.warn(facts.warning)
        return facts

    def _bring_up(self, snapshot: str) -> BootFacts:
        if self._in_use() and self.setup.root.state().state == "partial":
            self._wait_for_another()
        if self._in_use():
            if not snapshot and self._fits():
                return BootFacts("unchanged", self.setup.root.state().snapshot)
            raise PackhorseError(
                f"The packages of {self.setup.root.path} are in use by a running command, and are not those that "
                "this configuration asks for.",
                "Stop that command, or give this one another root.",
            )
        try:
            target = self._target(snapshot)
        except StorageError as error:
            if not snapshot and self._fits() and self._whole():
                return BootFacts(
                    "unchanged",
                    self.setup.root.state().snapshot,
                    warning=f"{error.what} The root already holds this environment, so the command starts with it.",
                )
            return self._instead(error, snapshot)
        if target is None:
            return self._install()
        if self._lacks_packages(target, snapshot) and self.config.run.on_missing == "fail":
            raise NoSuchSnapshotError(
                f"The tag {self.config.storage.tag} has shared files, but no packages.",
                "`packhorse install` and `packhorse push` make a snapshot.",
            )
        return self._restore(target, snapshot)

    def _restore(self, target: Target, snapshot: str) -> BootFacts:
        """Pull, and do what is to be done where that fails, or brings shared files only."""
        try:
            pulled = self._pull(target, snapshot)
        except (PackhorseError, OSError) as error:
            if not self.started and isinstance(error, (IntegrityError, StorageError)):
                return self._instead(error, snapshot)
            state = self.setup.root.state()
            if not self.started or state.state != "sparse":
                raise
            why = error.what if isinstance(error, PackhorseError) else f"{error.strerror}."
            warning = f"{why} Code for other GPUs is still missing; the next start goes on."
            return BootFacts("pulled", state.snapshot, warning=warning)
        if self._lacks_packages(target, snapshot):
            return self._install()
        return BootFacts("pulled" if pulled.pulled else "unchanged", pulled.snapshot, pull=pulled)

    def _lacks_packages(self, target: Target, snapshot: str) -> bool:
        """Whether a tag that is asked for packages has shared files only."""
        return self.config.environment.configured and not snapshot and not target.snapshot.packages

    def _target(self, snapshot: str) -> Target | None:
        try:
            return find(
                self.setup.store,
                self.config.storage.tag,
                lambda: self.setup.interpreter,
                lambda: self.setup.fingerprint,
                snapshot,
            )
        except NoSuchSnapshotError:
            if snapshot or self.config.run.on_missing == "fail":
                raise
            return None

    def _wait_for_another(self) -> None:
        """Another worker on this root has started its command while the restore goes on: wait for its end."""
        with self.setup.root.writing(
            lambda holder: self.note(f"waiting for {holder}, which restores this root")
        ):
            pass

    def _in_use(self) -> bool:
        with self.setup.root.packages_unused() as free:
            return not free

    def _fits(self) -> bool:
        """Whether the root holds this configuration's packages."""
        state = self.setup.root.state()
        sparse = state.state == "sparse" and self._choice.gpus and {*self._choice.gpus} <= {*state.gpus}
        if state.state != "complete" and not sparse:
            return not self.config.environment.configured
        return state.fingerprint == self.setup.fingerprint

    def _whole(self) -> bool:
        """Whether no crash of the machine has taken bytes of the packages."""
        root = self.setup.root
        state = root.state()
        if state.state not in ("complete", "sparse"):
            return False
        if state.durable or state.boot == boot_id():
            return True
        self.note("the machine was started again: reading what was not yet on its disk then")
        with root.writing():
            return Local(root).whole()

    def _pull(self, target: Target, snapshot: str) -> PullResult:
        leaves_out = self.config.run.gpu.startswith("only")
        gpus, only = self._choice if leaves_out or self.config.run.start != "complete" else Choice()
        if leaves_out and not only:
            self.warn(
                f'run.gpu = "{self.config.run.gpu}" leaves nothing out here: no GPU\'s driver answers, '
                "or CUDA_FORCE_PTX_JIT is set"
            )
        pulled = pull(
            self.setup.root,
            self.setup.store,
            target,
            interpreter=lambda: self.setup.interpreter,
            progress=self.progress,
            waiting=lambda holder: self.note(f"waiting for {holder}, which is changing this root"),
            gpus=gpus,
            only=only,
            opening=None if self._lacks_packages(target, snapshot) else self._opening(),
        )
        if not self.started:
            self._tell_left_out(pulled)
        return pulled

    def _tell_left_out(self, pulled: PullResult) -> None:
        if pulled.cold_stored_bytes and self._choice.only:
            self.note(
                f"code for other GPUs is left out, which saves {pulled.cold_bytes / 1e6:,.0f} MB of the disk and "
                f"{pulled.cold_stored_bytes / 1e6:,.0f} MB of the network"
            )

    @cached_property
    def _choice(self) -> Choice:
        """Whose code comes first. The driver may be asked for it, and take its time."""
        return choice(self.config.run.gpu, self.setup.environ)

    def _opening(self) -> Opening | None:
        """How the child starts before everything is there, if it does."""
        early = self.early
        if early is None:
            return None
        self.learning = learning = Learning(
            self.setup.store,
            self.config.storage.tag,
            early.name,
            early.command,
            lambda known: early.restorer.used(self.setup.root.path, known),
            self.warn,
        )

        def start(pulled: PullResult) -> None:
            self.started = True
            self._tell_left_out(pulled)
            early.report(BootFacts("pulling", pulled.snapshot, pull=pulled))
            learning.refine_at_the_end()
            early.restorer.start()

        if self.config.run.start == "ready":
            return Opening(start, ranks, arrived=learning.refine)
        why = probe(self.setup.root.path)
        if why:
            self.warn(f'run.start = "early" cannot work here, so the command starts when all is there: {why}')
            return None
        return Opening(start, self._ranks(early, learning), early.restorer, learning.refine)

    def _ranks(
        self, early: Early, learning: Learning
    ) -> Callable[[Mapping[bytes, int]], Mapping[bytes, int]]:
        """The order of held files, by the profile of the command where there is one."""
        if early.arrivals.startswith("random:"):
            shuffle = random.Random(early.arrivals).shuffle  # noqa: S311

            def at_random(sizes: Mapping[bytes, int]) -> Mapping[bytes, int]:
                order = sorted(sizes)
                shuffle(order)
                return {path: rank for rank, path in enumerate(order)}

            return at_random
        learning.read()  # while the manifests are
        return lambda sizes: ranks(sizes, learning.files)

    def _instead(self, error: PackhorseError, snapshot: str) -> BootFacts:
        """What to do when the snapshot cannot be restored: fail, or install where the configuration says so."""
        if (
            snapshot
            or self.config.run.on_restore_failure != "install"
            or not self.config.environment.configured
        ):
            raise error
        self.warn(f"{error.what} Installing instead, as run.on-restore-failure says.")
        return self._build(repair=isinstance(error, IntegrityError))

    def _install(self) -> BootFacts:
        if not self.config.environment.configured:
            if why := path_report.nothing(self.config, self.setup.root):
                self.note(why)
            return BootFacts("nothing")
        from packhorse.store.leases import Lease

        tag = self.config.storage.tag
        try:
            with (
                Lease(self.setup.store, f"{tag}-{self.setup.fingerprint[:16]}") as lease,
                _ended_by_exception(),
            ):
                waited = False
                while not lease.held():
                    if not waited:
                        self.note("another worker is building this environment; waiting for its snapshot")
                        waited = True
                    time.sleep(POLL)
                target = self._target("")
                if target is None or not target.snapshot.packages:
                    self.note(f"{tag} has no snapshot of this environment: making one")
                    return self._build()
        except StorageError as error:
            return self._instead(error, "")
        # Pushed by another while we waited. Without the lease: those who wait for it need not wait for this as well.
        return self._restore(target, "")

    def _build(self, *, repair: bool = False) -> BootFacts:
        """Install, then push; an environment that cannot be saved still serves this worker."""
        from packhorse.install.environment import install

        tag = self.config.storage.tag
        install(self.setup.root, self.config, self.setup.environ, self.progress, self.note)
        facts = BootFacts("installed")
        try:
            facts.push = push(
                self.setup.root,
                self.setup.store,
                tag,
                interpreter=lambda: self.setup.interpreter,
                progress=self.progress,
                warn=self.warn,
                exclude=self.config.run.exclude,
                repair=repair,
            )
            facts.snapshot = facts.push.snapshot
        except StorageError as error:
            facts.warning = f"The environment was installed but not saved: {error}"
        return facts


@contextlib.contextmanager
def _ended_by_exception() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, so that others need not wait until a lease counts no more, and pip is stopped."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = {
        number: signal.signal(number, stop)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup(1)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
