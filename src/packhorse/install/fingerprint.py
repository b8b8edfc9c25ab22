"""The fingerprint of an environment: equal for equal requirements, wheels, Python and platform.

Promises that credentials neither change it nor can be guessed from it, and that where files lie, their order
of lines and their comments do not matter. Knows nothing of what is installed.
"""

from __future__ import annotations

import os

import msgspec
from blake3 import blake3

from packhorse.config import Environment, Wheel
from packhorse.install import requirements
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import without_credentials
from packhorse.install.slim_rules import RULES


def fingerprint(environment: Environment, interpreter: Interpreter) -> str:
    """BLAKE3 (hex) of what decides the content of `packages/`; "" where nothing is configured.

    Raises ConfigError where a file that counts cannot be read.
    """
    if not environment.configured:
        return ""
    lines = {(line.kind, _plain(line.text)) for line in requirements.lines(environment.requirements)}
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


def _plain(line: str) -> str:
    return " ".join(without_credentials(line).split())


def _wheel(wheel: Wheel) -> dict[str, object]:
    from packaging.utils import canonicalize_name

    name = canonicalize_name(wheel.name)
    facts: dict[str, object] = {"name": name, "version": wheel.version}
    if wheel.url:
        facts["url"] = without_credentials(wheel.url)
    if wheel.path:
        facts["digest"] = blake3(requirements.read_bytes(wheel.path)).hexdigest()
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
        raise requirements.unreadable(link, error) from error
    return sorted(file for file in files if canonicalize_name(file.partition("-")[0]) == name)
