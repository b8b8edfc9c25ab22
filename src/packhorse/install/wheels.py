"""The extra wheels: installed last, in their order, each over what the resolver chose.

Promises that a wheel takes the place of the distribution of its name and of nothing else: `bin/` and namespace
packages keep what others have in them (unlike `pip install --target --upgrade`, which replaces them).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import msgspec
from packaging.utils import canonicalize_name

from packhorse import atomic
from packhorse.config import Wheel
from packhorse.errors import PackhorseError
from packhorse.install import symbols
from packhorse.install.accelerator import Selection
from packhorse.install.links import Link
from packhorse.install.pip import Engine


class Override(msgspec.Struct, frozen=True):
    """A distribution that an extra wheel brought; `old` is the version it replaced, "" for none."""

    name: str
    old: str
    new: str


class Installed(NamedTuple):
    """A distribution in a directory, by its normalised name."""

    name: str
    version: str
    distribution: importlib.metadata.Distribution


def tell(overrides: Sequence[Override], engine: Engine) -> None:
    """Say what came instead of what."""
    for override in overrides:
        instead = f" instead of {override.old}" if override.old else ""
        engine.note(f"{override.name} {override.new}{instead}, from its own wheel")


def displace(name: str, directory: Path) -> None:
    """Remove the distributions of that name, if there are any."""
    for found in list(distributions(directory)):
        if found.name == name:
            _remove(found.distribution, directory)


def link(wheel: Wheel, selection: Selection) -> tuple[Link, str]:
    """Where a wheel lies, once it is known to fit, and what is to be said of the choice.

    Raises PackhorseError where it does not fit, or none does.
    """
    if wheel.find_links:
        choice = selection.from_links(wheel)
        return choice.candidate.link, f"{wheel.name}: {choice.why}"
    url = wheel.url or Path(wheel.path).as_uri()
    file = unquote(PurePosixPath(urlsplit(url).path).name)
    doubt = selection.doubt(file)
    return Link(file, url), f"warning: {doubt}" if doubt else ""


def refuse_unloadable(names: set[str], selection: Selection, engine: Engine, staging: Path) -> None:
    """Raise PackhorseError where an extension module that came with the wheels cannot be loaded."""
    engine.progress.stage("checking symbols")
    scope = symbols.Scope([staging, *selection.search_path], engine.interpreter, engine.environ)
    with contextlib.closing(scope):
        brought = (found.distribution for found in distributions(staging) if found.name in names)
        findings = symbols.check(brought, scope)
    if not findings:
        return
    for finding in findings:
        engine.log.add(f"{symbols.sentence(finding)}. {' '.join(finding.missing)}")
    first, *others = findings
    more = f" So it is with {len(others)} more." if others else ""
    raise PackhorseError(
        f"A wheel of [[environment.wheels]] cannot be loaded here: {symbols.sentence(first)}.{more}",
        f"{first.remedy} The whole list is in {engine.log.path}.",
    )


def distributions(directory: Path) -> Iterator[Installed]:
    """The distributions that lie in a directory."""
    for distribution in importlib.metadata.distributions(path=[str(directory)]):
        name = distribution.metadata["Name"]
        if name:
            yield Installed(canonicalize_name(name), distribution.version, distribution)


def merge(source: Path, target: Path) -> list[Override]:
    """Move the distributions in `source` into `target`, in place of those of the same names there."""
    present: dict[str, list[Installed]] = {}
    for here in distributions(target):
        present.setdefault(here.name, []).append(here)
    overrides = []
    for new in distributions(source):
        replaced = present.get(new.name, [])
        for old in replaced:
            _remove(old.distribution, target)
        overrides.append(Override(new.name, ", ".join(old.version for old in replaced), new.version))
    _move_into(source, target)
    return overrides


def _remove(distribution: importlib.metadata.Distribution, target: Path) -> None:
    """Remove the files that a distribution's RECORD names, and the directories that are empty then."""
    for recorded in distribution.files or ():
        below = place(PurePosixPath(recorded))
        if below is None:
            continue
        path = target / below
        if path.is_dir() and not path.is_symlink():
            continue
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == target or not _remove_empty(parent):
                break


def place(recorded: PurePosixPath) -> PurePosixPath | None:
    """Where in its target pip's --target put a file of RECORD: what was recorded outside the library directory
    (`../../bin/name`) lies in the target too. None for a path that leads elsewhere."""
    parts = list(recorded.parts)
    while parts and parts[0] == "..":
        del parts[0]
    if not parts or ".." in parts or recorded.is_absolute():
        return None
    return PurePosixPath(*parts)


def _remove_empty(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


def _move_into(source: Path, target: Path) -> None:
    for entry in os.scandir(source):
        place = target / entry.name
        is_directory = entry.is_dir(follow_symlinks=False)
        if is_directory and place.is_dir() and not place.is_symlink():
            _move_into(Path(entry.path), place)
            continue
        if is_directory or (place.is_dir() and not place.is_symlink()):
            atomic.remove_tree(place)
        os.replace(entry.path, place)
