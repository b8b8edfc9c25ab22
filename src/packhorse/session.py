"""Sessions: each invocation's own ephemeral directories, `tmp/<id>` and `build/<id>`, and their cleaning.

Promises that a living invocation's directories are never removed and a dead one's are, also after kill -9.
A session lives while its lock is held or its owner process lives; one of another host or boot counts as
alive until it gave no heartbeat for an hour (a network volume may be mounted on several hosts).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE
from packhorse.root import EPHEMERAL, Root, boot_id

SILENCE = 3600.0
"""Seconds without a heartbeat after which a session of another host or boot is taken for dead."""


class _Record(msgspec.Struct, frozen=True):
    host: str
    boot: str
    owner: int = 0
    owner_started: str = ""
    namespace: str = ""
    """The PID namespace in which `owner` is a number (pid_namespaces(7))."""


class Session:
    """One invocation's ephemeral directories; `descriptor` is its lock, to be inherited by a child."""

    def __init__(self, root: Root, *, owner: int = 0) -> None:
        """Create the directories. With `owner`, a process id, the session lives as long as that process."""
        self.root = root
        self.id = os.urandom(3).hex()  # short: a Unix socket's path in TMPDIR ends at 108 bytes (unix(7))
        self.tmp = root.tmp / self.id
        self.build = root.build / self.id
        self._file = root.sessions / self.id
        self.descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        record = _Record(os.uname().nodename, boot_id())
        if owner:
            record = msgspec.structs.replace(
                record, owner=owner, owner_started=_started(owner), namespace=_namespace()
            )
        os.write(self.descriptor, msgspec.json.encode(record))
        os.mkdir(self.tmp, 0o700)
        os.mkdir(self.build, 0o700)

    def heartbeat(self) -> None:
        """Tell other hosts that share the root that this session lives."""
        os.utime(self.descriptor)

    def empty(self) -> None:
        """Empty the directories; what cannot be removed stays."""
        for directory in (self.tmp, self.build):
            with contextlib.suppress(OSError):
                atomic.remove_tree(directory)
            os.makedirs(directory, 0o700, exist_ok=True)

    def release(self) -> None:
        """Leave the directories to the owner process."""
        os.close(self.descriptor)

    def close(self) -> None:
        """Remove the directories and whatever dead sessions left.

        Letting go of the lock makes this session a dead one; a child that still holds it keeps it alive.
        """
        os.close(self.descriptor)
        clean(self.root)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def shell() -> int:
    """The process whose end ends the shell that called us: the leader of its session, else our parent.

    The leader may be in another PID namespace (0) or gone.
    """
    leader = os.getsid(0)
    return leader if leader and leader != os.getpid() and _started(leader) else os.getppid()


def clean(root: Root) -> list[Path]:
    """Empty the ephemeral directories of all that belongs to no living session.

    A session's file is created before its directories, so what has no file is a leftover. Returns what could
    not be removed (a mount point, a file of another user): no reason to stop, the next clean tries again.
    """
    left = []
    listed = {name: set(os.listdir(root.path / name)) for name in EPHEMERAL}
    living = {file.name for file in root.sessions.iterdir() if _lives(file)}
    for name, entries in listed.items():
        for entry in entries - living:
            try:
                atomic.remove_tree(root.path / name / entry)
            except OSError:
                left.append(root.path / name / entry)
    for file in root.sessions.iterdir():
        if file.name not in living and not _lives(file):
            file.unlink(missing_ok=True)
    return left


def _lives(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        silent = time.time() - os.fstat(descriptor).st_mtime
        try:
            record = msgspec.json.decode(os.pread(descriptor, 4096, 0), type=_Record)
        except UNREADABLE:
            return silent < 60  # being written, or cut short by a crash
        if (record.host, record.boot) != (os.uname().nodename, boot_id()):
            return silent < SILENCE
        if record.owner:
            if record.namespace != _namespace():
                return silent < SILENCE
            return _started(record.owner) == record.owner_started != ""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        return True
    finally:
        os.close(descriptor)


def _started(process: int) -> str:
    """The start time of a process in clock ticks since boot (proc_pid_stat(5), field 22); "" if it is gone."""
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode()
    except (OSError, IndexError):
        return ""


def _namespace() -> str:
    """This process's PID namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
