"""What is wrong with a root: its packages, its state, the variables around it, its disks and its store.

Promises to change nothing. Each finding says what is wrong and what to do about it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from packhorse import redirect
from packhorse.errors import PackhorseError
from packhorse.install import disk_check
from packhorse.install.disk_check import Finding
from packhorse.progress import Progress
from packhorse.root import Root
from packhorse.transfer.setup import Setup

_LITTLE_SPACE = 1 << 30
_LONGEST_ROOT = 60
"""Characters: a socket of torch or ray has some 40 below TMPDIR, and its path ends at 108 (unix(7))."""
CHECKS = ("packages", "state", "variables", "disks", "store")


class Diagnosis(msgspec.Struct):
    """What was found. `problems` and `warnings` count the findings of each level."""

    root: str
    problems: int
    warnings: int
    findings: list[Finding]


def diagnose(setup: Setup, progress: Progress, *, digests: bool = False) -> Diagnosis:
    """Look at everything; `digests` also reads every file of the packages. Raises ConfigError."""
    root = setup.root
    in_use = root.use_packages(reading=True)  # no exchange while they are read
    try:
        search = {**setup.environ, "PATH": _worker_path(root, setup.environ)}
        findings = disk_check.check(root.packages, search, progress, digests=digests)
    finally:
        os.close(in_use)
    findings += _state(setup)
    findings += _variables(setup)
    findings += _disks(setup)
    progress.stage("asking the store")
    findings += _store(setup)
    problems = sum(finding.level == "problem" for finding in findings)
    return Diagnosis(str(root.path), problems, len(findings) - problems, findings)


def _worker_path(root: Root, environ: Mapping[str, str]) -> str:
    return f"{root.packages / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}"


def _state(setup: Setup) -> Iterator[Finding]:
    root, state = setup.root, setup.root.state()
    if state.state == "partial":
        yield Finding(
            "state", "problem", "A pull was not finished.", "Run `packhorse pull`: it goes on where it was."
        )
    try:
        interpreter = setup.interpreter
    except PackhorseError as error:
        yield Finding("state", "problem", error.what, error.remedy)
        return
    try:
        wanted = setup.fingerprint
    except PackhorseError as error:
        yield Finding("state", "problem", error.what, error.remedy)
        wanted = ""
    made_for = f"{state.soabi} on {state.platform}"
    here = f"{interpreter.soabi} on {interpreter.platform}"
    if state.soabi and made_for != here:
        yield Finding(
            "state",
            "problem",
            f"The environment in {root.path} was made for {made_for}, but {interpreter.path} is {here}.",
            "Run `packhorse install` to make it anew, or name the right Python by environment.python.",
        )
    elif state.fingerprint and wanted and state.fingerprint != wanted:
        yield Finding(
            "state",
            "warning",
            "The environment was made of other requirements than the configuration has now.",
            "Run `packhorse install`.",
        )


def _variables(setup: Setup) -> Iterator[Finding]:
    """Variables of the table that lead out of the root although this is its environment."""
    root, environ = setup.root, setup.environ
    app_path = setup.config.run.app_path
    if app_path and not os.path.isdir(app_path):
        yield Finding(
            "variables",
            "problem",
            f"run.app-path is {app_path}, which is no directory.",
            "Correct it, or leave it out.",
        )
    if len(str(root.path)) > _LONGEST_ROOT:
        yield Finding(
            "variables",
            "warning",
            f"The root's path has {len(str(root.path))} characters: sockets below TMPDIR may become too long.",
            "Choose a root with a short path.",
        )
    if environ.get("PACKHORSE_ROOT") != str(root.path):
        return  # a shell of its own: `run`, `exec` and `env` set them all
    outside = redirect.outside(root, environ)
    if outside:
        yield Finding(
            "variables",
            "problem",
            f"Variables lead out of the root: {', '.join(f'{name}={value}' for name, value in outside.items())}.",
            "Do not set them after `packhorse run` or `env` has.",
            list(outside),
            len(outside),
        )


def _disks(setup: Setup) -> Iterator[Finding]:
    root = setup.root
    if root.on_os_disk:
        yield Finding(
            "disks",
            "warning",
            f"The root {root.path} lies on the OS disk.",
            "Choose a root on another disk, with root in the configuration or PACKHORSE_ROOT.",
        )
    directory = setup.config.storage.directory
    if directory is not None:
        existing = next(parent for parent in (directory, *directory.parents) if os.path.exists(parent))
        if existing.stat().st_dev == Path("/").stat().st_dev:
            yield Finding(
                "disks",
                "warning",
                f"The store {directory} lies on the OS disk: it is lost with this machine.",
                "Name an object store by storage.url.",
            )
    for path, name in ((root.path, "root"), (Path("/"), "OS")):
        disk = shutil.disk_usage(path)
        if disk.free < min(_LITTLE_SPACE, disk.total // 20):
            yield Finding(
                "disks",
                "problem",
                f"The disk of the {name} has {disk.free / 1e6:,.0f} MB free of {disk.total / 1e6:,.0f} MB.",
                "Free some space." if name == "OS" else "Free some space, or choose a root on a larger disk.",
            )


def _store(setup: Setup) -> Iterator[Finding]:
    try:
        setup.store.list("tags/")
    except PackhorseError as error:
        yield Finding("store", "problem", error.what, error.remedy)
