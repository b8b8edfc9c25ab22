"""The fingerprint of an environment: equal for equal requirements, wheels, Python and platform.

Promises that credentials neither change it nor can be guessed from it, and that where files lie, their order
of lines and their comments do not matter. Knows nothing of what is installed.
"""

from __future__ import annotations

import os

import msgspec
from blake3 import blake3

from packhorse.config import Environment, Wheel
from packhorse.errors import ConfigError
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
    document: dict[str, object] = {
        **_wanted(environment),
        "wheels": [_wheel(wheel) for wheel in environment.wheels],
        "profile": environment.profile,
        "python": interpreter.minor,
        "soabi": interpreter.soabi,
        "platform": interpreter.platform,
    }
    if environment.lock:
        document["lock"] = blake3(
            requirements.read_bytes(environment.lock, "Run `packhorse lock`")
        ).hexdigest()
    if environment.profile == "slim":
        document["slim"] = {
            "keep": sorted(environment.slim_keep),
            "remove": sorted(environment.slim_remove),
            "rules": RULES,
        }
    return blake3(msgspec.json.encode(document, order="sorted")).hexdigest()


def requirements_digest(environment: Environment, interpreter: Interpreter) -> str:
    """BLAKE3 (hex) of what a lock file is made from: the requirements and wheels, for a Python and a platform."""
    document = {
        **_wanted(environment),
        "python": interpreter.minor,
        "platform": interpreter.platform,
    }
    if environment.wheels:
        document["wheels"] = [_wheel(wheel) for wheel in environment.wheels]
    return blake3(msgspec.json.encode(document, order="sorted")).hexdigest()


def check_lock(environment: Environment, interpreter: Interpreter) -> None:
    """Raise ConfigError where the lock file was made for other requirements than are configured.

    A lock file of another tool tells nothing of that, and is taken as it is.
    """
    if not environment.lock:
        raise ConfigError(
            "No lock file is configured.",
            'Run `packhorse lock`, and name the file: lock = "pylock.toml" under [environment].',
        )
    from packhorse.install import lock

    made_for = lock.requirements_of(environment.lock)
    if made_for and made_for != requirements_digest(environment, interpreter):
        raise ConfigError(
            f"{environment.lock} was made for other requirements, or for another Python or platform.",
            "Run `packhorse lock`.",
        )


def _wanted(environment: Environment) -> dict[str, object]:
    lines = {(line.kind, _plain(line.text)) for line in requirements.lines(environment.requirements)}
    return {
        "requirements": sorted(lines),
        "dependencies": sorted({_plain(line.text) for line in requirements.asked(environment.dependencies)}),
    }


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
