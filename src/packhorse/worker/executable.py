"""Which file the name of a command stands for, whether the kernel would wait for it, and in what words it is told that there
is none or that it does not start."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping

from packhorse.errors import CannotStartError, CommandNotFoundError

_DEEPEST = 7
"""Files that execve(2) opens one for the other at most: scripts that run scripts, a program, its loader."""
_FIRST_LINE = 256
"""Bytes of a file that the kernel looks at (execve(2), "Interpreter scripts")."""
_LONGEST_PATH = 4096
_PT_INTERP = b"\3\0\0\0"  # elf(5)


def find_executable(name: str, environ: Mapping[str, str]) -> str:
    """The file that `name` stands for on the PATH of `environ`, as execvp(3) finds it.

    Raises CommandNotFoundError, or CannotStartError where there is one but it may not be executed.
    """
    if not name:
        raise CommandNotFoundError("The command is empty.", "Give one after `--`.")
    if "/" in name:
        candidates = [name]
    else:
        search = environ.get("PATH", os.defpath)
        candidates = [os.path.join(directory, name) for directory in search.split(os.pathsep)]
    refused = ""
    for candidate in candidates:
        if os.path.isfile(candidate):
            if os.access(candidate, os.X_OK):
                return candidate
            refused = refused or candidate
    if refused:
        import shlex

        raise CannotStartError(
            f'exec: "{refused}": permission denied.',
            f"Make it executable with `chmod +x {shlex.quote(refused)}`.",
        )
    if "/" not in name:
        raise CommandNotFoundError(
            f'exec: "{name}": executable file not found in $PATH.',
            "Check its name, or that the environment installs it.",
        )
    if os.path.isdir(name):
        raise CannotStartError(f'exec: "{name}": is a directory.', "Give the path of a file.")
    raise CommandNotFoundError(f'exec: "{name}": no such file or directory.', "Check its path.")


def held_back(executable: str) -> bool:
    """Whether execve(2) of a file would wait, since a lease (fcntl(2)) is on it, on the interpreter in its first line, or on
    the loader of either. Whoever has the lease hears that the file is wanted."""
    opened = os.fsencode(executable)
    for _ in range(_DEEPEST):
        try:
            descriptor = os.open(opened, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except BlockingIOError:
            return True
        except OSError:
            return False  # execve(2) tells why
        try:
            opened = _opened_next(descriptor).partition(b"\0")[0]
        except (OSError, OverflowError):  # a directory, or a program whose header is noise
            return False
        finally:
            os.close(descriptor)
        if not opened:
            return False
    return False


def _opened_next(descriptor: int) -> bytes:
    """What the kernel opens to execute this file: the interpreter of a script, the loader of a program; else nothing."""
    head = os.pread(descriptor, _FIRST_LINE, 0)
    if head.startswith(b"#!"):
        words = head[2:].partition(b"\n")[0].split()
        return words[0] if words else b""
    if not head.startswith(b"\x7fELF\x02\x01") or len(head) < 64:  # 64 bits, little-endian
        return b""
    (at,), (size, count) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<HH", head, 54)
    for number in range(count):
        header = os.pread(descriptor, 40, at + number * size)
        if len(header) == 40 and header.startswith(_PT_INTERP):
            offset, length = struct.unpack_from("<8xQ16xQ", header)
            return os.pread(descriptor, min(length, _LONGEST_PATH), offset)
    return b""


def cannot_start(name: str, executable: str, error: OSError) -> CannotStartError:
    """Why the file that was found for `name` could not be executed (execve(2)), and what to do."""
    remedy = "Check what the file is and who may execute it."
    if error.errno == errno.ENOENT:
        remedy = "The interpreter in its first line, or the loader it was linked for, is not there."
    elif error.errno == errno.ENOEXEC:
        remedy = (
            "It is no program for this machine; if it is a script, begin it with a line like `#!/bin/sh`."
        )
    elif error.errno == errno.E2BIG:
        remedy = "Its arguments and environment are too long."
    return CannotStartError(f'exec: "{executable}": {(error.strerror or name).lower()}.', remedy)
