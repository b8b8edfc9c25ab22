"""`--locked`: whether the lock file is there and says what the requirements ask for.

Promises an error and no change. Lock files of other tools, which do not tell what they were made from, are held against
the requirements one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

from packhorse.config import Environment
from packhorse.errors import ConfigError
from packhorse.install import fingerprint, lock, requirements
from packhorse.install.interpreter import worker_interpreter
from packhorse.install.log import without_credentials
from packhorse.install.requirements import Line


def require(environment: Environment, environ: Mapping[str, str]) -> None:
    """Raise ConfigError unless a lock file is configured, and fits the requirements and the worker's Python."""
    interpreter = worker_interpreter(environment.python, environ)
    fingerprint.check_lock(environment, interpreter)
    target = lock.target(interpreter, environ)
    has = {each.name: each.version for each in lock.chosen_by(environment.lock, target)}
    if lock.requirements_of(environment.lock):
        return
    lines = [*requirements.lines(environment.requirements), *requirements.asked(environment.dependencies)]
    unmet = [line.parts[0] for line in lines if not _met(line, has, target.environment)]
    if unmet:
        raise ConfigError(
            f"{environment.lock} does not have what the requirements ask for: "
            f"{without_credentials(', '.join(unmet))}.",
            "Make it anew with the tool that made it, or run `packhorse lock`.",
        )


def state(environment: Environment, environ: Mapping[str, str]) -> str:
    """`fits`, `stale`, or `of another tool`, of which nothing is known. Raises ConfigError where it cannot be read."""
    if not lock.requirements_of(environment.lock):
        return "of another tool"
    try:
        fingerprint.check_lock(environment, worker_interpreter(environment.python, environ))
    except ConfigError:
        return "stale"
    return "fits"


def _met(line: Line, has: Mapping[str, str], environment: Mapping[str, str]) -> bool:
    from packaging.requirements import InvalidRequirement, Requirement

    named = requirements.named(line, environment)
    if named is None:
        return True
    if named.name not in has:
        return line.kind == "constraint"
    try:
        specifier = Requirement(line.parts[0]).specifier
    except InvalidRequirement:  # a path
        return True
    return not has[named.name] or specifier.contains(has[named.name], prereleases=True)
