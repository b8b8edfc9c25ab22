"""The status file of `run` and `profile`, and the result files from which it learns what their processes did."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from packhorse import atomic
from packhorse.errors import UNREADABLE, ConfigError


class Status:
    """The status file, replaced at each change of phase."""

    def __init__(self, file: Path | None, warn: Callable[[str], None]) -> None:
        self._file = file
        self._warn = warn
        self._since = time.monotonic()
        self.facts: dict[str, Any] = {
            "phase": "",
            "pid": None,
            "exit_code": None,
            "boot": None,
            "restoring": False,
            "backup": None,
            "seconds": {},
        }

    def enter(self, phase: str) -> None:
        """Begin a phase. Raises ConfigError where the file cannot be written for the first one."""
        now = time.monotonic()
        if before := self.facts["phase"]:
            self.facts["seconds"][before] = round(now - self._since, 3)
        self.facts["phase"] = phase
        self._since = now
        try:
            self.write()
        except OSError as error:
            if not before:
                raise ConfigError(
                    f"The status file {self._file} cannot be written: {error.strerror}.",
                    "Choose another with --status-file.",
                ) from error
            self._warn(f"the status file cannot be written: {error.strerror}")

    def write(self) -> None:
        """Replace the file."""
        if self._file is not None:
            if os.path.exists(self._file) and not os.path.isfile(self._file):
                raise OSError(errno.EINVAL, "it is a device or a pipe, which is not to be replaced")
            if _is_output(self._file):  # such as /dev/stdout
                raise OSError(errno.EINVAL, "it is where stdout or stderr goes, which is not to be replaced")
            content = msgspec.json.format(msgspec.json.encode(self.facts)) + b"\n"
            atomic.write_file(self._file, content, mode=0o644)


def _is_output(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(os.path.samestat(os.stat(file), os.fstat(descriptor)) for descriptor in (1, 2))
    return False


def read_facts(result: Path) -> dict[str, Any] | None:
    """What a process of packhorse's own left in its result file, which is removed."""
    try:
        facts: dict[str, Any] = msgspec.json.decode(result.read_bytes(), type=dict[str, Any])
        result.unlink()
    except (OSError, *UNREADABLE):
        return None
    return facts
