"""The one place that replaces files and directories so that nobody sees half of them, that flushes, and that locks what is
read to be replaced.

Knows paths and system calls, nothing of roots or snapshots.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

RENAME_EXCHANGE = 1 << 1  # linux/fs.h
_REFUSED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def write_file(
    path: Path, content: bytes | Iterable[bytes], *, mode: int = 0o600, durable: bool = False
) -> None:
    """Replace `path` by a file with `content` (whole or in parts): a reader finds the old bytes or the new ones.

    `durable` waits until the disk has them. The file is created beside `path` and renamed (rename(2)).
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path` (flock(2)) against others, for what is read, changed and replaced meanwhile."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until all of the file system of `path` is on its disk (syncfs(2)). Raises OSError."""
    import ctypes

    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(descriptor)


def exchange(first: Path, second: Path) -> bool:
    """Swap two directories of one file system in one step: renameat2(2) with RENAME_EXCHANGE.

    Returns False, with nothing changed, where the kernel or the file system refuses it.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # glibc before 2.28
        return False
    at_fdcwd = -100
    if libc.renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _REFUSED:
        return False
    raise OSError(code, os.strerror(code), str(first))


def remove_tree(path: Path) -> None:
    """Remove a directory with all below it, or a file; what is not there is no error.

    Directories without write permission (Go's module cache has them) are opened up first, and what lies too deep for
    `shutil.rmtree`, which calls itself and opens a descriptor for each directory on its way down, is brought up. What
    `path` itself lies in stays as it is: raises PermissionError where that may not be written to.
    """
    import shutil

    def open_up(function: Callable[..., object], name: str, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError):
            return
        inside = Path(name) != path
        if not isinstance(error, PermissionError) or (function is os.rmdir and not inside):
            raise error
        if inside:
            os.chmod(os.path.dirname(name), stat.S_IRWXU)
        if os.path.isdir(name) and not os.path.islink(name):
            os.chmod(name, stat.S_IRWXU)
            remove_tree(Path(name))
        else:
            os.unlink(name)

    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            # `onexc` replaced `onerror` in 3.12; the older form is there until 3.14.
            shutil.rmtree(path, onerror=lambda f, n, e: open_up(f, n, e[1]))
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass
    except (RecursionError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EMFILE:
            raise
        _bring_up(path)
        remove_tree(path)


def _bring_up(top: Path) -> None:
    """Move every directory below `top` to just below it, whatever its name becomes."""
    pending = [os.fsencode(top)]
    while pending:
        directory = pending.pop()
        os.chmod(directory, stat.S_IRWXU)
        with os.scandir(directory) as listing:
            below = [item.path for item in listing if item.is_dir(follow_symlinks=False)]
        for path in below:
            os.chmod(path, stat.S_IRWXU)  # a directory that moves is written to
            place = os.path.join(os.fsencode(top), os.urandom(8).hex().encode())
            os.rename(path, place)
            pending.append(place)
