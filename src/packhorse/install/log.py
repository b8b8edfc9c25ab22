"""The log of one installation: all output of pip and of the import check, without credentials.

Promises that what it keeps and hands out holds no credentials of URLs, and that only the newest logs stay.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from packhorse import atomic

KEEP = 10
_SHOWN = 15

_USER = re.compile(r"(?<=://)[^/?#\s]*@")  # RFC 3986, section 3.2.1
_SIGNED = re.compile(
    r"(?<=[?&])(x-amz-[\w-]+|x-goog-[\w-]+|awsaccesskeyid|key-pair-id|policy|expires|se|st|auth"
    r"|[\w-]*(?:sig|signature|token|secret|passw|credential|key)[\w-]*)=[^&#\s'\"]*",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """`text` with the user part and the signing parameters of every URL taken out."""
    return without_signature(_USER.sub("", text))


def without_signature(text: str) -> str:
    """`text` with the signing parameters of every URL taken out."""
    return _SIGNED.sub(r"\1=", text)


class Log:
    """A file in `directory` that lines are added to."""

    def __init__(self, directory: Path, identity: str) -> None:
        """`identity` tells apart the logs of one second. Removes all but the newest logs of installations."""
        for name in sorted(name for name in os.listdir(directory) if name.startswith("install-"))[: 1 - KEEP]:
            atomic.remove_tree(directory / name)
        self.path = directory / f"install-{time.strftime('%Y%m%d-%H%M%S')}-{identity}.log"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace", buffering=1)
        self._last: deque[str] = deque(maxlen=_SHOWN)

    def add(self, line: str) -> str:
        """Add a line; returns it without its credentials."""
        line = without_credentials(line.rstrip())
        self._file.write(line + "\n")
        if line.strip():
            self._last.append(line)
        return line

    def noting(self, note: Callable[[str], None]) -> Callable[[str], None]:
        """`note`, with all that it is told in the log as well."""

        def both(text: str) -> None:
            self.add(text)
            note(text)

        return both

    def begin(self, command: Sequence[str]) -> None:
        """Note that a command begins, whose lines are the last ones from now on."""
        self._last.clear()
        self._file.write(f"$ {without_credentials(' '.join(command))}\n")

    @property
    def last_lines(self) -> str:
        """The last lines of the last command, indented."""
        return "\n".join(f"    {line}" for line in self._last)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
