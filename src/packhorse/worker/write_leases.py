"""Write leases (fcntl(2), "Leases"): whoever opens a file waits in the kernel until its holder lets go.

Promises that `probe` tells beforehand where that does not hold. A lease belongs to the open file description: it ends
when the last copy of the descriptor is closed, in whatever process. Knows nothing of what the files are.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import tempfile
from pathlib import Path

SHORTEST_BREAK = 8.0
"""Seconds; with less before the kernel lets an opener through, there is no time to see to it (`Gate`)."""
WANTED = signal.SIGRTMIN + 1
"""The signal by which a restorer learns that files are wanted; blocked in all its threads."""
SIGNALS = (WANTED, signal.SIGIO)
"""What a process that hears of openers waits for; SIGIO comes instead where too many signals are queued (fcntl(2))."""
_F_SETSIG = 10  # linux/fcntl.h; Python has it from 3.14 on
_NR_OPEN = 1 << 20  # what fs.nr_open is where nobody changed it


def take(descriptor: int, process: int, number: int) -> None:
    """Lease the file behind a descriptor that is the only one open on it.

    When somebody wants the file the signal `number` is sent to `process`. Raises OSError: EAGAIN where somebody else
    has it open, EINVAL where the file system has no leases, EACCES where the file belongs to somebody else.
    """
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, process)
    fcntl.fcntl(descriptor, _F_SETSIG, number)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)


def most_open_files() -> int:
    """How many files this process may have open, after its limit (RLIMIT_NOFILE) was raised as far as it may be.

    Never infinite: above fs.nr_open the kernel opens nothing, whatever the limit says (proc_sys_fs(5)).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    highest = int(_setting("nr_open")) or _NR_OPEN
    return highest if soft == resource.RLIM_INFINITY else min(soft, highest)


def wait() -> None:
    """Until somebody wants a file. One look serves all who want one by then: a signal is left for none of them."""
    signal.sigwait(SIGNALS)
    while signal.sigtimedwait(SIGNALS, 0) is not None:
        pass


def wanted(descriptor: int) -> bool:
    """Whether somebody waits for the file (or the lease is no longer there)."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK


def renew(descriptor: int, process: int, number: int) -> bool:
    """Let go of a lease and take it again, so that the kernel's clock for whoever wants the file starts anew.

    Only while all who may want the file are stopped: who waits in open(2) counts as having it open. False where somebody
    else does; the lease is as it was then, unless that one came in this very moment.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # refused while somebody waits
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)  # at once: nothing holds the file back here
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, process)  # letting go forgot them
        fcntl.fcntl(descriptor, _F_SETSIG, number)
    except OSError:
        return False
    return True


def break_time() -> float:
    """Seconds after which the kernel takes a lease away that somebody waits for (proc_sys_fs(5))."""
    return _setting("lease-break-time")


def _setting(name: str) -> float:
    """One of /proc/sys/fs; 0 where it cannot be read."""
    try:
        with open(f"/proc/sys/fs/{name}", encoding="ascii") as file:
            return float(file.read())
    except (OSError, ValueError):
        return 0.0


def probe(directory: Path) -> str:
    """Why files of `directory` cannot be held back from those who open them; nothing where they can."""
    if break_time() < SHORTEST_BREAK:
        return f"the kernel ends leases after {break_time():.0f} s (fs.lease-break-time)"
    unheard = os.getpid(), signal.SIGURG  # ignored by default
    try:
        descriptor, path = tempfile.mkstemp(prefix=".lease-", dir=directory)
    except OSError as error:
        return f"a file cannot be made in {directory}: {error.strerror}"
    try:
        take(descriptor, *unheard)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise
        else:
            return "the file system lets openers through leases"
        if not wanted(descriptor) or not renew(descriptor, *unheard) or wanted(descriptor):
            return "leases of the file system cannot be renewed"
    except OSError as error:
        return f"the file system has no leases: {error.strerror}"
    finally:
        os.unlink(path)
        os.close(descriptor)
    return ""
