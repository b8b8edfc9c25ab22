"""Installation, whole: pip → extra wheels → import check → exchange, all inside the root.

Promises that the environment in force stays as it was, and usable, until the new one is complete and checked,
whatever goes wrong and whenever packhorse is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from packhorse import atomic, redirect, session
from packhorse.config import Config
from packhorse.errors import ConfigError, PackhorseError
from packhorse.install import (
    bring,
    fingerprint,
    imports,
    scripts,
    slim,
    wheels,
)
from packhorse.install.interpreter import Interpreter, worker_interpreter
from packhorse.install.log import Log
from packhorse.install.pip import Engine
from packhorse.progress import Progress
from packhorse.root import Root, State
from packhorse.session import Session
from packhorse.snapshot.index import Content, Index
from packhorse.snapshot.scan import Signature, scan, signature_of
from packhorse.transfer import arriving
from packhorse.watch import memory
from packhorse.watch.disk import Watch, usage

_LEAST_SPACE = 64 << 20
_PATIENCE = 30.0
"""Seconds that a finished installation waits for short commands that still use the environment before it."""


class InstallResult(msgspec.Struct):
    """What an installation did. Sizes are bytes; `installed` is False where everything was up to date.

    `root_bytes` is what the root holds at the end, `peak_root_bytes` at its largest, `os_disk_bytes` the growth
    of the OS disk outside the root; the last two are 0 where nothing was installed. `slim_files` and `slim_bytes`
    are what this installation left out by the slim profile.
    """

    fingerprint: str
    installed: bool
    distributions: int
    files: int
    bytes: int
    seconds: float
    root_bytes: int
    peak_root_bytes: int = 0
    os_disk_bytes: int = 0
    peak_rss_bytes: int = 0
    wheels: list[wheels.Override] = []
    imports: list[imports.ImportOutcome] = []
    slim_files: int = 0
    slim_bytes: int = 0
    log: str = ""


def install(
    root: Root,
    config: Config,
    environ: Mapping[str, str],
    progress: Progress,
    note: Callable[[str], None],
    *,
    reinstall: bool = False,
    on_wait: Callable[[str], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> InstallResult:
    """Make `packages/` what the configuration asks for, unless it is that already.

    `environ` is the environment that the worker would start from. `on_wait` is told who else is changing the
    root, if that must be waited for; `sleep` waits (seconds) between attempts at the network. Raises ConfigError
    where nothing is configured or a file is missing, NoSpaceError, and PackhorseError where pip or an import
    fails or a command uses the environment.
    """
    started = time.monotonic()
    if not config.environment.configured:
        raise ConfigError(
            "Nothing to install is configured.",
            "Add requirements, dependencies or wheels under [environment] in packhorse.toml; "
            "`packhorse init` writes one.",
        )
    config.environment.check_files()
    interpreter = worker_interpreter(config.environment.python, environ)
    if config.environment.lock:
        fingerprint.check_lock(config.environment, interpreter)
    wanted = fingerprint.fingerprint(config.environment, interpreter)
    with root.writing(on_wait):
        session.clean(root)
        root.remove_retired()  # of an installation that was killed after its exchange
        arriving.remove(root)
        if not reinstall and _up_to_date(root, wanted):
            result = InstallResult(wanted, False, *_counted(root.packages), 0.0, usage(root.path).bytes)
        else:
            result = _Installation(root, config, environ, interpreter, progress, note, sleep, reinstall).run(
                wanted
            )
    result.seconds = round(time.monotonic() - started, 3)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result.peak_rss_bytes = max(memory.peak(), children)
    return result


def check_imports(
    root: Root, config: Config, environ: Mapping[str, str], progress: Progress
) -> list[imports.ImportOutcome]:
    """Import each module of environment.verify as a worker would now. Raises PackhorseError where one fails."""
    interpreter = worker_interpreter(config.environment.python, environ)
    with Session(root) as own, contextlib.closing(Log(root.logs, own.id)) as log:
        return _checked(root, config, environ, interpreter, progress, own, log, root.packages)


def _checked(
    root: Root,
    config: Config,
    environ: Mapping[str, str],
    interpreter: Interpreter,
    progress: Progress,
    own: Session,
    log: Log,
    packages: Path,
) -> list[imports.ImportOutcome]:
    redirect.prepare(root)
    changed = redirect.changes(
        root,
        environ,
        tmp=own.tmp,
        build=own.build,
        app_path=config.run.app_path,
        packages=packages,
        keep_downloads=config.environment.keep_downloads,
    )
    outcomes = imports.check(
        config.environment.verify,
        interpreter=interpreter,
        environ=redirect.environment(environ, changed),
        directory=own.build,  # empty: a module must come from packages/, not from where packhorse was called
        log=log,
        packages=packages,
        before=lambda modules: progress.stage(f"importing {modules}"),
    )
    if any(outcome.failed for outcome in outcomes):
        kept = "" if packages == root.packages else " The environment before it stays in force."
        raise imports.failure(outcomes, kept, log.path)
    return outcomes


def _up_to_date(root: Root, wanted: str) -> bool:
    state = root.state()
    with os.scandir(root.packages) as entries:
        return (
            state.state in ("complete", "sparse")
            and state.fingerprint == wanted
            and any(True for _ in entries)
        )


def _counted(packages: Path) -> tuple[int, int, int]:
    """The distributions, files and bytes of a generation."""
    return (sum(1 for _ in wheels.distributions(packages)), *usage(packages))


class _Known(NamedTuple):
    signature: Signature
    content: Content


class _Installation:
    """One installation on its way; the root is held against other writers."""

    def __init__(
        self,
        root: Root,
        config: Config,
        environ: Mapping[str, str],
        interpreter: Interpreter,
        progress: Progress,
        note: Callable[[str], None],
        sleep: Callable[[float], None],
        reinstall: bool,
    ) -> None:
        self.reinstall = reinstall
        self.root, self.config, self.environ = root, config, environ
        self.interpreter, self.progress, self.note, self.sleep = interpreter, progress, note, sleep
        # Not where a pull rebuilds packages/: it goes on with what it finds there.
        self.staging = root.staging / "installed"

    def run(self, wanted: str) -> InstallResult:
        root = self.root
        root.require_space(_LEAST_SPACE, "an installation needs at least")
        with root.packages_unused() as unused:
            if not unused:
                raise _in_use(root)
        with Watch(root.path) as watch:
            with (
                _no_writer_left(root) as holding,
                Session(root) as own,
                contextlib.closing(Log(root.logs, own.id)) as log,
            ):
                atomic.remove_tree(root.staging)
                try:
                    os.makedirs(self.staging, mode=0o700)
                    index, known = self._known()
                    brought = self._bring(own, log, watch, holding)
                    saved = self._slim(log)
                    scripts.make_relocatable(self.staging, self.config.environment.python, root.path)
                    outcomes = _checked(
                        root,
                        self.config,
                        self.environ,
                        self.interpreter,
                        self.progress,
                        own,
                        log,
                        self.staging,
                    )
                    counted = _counted(self.staging)
                    self._put_in_force(wanted)
                    self._remember(index, known)
                finally:
                    atomic.remove_tree(root.staging)
            root_bytes, peak, os_disk = watch.summary()
        return InstallResult(
            wanted,
            True,
            *counted,
            seconds=0.0,
            root_bytes=root_bytes,
            peak_root_bytes=peak,
            os_disk_bytes=os_disk,
            wheels=brought,
            imports=outcomes,
            slim_files=sum(each.files for each in saved),
            slim_bytes=sum(each.bytes for each in saved),
            log=str(log.path),
        )

    def _bring(self, own: Session, log: Log, watch: Watch, holding: int) -> list[wheels.Override]:
        environment = self.config.environment
        engine = Engine(
            interpreter=self.interpreter,
            environ=self.environ,
            directory=self.config.file.parent if self.config.file else Path.cwd(),
            settings=self.config.network,
            session=own,
            log=log,
            watch=watch,
            progress=self.progress,
            note=log.noting(self.note),
            holding=holding,
            keep_downloads=environment.keep_downloads,
            sleep=self.sleep,
        )
        mark = (
            slim.mark(environment.slim_keep, environment.slim_remove) if environment.profile == "slim" else ""
        )
        return bring.bring(engine, environment, base=self._base(), mark=mark, staging=self.staging)

    def _known(self) -> tuple[Index, dict[bytes, _Known]]:
        """What the index knows of the packages in force, before linking changes their times (link(2): ctime)."""
        index = Index(self.root.index)
        known = {}
        if self._base() is not None:
            for found in scan(os.fsencode(self.root.path), [b"packages"]):
                digests = index.digests(found.path, found.signature)
                if found.kind == "file" and digests is not None:
                    known[found.path] = _Known(found.signature, (digests, found.mode))
        return index, known

    def _remember(self, index: Index, known: Mapping[bytes, _Known]) -> None:
        """Let the index know the files that were linked, so that the next push need not read them again."""
        for path, before in known.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                now = signature_of(os.lstat(os.path.join(os.fsencode(self.root.path), path)))
                if now.written_as(before.signature):
                    index.restored(path, now, before.content)
        index.save()

    def _base(self) -> Path | None:
        """The environment whose distributions can be used again."""
        state = self.root.state()
        fits = (state.soabi, state.platform) == (self.interpreter.soabi, self.interpreter.platform)
        return self.root.packages if state.state == "complete" and fits and not self.reinstall else None

    def _slim(self, log: Log) -> list[slim.Saved]:
        environment = self.config.environment
        if environment.profile != "slim":
            return []
        self.progress.stage("leaving out what no program needs")
        saved = slim.slim(self.staging, environment.slim_keep, environment.slim_remove)
        for each in saved:
            log.add(f"left out by the slim profile, {each.rule}: {each.files} files, {each.bytes} bytes")
        return saved

    def _put_in_force(self, wanted: str) -> None:
        root, before = self.root, self.root.state()
        self.progress.stage("flushing to the disk")
        atomic.flush(self.staging)
        with _once_unused(root, self.note):
            # Whoever finds this state finds whole packages of one of the two fingerprints, and asks no further.
            root.record(State(shared=before.shared))
            try:
                root.exchange_packages(self.staging)
            except BaseException:
                if self.staging.exists():  # not exchanged
                    root.record(before)
                raise
            root.record(
                State(
                    state="complete",
                    fingerprint=wanted,
                    soabi=self.interpreter.soabi,
                    platform=self.interpreter.platform,
                    shared=before.shared,
                    durable=True,
                )
            )
        root.remove_retired()


@contextlib.contextmanager
def _no_writer_left(root: Root) -> Iterator[int]:
    """A lock, as a descriptor for pip to inherit: it is had when no pip of a killed installation writes any more."""
    descriptor = os.open(root.private / "installing.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _once_unused(root: Root, note: Callable[[str], None]) -> Iterator[None]:
    """Hold `packages/` exclusively, with some patience for commands that are about to end."""
    deadline = time.monotonic() + _PATIENCE
    told = False
    while True:
        with root.packages_unused() as unused:
            if unused:
                yield
                return
        if time.monotonic() > deadline:
            raise _in_use(root)
        if not told:
            note(f"installed; waiting up to {_PATIENCE:.0f} s for a command that uses the environment before")
            told = True
        time.sleep(0.1)


def _in_use(root: Root) -> PackhorseError:
    return PackhorseError(
        f"The environment in {root.path} is in use by a running command.",
        "Stop it and install again, or install into another root with --root.",
    )
