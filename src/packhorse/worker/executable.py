"""Which file the name of a command stands for, and in what words it is told that there is none or that it does not start."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from packhorse.errors import CannotStartError, CommandNotFoundError


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
        raise CannotStartError(
            f'exec: "{refused}": permission denied.', f"Make it executable with `chmod +x {refused}`."
        )
    if "/" not in name:
        raise CommandNotFoundError(
            f'exec: "{name}": executable file not found in $PATH.',
            "Check its name, or that the environment installs it.",
        )
    if os.path.isdir(name):
        raise CannotStartError(f'exec: "{name}": is a directory.', "Give the path of a file.")
    raise CommandNotFoundError(f'exec: "{name}": no such file or directory.', "Check its path.")


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
