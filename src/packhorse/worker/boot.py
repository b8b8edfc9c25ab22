"""Boot: before the child starts, make the root hold the environment of this worker.

Pulls the newest snapshot of its fingerprint; where there is none, installs and pushes under a lease, so that one
worker builds while the others wait. Runs in a process of its own, which ends before the child starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from packhorse.errors import IntegrityError, NoSuchSnapshotError, PackhorseError, StorageError
from packhorse.progress import Progress
from packhorse.root import boot_id
from packhorse.transfer.pull import PullResult, Target, find, pull
from packhorse.transfer.push import PushResult, push
from packhorse.transfer.setup import Setup

POLL = 2.0
"""Seconds between two looks at a lease that another worker holds."""


class BootFacts(msgspec.Struct):
    """How the root came to hold the environment."""

    action: str
    """`pulled`, `installed`, `unchanged` or `nothing` (nothing is configured and nothing stored)."""
    snapshot: str = ""
    seconds: float = 0.0
    pull: PullResult | None = None
    push: PushResult | None = None
    warning: str = ""


class Boot:
    """One boot."""

    def __init__(
        self, setup: Setup, progress: Progress, note: Callable[[str], None], warn: Callable[[str], None]
    ) -> None:
        self.setup, self.progress, self.note, self.warn = setup, progress, note, warn
        self.config = setup.config

    def bring_up(self, snapshot: str = "") -> BootFacts:
        """Make the root ready for the child, from `snapshot` if that is given.

        Raises NoSuchSnapshotError, IntegrityError, StorageError, NoSpaceError or PackhorseError where it cannot.
        """
        started = time.monotonic()
        facts = self._bring_up(snapshot)
        facts.seconds = time.monotonic() - started
        if facts.warning:
            self.warn(facts.warning)
        return facts

    def _bring_up(self, snapshot: str) -> BootFacts:
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
            if not snapshot and self._fits(whole=True):
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
        try:
            pulled = self._pull(target)
        except (IntegrityError, StorageError) as error:
            return self._instead(error, snapshot)
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
                self.setup.fingerprint,
                snapshot,
            )
        except NoSuchSnapshotError:
            if snapshot or self.config.run.on_missing == "fail":
                raise
            return None

    def _in_use(self) -> bool:
        with self.setup.root.packages_unused() as free:
            return not free

    def _fits(self, *, whole: bool = False) -> bool:
        """Whether the root holds this configuration's packages (`whole`: and no crash of the machine can have
        taken bytes of them)."""
        state = self.setup.root.state()
        if state.state != "complete":
            return not self.config.environment.configured and not whole
        if whole and not state.durable and state.boot != boot_id():
            return False
        return state.fingerprint == self.setup.fingerprint

    def _pull(self, target: Target) -> PullResult:
        return pull(
            self.setup.root,
            self.setup.store,
            target,
            interpreter=lambda: self.setup.interpreter,
            progress=self.progress,
            waiting=lambda holder: self.note(f"waiting for {holder}, which is changing this root"),
        )

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
            return BootFacts("nothing")
        from packhorse.store.leases import Lease

        tag = self.config.storage.tag
        try:
            with Lease(self.setup.store, f"{tag}-{self.setup.fingerprint[:16]}") as lease:
                waited = False
                while not lease.held():
                    if not waited:
                        self.note("another worker is building this environment; waiting for its snapshot")
                        waited = True
                    time.sleep(POLL)
                target = self._target("")
                if target is not None and target.snapshot.packages:  # pushed by another while we waited
                    pulled = self._pull(target)
                    return BootFacts("pulled", pulled.snapshot, pull=pulled)
                return self._build()
        except StorageError as error:
            return self._instead(error, "")

    def _build(self, *, repair: bool = False) -> BootFacts:
        """Install, then push; an environment that cannot be saved still serves this worker."""
        from packhorse.install.environment import install

        tag = self.config.storage.tag
        if not repair:
            self.note(f"{tag} has no snapshot of this environment: installing it")
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
