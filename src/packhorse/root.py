"""The root: six directories, the lock files, the recorded state, and the exchange of `packages/`.

Promises that `packages/` is exchanged whole, never while somebody uses it, and that whoever opens a root
after a crash finds the old environment or the new one. Knows neither stores nor engines.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE, ConfigError, NoSpaceError, PackhorseError, is_full

SHARED = ("pip", "models", "deps")
PERSISTENT = ("packages", *SHARED)
EPHEMERAL = ("tmp", "build")
PRIVATE = ".packhorse"
"""Locks, logs, the index and generations that are not in force; inside the root, never in a snapshot."""


class State(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a root, recorded before it changes.

    `state` is one of empty, partial, sparse, complete. `fingerprint`, `soabi` and `platform` tell what made
    `packages/`; `manifest` is the digest of the packages manifest it equals ("" while it was never pushed),
    `shared` those of the shared manifests restored, `snapshot` the id of the whole. `boot` is the kernel's
    boot id when the state was written: after another boot unflushed bytes may be lost, unless `durable`. `gpus` are
    compute capabilities (90 for 9.0): `packages/` may lack code that none of these needs; with none it lacks nothing.
    """

    state: str = "empty"
    fingerprint: str = ""
    soabi: str = ""
    platform: str = ""
    manifest: str = ""
    shared: tuple[str, ...] = ()
    snapshot: str = ""
    gpus: tuple[int, ...] = ()
    boot: str = ""
    durable: bool = False


class Root:
    """One root directory. Open it with `Root.open`; the attributes are paths inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.packages = path / "packages"
        self.pip = path / "pip"
        self.models = path / "models"
        self.deps = path / "deps"
        self.tmp = path / "tmp"
        self.build = path / "build"
        self.private = path / PRIVATE
        self.logs = self.private / "logs"
        self.sessions = self.private / "sessions"
        self.staging = self.private / "next"
        self.retired = self.private / "previous"
        self.site = self.private / "site"
        self.index = self.private / "index"

    @classmethod
    def open(cls, path: Path) -> Root:
        """The root at `path`, created private (0700) if it is not there, with a broken exchange put right.

        Raises ConfigError where the path belongs to somebody else, is reached through somebody else's
        symbolic link, or can be written by others; NoSpaceError and PackhorseError where it cannot be made.
        """
        root = cls(Path(os.path.abspath(path)))
        refuse_foreign_links(root.path)
        try:
            os.makedirs(root.path.parent, exist_ok=True)
            private_directory(root.path)
            root._refuse_what_cleaning_would_destroy()
            for name in (*PERSISTENT, *EPHEMERAL, PRIVATE):
                if name == "packages" and root._exchange_journal.exists():
                    continue
                private_directory(root.path / name)
            for directory in (root.logs, root.sessions, root.site):
                private_directory(directory)
        except OSError as error:
            raise _cannot_create(root.path, error) from error
        refuse_foreign_links(root.path)  # again: until the directory was there, a link could be slipped in
        if root._exchange_journal.exists():
            with root.writing():
                pass
        return root

    def _refuse_what_cleaning_would_destroy(self) -> None:
        """A directory that packhorse never used may hold a tmp/ or build/ of its own; ours are emptied."""
        if self.private.exists():
            return
        for name in EPHEMERAL:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.listdir(self.path / name):
                    raise ConfigError(
                        f"{self.path} is not a root of packhorse, and its {name}/ is not empty: packhorse would "
                        "empty it.",
                        "Choose a directory of its own for the root, with --root or PACKHORSE_ROOT.",
                    )

    # --- state ---

    @property
    def _state_file(self) -> Path:
        return self.private / "state.json"

    def state(self) -> State:
        """The recorded state; an unreadable record counts as empty, so that everything is checked again."""
        try:
            return msgspec.json.decode(self._state_file.read_bytes(), type=State)
        except (FileNotFoundError, *UNREADABLE):
            return State()

    def record(self, state: State) -> None:
        """Replace the recorded state, stamped with this boot; waits for whoever holds `recording`."""
        with self.recording() as record:
            record(state)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Callable[[State], None]]:
        """Hold what is recorded of the root, for a moment, against others that change it, and yield what `record` does. Not
        the lock of `writing`, which a pull holds as long as it takes."""
        with atomic.locked(self.private / "record.lock"):
            yield self._record

    def _record(self, state: State) -> None:
        stamped = msgspec.structs.replace(state, boot=boot_id())
        atomic.write_file(self._state_file, msgspec.json.encode(stamped))

    # --- locks ---

    @contextlib.contextmanager
    def writing(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the root against every other packhorse that wants to change it (flock(2)).

        Waits for the holder after calling `on_wait` once with its description. Puts a broken exchange right.
        """
        descriptor = os.open(self.private / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                if on_wait is not None:
                    on_wait(
                        os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another packhorse"
                    )
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()}\n".encode(), 0)
            self._finish_exchange()
            yield
        finally:
            os.close(descriptor)

    def use_packages(self, *, reading: bool = False) -> int:
        """A descriptor whose shared lock keeps `packages/` from being exchanged; close it to let go.

        A child that inherits it goes on holding the lock when its parent is killed. Who is only `reading` can also
        use a root that is mounted read-only.
        """
        try:
            descriptor = self._packages_lock()
        except OSError as error:
            if not reading or error.errno != errno.EROFS:
                raise
            descriptor = os.open(self.private / "packages.lock", os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    @contextlib.contextmanager
    def packages_unused(self) -> Iterator[bool]:
        """Hold the exclusive lock on `packages/`, if nobody uses them: yields whether it could be had.

        Waits for others who only look, or exchange: they are no users.
        """
        with atomic.locked(self.private / "packages.turn"):
            descriptor = self._packages_lock()
            try:
                yield _try_lock(descriptor, fcntl.LOCK_EX)
            finally:
                os.close(descriptor)

    def _packages_lock(self) -> int:
        return os.open(self.private / "packages.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    # --- generations ---

    @property
    def _exchange_journal(self) -> Path:
        return self.private / "exchange"

    def exchange_packages(self, staging: Path) -> None:
        """Make `staging` (inside the root) the new `packages/`; the old one becomes `retired`.

        The caller holds `writing` and `packages_unused`, and calls `remove_retired` when all is recorded.
        """
        atomic.remove_tree(self.retired)
        # Renamed before, not after, so that whatever stops us `staging` never names the old generation.
        os.rename(staging, self.retired)
        if atomic.exchange(self.retired, self.packages):
            return
        os.rename(self.retired, staging)
        atomic.write_file(
            self._exchange_journal, os.fsencode(os.path.relpath(staging, self.path)), durable=True
        )
        os.rename(self.packages, self.retired)
        self._finish_exchange()

    def _finish_exchange(self) -> None:
        try:
            staging = self.path / os.fsdecode(self._exchange_journal.read_bytes())
        except FileNotFoundError:
            return
        # `packages/` may be there, but empty, while its old content is retired: whoever opens a root creates
        # what is missing. rename(2) replaces an empty directory.
        if staging.exists() and self.retired.exists():
            os.rename(staging, self.packages)
        elif not self.packages.exists():
            os.rename(self.retired, self.packages)
        self._exchange_journal.unlink()

    def remove_retired(self) -> None:
        """Remove the generation that was in force before the last exchange."""
        atomic.remove_tree(self.retired)

    # --- space ---

    @property
    def block(self) -> int:
        """The bytes that a small file takes on the root's disk, or fewer: some network file systems count in units that are
        larger than what they give out."""
        return min(os.statvfs(self.path).f_frsize, 4096) or 4096

    def require_space(self, needed: int, purpose: str, inodes: int = 0, *, margin: int = 0) -> None:
        """Raise NoSpaceError unless `needed` bytes, `margin` bytes beside them, and `inodes` are free on the root's disk;
        `purpose` ("the snapshot needs") begins the half of the sentence that ends with what is needed."""
        usage = os.statvfs(self.path)
        free = usage.f_bavail * usage.f_frsize
        if needed + margin > free:
            kept = f", and {margin / 1e6:,.0f} MB are kept free" if margin else ""
            raise NoSpaceError(
                f"{self.path} has {free / 1e6:,.0f} MB free, but {purpose} {needed / 1e6:,.0f} MB{kept}.",
                "Free some space, or choose a root on a larger disk with --root.",
            )
        if inodes > usage.f_favail and usage.f_files:  # without a limit all of these are 0
            raise NoSpaceError(
                f"{self.path} has room for {usage.f_favail:,} more files, but {purpose} {inodes:,}.",
                "Remove some files, or choose a root on another disk with --root.",
            )

    @cached_property
    def on_os_disk(self) -> bool:
        """Whether the root lies on the file system of `/`."""
        return os.stat(self.path).st_dev == os.stat("/").st_dev


def boot_id() -> str:
    """The kernel's id of this boot (random(4), /proc/sys/kernel/random/boot_id)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return f"unknown-{time.time_ns()}"  # never equal: everything is checked again


def flushed_file(index: Path) -> Path:
    """Where it stands what the disk has of that of which an index tells."""
    return index.with_name(index.name + ".flushed")


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def private_directory(path: Path) -> None:
    """Create a directory for this user alone (0700), or check that one that is there is not open to others.

    Raises ConfigError, OSError.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    status = os.stat(path)
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{path} is not a directory.", "Remove it, or choose another root with --root.")
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to user {status.st_uid}, not to you (user {os.geteuid()}).",
            "Choose a root of your own with --root or PACKHORSE_ROOT.",
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path} can be written by other users, who could slip code into your environment.",
            f"Run `chmod go-w {path}`, or choose another root with --root.",
        )


def refuse_foreign_links(path: Path) -> None:
    """Refuse a path that somebody else could redirect: a symbolic link of another user (root's are trusted)."""
    for component in (path, *path.parents):
        try:
            status = os.lstat(component)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _cannot_create(path, error) from error
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in (0, os.geteuid()):
            raise ConfigError(
                f"{component} is a symbolic link that belongs to user {status.st_uid}, not to you.",
                "Choose a root that no other user can redirect, with --root or PACKHORSE_ROOT.",
            )


def _cannot_create(path: Path, error: OSError) -> PackhorseError:
    if is_full(error):
        return NoSpaceError(
            f"The disk of {path} is full.", "Free some space, or choose another root with --root."
        )
    return ConfigError(
        f"The root {path} cannot be used: {error.strerror}.",
        "Choose another root with --root or PACKHORSE_ROOT.",
    )
