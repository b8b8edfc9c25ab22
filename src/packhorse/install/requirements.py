"""Requirements files, read as pip reads them: their lines, with those of the files they include.

Promises to leave the lines as they are, credentials included. Knows nothing of what they mean to a resolver.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from packhorse.errors import ConfigError

_COMMENT = re.compile(r"(^|\s+)#.*$", re.MULTILINE)
_INCLUDE = re.compile(r"(?:(-r|-c)\s*|(--requirement|--constraint)(?:\s+|\s*=\s*))(\S.*)")
_SOURCES = re.compile(
    r"(-i|-f|--(index-url|extra-index-url|find-links|no-index|trusted-host|no-binary|only-binary|pre|prefer-binary)\b)"
)
_LINKS = re.compile(r"(-f\s*|--find-links(?:\s+|\s*=\s*))(\S.*)")


class Line(NamedTuple):
    """A line with its spaces made single; `kind` is "requirement" or "constraint", `file` where it stands."""

    kind: str
    text: str
    file: str


def lines(paths: Iterable[str]) -> Iterator[Line]:
    """The lines that count, of all these files. Raises ConfigError where one cannot be read."""
    seen: set[tuple[str, str]] = set()
    for path in paths:
        yield from _lines(path, "requirement", seen)


def sources(found: Iterable[Line]) -> list[str]:
    """The lines that say where packages come from, with paths that hold from any file."""
    return [_from_anywhere(line) for line in found if _SOURCES.match(line.text)]


def _from_anywhere(line: Line) -> str:
    links = _LINKS.fullmatch(line.text)
    beside = os.path.join(os.path.dirname(line.file), _unquoted(links[2])) if links else ""
    return f"--find-links {shlex.quote(beside)}" if links and os.path.exists(beside) else line.text


def _lines(path: str, kind: str, seen: set[tuple[str, str]]) -> Iterator[Line]:
    if (path, kind) in seen:
        return
    seen.add((path, kind))
    for line in _COMMENT.sub("", re.sub(r"\\\r?\n", "", _read(path))).splitlines():
        text = " ".join(line.split())
        include = _INCLUDE.fullmatch(text)
        if include is None:
            if text:
                yield Line(kind, text, path)
            continue
        target = _unquoted(include[3])
        included = "constraint" if (include[1] or include[2]) in ("-c", "--constraint") else kind
        if "://" in target:
            yield Line(included, target, path)
        else:
            yield from _lines(os.path.join(os.path.dirname(path), target), included, seen)


def _unquoted(text: str) -> str:
    try:
        return shlex.split(text)[0]
    except (ValueError, IndexError):
        return text


def _read(path: str) -> str:
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_bytes(path: str) -> bytes:
    """A file that the configuration or a requirements file names. Raises ConfigError where that fails."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: OSError) -> ConfigError:
    """For what is named but cannot be read."""
    return ConfigError(
        f"{path} cannot be read: {error.strerror}.",
        "Create it, or correct what names it: [environment] in the configuration or a requirements file.",
    )
