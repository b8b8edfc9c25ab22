"""What a profile is called: a name for a command that people recognise, and that only its words decide.

Of the command itself nothing more than the program and its script or module is told: arguments may hold secrets.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_PYTHON = re.compile(r"(?:python|pypy)[\d.]*t?")
_WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")
"""Options of Python that have a value in the next word."""
_LONGEST = 24
"""Characters of each word in a name."""


def name_of(command: Sequence[str]) -> str:
    """The name for `command`, the same wherever its program and script lie: `python-handler.py-1f0c9a4e`."""
    words = [os.path.basename(command[0]), *command[1:]]
    digest = hashlib.blake2b(b"\0".join(map(os.fsencode, words)), digest_size=4).hexdigest()
    parts = [
        re.sub(r"[^A-Za-z0-9._]+", "_", word)[:_LONGEST].strip("._-") for word in shown(command).split(" ")
    ]
    return "-".join([*filter(None, parts), digest])


def shown(command: Sequence[str]) -> str:
    """The program and, where that is Python, its script or module: `python handler.py`."""
    command = [word.encode(errors="backslashreplace").decode() for word in command]  # arguments are bytes
    program = os.path.basename(command[0])
    if not _PYTHON.fullmatch(program):
        return program
    words = iter(command[1:])
    for word in words:
        if word in _WITH_VALUE:
            next(words, "")
        elif word.startswith("-") and not word.startswith("--") and word[-1:] == "m":
            return f"{program} {next(words, '')}".strip()
        elif word.startswith("-") and not word.startswith("--") and word[-1:] == "c":
            return program
        elif not word.startswith("-"):
            return f"{program} {os.path.basename(word)}"
    return program
