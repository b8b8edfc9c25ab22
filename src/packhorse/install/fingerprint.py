"""The fingerprint of an environment: equal for equal requirements, wheels, Python and platform.

Promises that credentials neither change it nor can be guessed from it, and that where files lie, their order
of lines and their comments do not matter. Knows nothing of what is installed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from packhorse.config import Environment, Wheel
from packhorse.errors import ConfigError
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import without_credentials
from packhorse.install.slim_rules import RULES

_COMMENT = re.compile(r"(^|\s+)#.*$", re.MULTILINE)
_INCLUDE = re.compile(r"(?:(-r|-c)\s*|(--requirement|--constraint)(?:\s+|\s*=\s*))(\S.*)")


def fingerprint(environment: Environment, interpreter: Interpreter) -> str:
    """BLAKE3 (hex) of what decides the content of `packages/`; "" where nothing is configured.

    Raises ConfigError where a file that counts cannot be read.
    """
    if not environment.configured:
        return ""
    lines = {line for path in environment.requirements for line in _lines(path, "requirement", set())}
    document: dict[str, object] = {
        "requirements": sorted(lines),
        "dependencies": sorted({_plain(line) for line in environment.dependencies}),
        "wheels": [_wheel(wheel) for wheel in environment.wheels],
        "profile": environment.profile,
        "python": interpreter.minor,
        "soabi": interpreter.soabi,
        "platform": interpreter.platform,
    }
    if environment.profile == "slim":
        document["slim"] = {
            "keep": sorted(environment.slim_keep),
            "remove": sorted(environment.slim_remove),
            "rules": RULES,
        }
    return blake3(msgspec.json.encode(document, order="sorted")).hexdigest()


def _lines(path: str, kind: str, seen: set[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The lines of a requirements file and of those it includes, each with "requirement" or "constraint"."""
    if (path, kind) in seen:
        return
    seen.add((path, kind))
    for line in _COMMENT.sub("", re.sub(r"\\\r?\n", "", _read(path))).splitlines():
        text = _plain(line)
        include = _INCLUDE.fullmatch(text)
        if include is None:
            if text:
                yield kind, text
            continue
        target = _unquoted(include[3])
        included = "constraint" if (include[1] or include[2]) in ("-c", "--constraint") else kind
        if "://" in target:
            yield included, target
        else:
            yield from _lines(os.path.join(os.path.dirname(path), target), included, seen)


def _plain(line: str) -> str:
    return " ".join(without_credentials(line).split())


def _unquoted(text: str) -> str:
    try:
        return shlex.split(text)[0]
    except (ValueError, IndexError):
        return text


def _read(path: str) -> str:
    content = _bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read: {error.strerror}.",
        "Create it, or correct what names it: [environment] in the configuration or a requirements file.",
    )


def _wheel(wheel: Wheel) -> dict[str, object]:
    from packaging.utils import canonicalize_name

    name = canonicalize_name(wheel.name)
    facts: dict[str, object] = {"name": name, "version": wheel.version}
    if wheel.url:
        facts["url"] = without_credentials(wheel.url)
    if wheel.path:
        facts["digest"] = blake3(_bytes(wheel.path)).hexdigest()
    if wheel.find_links:
        facts["find-links"] = [_links(link, name) for link in wheel.find_links]
    return facts


def _links(link: str, name: str) -> str | list[str]:
    """A URL, or what a directory offers of `name`, since its path does not count."""
    if "://" in link:
        return without_credentials(link)
    from packaging.utils import canonicalize_name

    try:
        files = os.listdir(link)
    except OSError as error:
        raise _unreadable(link, error) from error
    return sorted(file for file in files if canonicalize_name(file.partition("-")[0]) == name)
