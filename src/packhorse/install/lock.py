"""Lock files: what was chosen ⇄ pylock.toml (PEP 751), for one Python on one platform.

Promises that what is read is exact: one file with a hash for each distribution, and for this Python; and that it can
move together with the files of this machine that it names. Reads the lock files of other tools too.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import msgspec
from packaging.utils import canonicalize_name

from packhorse import config_values
from packhorse.errors import UNREADABLE, ConfigError
from packhorse.install.chosen import Chosen, without_secret
from packhorse.install.downloads import checkable
from packhorse.install.interpreter import Interpreter
from packhorse.install.log import without_credentials

if TYPE_CHECKING:
    from packaging import pylock
    from packaging.tags import Tag

_TOOL = "packhorse"
_ASK = """\
import json, sys
sys.path.insert(0, sys.argv[1])
from packaging import markers, tags
print(json.dumps([dict(markers.default_environment()), [str(tag) for tag in tags.sys_tags()]]))
"""
_REMEDY = "Run `packhorse lock` where the worker's Python is."


class Target(msgspec.Struct, frozen=True, array_like=True):
    """What decides which files fit: the values of markers (PEP 508), and the tags of wheels, best first (PEP 425)."""

    environment: dict[str, str]
    tags: list[str]


def target(interpreter: Interpreter, environ: Mapping[str, str]) -> Target:
    """That of the worker's Python. Raises ConfigError where it does not answer."""
    import packaging

    library = os.path.dirname(os.path.dirname(packaging.__file__))
    answer = subprocess.run(
        [interpreter.path, "-I", "-c", _ASK, library],
        env=dict(environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    try:
        return msgspec.json.decode(answer.stdout, type=Target)
    except UNREADABLE as error:
        raise ConfigError(
            f"{interpreter.path} does not tell which wheels it takes.",
            "Name the worker's Python by environment.python in the configuration.",
        ) from error


def encoded(
    chosen: Sequence[Chosen], target: Target, requirements: str, directory: Path, last: Sequence[str] = ()
) -> bytes:
    """The lock file that will lie in `directory`. `requirements` is the digest of what was resolved, kept in it, as
    are the names of the extra wheels, which come `last`. Every wheel has a hash."""
    import tomli_w
    from packaging import pylock
    from packaging.markers import Marker
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    environment = target.environment
    keys = ("implementation_name", "sys_platform", "platform_machine")
    minor = environment["python_version"]
    document = pylock.Pylock(
        lock_version=Version("1.0"),
        created_by="packhorse",
        requires_python=SpecifierSet(f"=={minor}.*"),
        environments=[Marker(" and ".join(f"{key} == {json.dumps(environment[key])}" for key in keys))],
        packages=[_package(each, directory) for each in sorted(chosen, key=lambda each: each.name)],
        tool={_TOOL: {"requirements": requirements, "wheels": list(last)}},
    )
    document.validate()
    return tomli_w.dumps(document.to_dict()).encode()


def _package(chosen: Chosen, directory: Path) -> pylock.Package:
    from packaging import pylock
    from packaging.version import Version

    name = canonicalize_name(chosen.name)
    direct = chosen.direct or {}
    subdirectory = direct.get("subdirectory")
    if vcs := direct.get("vcs_info"):
        repository = pylock.PackageVcs(
            type=vcs["vcs"],
            url=without_secret(chosen.url),
            requested_revision=vcs.get("requested_revision"),
            commit_id=vcs["commit_id"],
            subdirectory=subdirectory,
        )
        return pylock.Package(name=name, vcs=repository)
    path = _path(chosen.local, directory) if chosen.local is not None else None
    if path is not None and "dir_info" in direct:
        editable = bool(direct["dir_info"].get("editable"))
        project = pylock.PackageDirectory(path=path, editable=editable, subdirectory=subdirectory)
        return pylock.Package(name=name, directory=project)
    url = without_credentials(chosen.url) if path is None else None
    version, hashes, size = Version(chosen.version), dict(chosen.hashes), chosen.size or None
    if direct:
        archive = pylock.PackageArchive(
            url=url, path=path, size=size, hashes=hashes, subdirectory=subdirectory
        )
        return pylock.Package(name=name, version=version, archive=archive)
    if chosen.is_wheel:
        wheel = pylock.PackageWheel(name=chosen.file, url=url, path=path, size=size, hashes=hashes)
        return pylock.Package(name=name, version=version, wheels=[wheel])
    sdist = pylock.PackageSdist(name=chosen.file, url=url, path=path, size=size, hashes=hashes)
    return pylock.Package(name=name, version=version, sdist=sdist)


def _path(file: Path, directory: Path) -> str:
    """Where a file of this machine lies, from the directory of the lock file (PEP 751, packages.wheels.path)."""
    return PurePath(os.path.relpath(file, directory)).as_posix()


def requirements_of(path: str) -> str:
    """The digest of the requirements that a lock file was made from; "" for one of another tool."""
    found = (_own(path) or {}).get("requirements")
    return found if isinstance(found, str) else ""


def last_of(path: str) -> list[str] | None:
    """The names of the extra wheels in a lock file, in their order; None for one of another tool, which has none."""
    own = _own(path)
    if own is None:
        return None
    found = own.get("wheels")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _own(path: str) -> dict[str, Any] | None:
    """What packhorse itself wrote into a lock file."""
    tool = _read(path).get("tool")
    own = tool.get(_TOOL) if isinstance(tool, dict) else None
    return own if isinstance(own, dict) else None


def chosen_by(
    path: str, target: Target, allowed: Mapping[str, Mapping[str, frozenset[str]]] = {}
) -> list[Chosen]:
    """What a lock file says for the worker's Python. Raises ConfigError where it says nothing for that.

    Of the distributions in `allowed` only files count that have one of the hashes there, if any does.
    """
    from packaging import pylock
    from packaging.tags import parse_tag

    name = config_values.printable(path)
    tags = [tag for text in target.tags for tag in parse_tag(text)]
    try:
        document = pylock.Pylock.from_dict(_allowed(_read(path), allowed))
        selected = list(document.select(environment=target.environment, tags=tags))  # type: ignore[arg-type]
        chosen = [_chosen(package, file, Path(path).parent) for package, file in selected]
    except (pylock.PylockValidationError, pylock.PylockUnsupportedVersionError, ValueError) as error:
        raise ConfigError(f"{name} is not a lock file that can be read: {error}.", _REMEDY) from error
    except pylock.PylockSelectError as error:
        raise ConfigError(f"{name} has nothing for the worker's Python: {error}", _REMEDY) from error
    fitting = frozenset(tags)
    for each in chosen:
        # An archive is chosen without a look at its name (PEP 751).
        if each.direct is not None and each.is_wheel and fitting.isdisjoint(_tags(each.file)):
            raise ConfigError(f"{name}: {each.file} does not fit the worker's Python.", _REMEDY)
        if each.hashes and not checkable(each.hashes):
            raise ConfigError(
                f"{name}: {each.file} has no hash that can be checked.",
                "Make it anew with the tool that made it, with sha256, or run `packhorse lock`.",
            )
    return chosen


def _tags(file: str) -> Collection[Tag]:
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        return parse_wheel_filename(file)[3]
    except InvalidWheelFilename:
        return ()


def _allowed(document: dict[str, Any], allowed: Mapping[str, Mapping[str, frozenset[str]]]) -> dict[str, Any]:
    """Without the files that have none of the hashes that are allowed, where others have."""
    for package in document.get("packages", ()) if allowed else ():
        wanted = allowed.get(package.get("name", ""), {})

        def fits(file: Mapping[str, Any], wanted: Mapping[str, frozenset[str]] = wanted) -> bool:
            return any(file.get("hashes", {}).get(name) in digests for name, digests in wanted.items())

        wheels = [file for file in package.get("wheels", ()) if fits(file)]
        source = [package["sdist"]] if "sdist" in package and fits(package["sdist"]) else []
        if wheels or source:
            package.pop("wheels", None)
            package.pop("sdist", None)
            package.update({"wheels": wheels} if wheels else {}, **({"sdist": source[0]} if source else {}))
    return document


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"{config_values.printable(path)} cannot be read: {reason}.",
            "Run `packhorse lock`, or correct environment.lock in the configuration.",
        ) from error
    return config_values.toml(text, config_values.printable(path), _REMEDY)


def _chosen(package: pylock.Package, file: object, base: Path) -> Chosen:
    from packaging import pylock

    version = str(package.version or "")
    if isinstance(file, pylock.PackageVcs):
        vcs = {"vcs": file.type, "commit_id": file.commit_id, "requested_revision": file.requested_revision}
        direct: dict[str, Any] = {"vcs_info": {key: value for key, value in vcs.items() if value}}
        return _direct(package.name, version, _url(file, base), direct, file.subdirectory)
    if isinstance(file, pylock.PackageDirectory):
        direct = {"dir_info": {"editable": True} if file.editable else {}}
        return _direct(package.name, version, _url(file, base), direct, file.subdirectory)
    if isinstance(file, pylock.PackageArchive):
        direct = {"archive_info": {"hashes": dict(file.hashes)}}
        chosen = _direct(package.name, version, _url(file, base), direct, file.subdirectory)
        return msgspec.structs.replace(chosen, hashes=dict(file.hashes), size=file.size or 0)
    assert isinstance(file, (pylock.PackageWheel, pylock.PackageSdist))
    return Chosen(package.name, version, _url(file, base), dict(file.hashes), file.size or 0)


def _direct(name: str, version: str, url: str, direct: dict[str, Any], subdirectory: str | None) -> Chosen:
    if subdirectory:
        direct["subdirectory"] = subdirectory
    return Chosen(name, version, url, direct={**direct, "url": without_credentials(url)})


def _url(file: Any, base: Path) -> str:
    path = getattr(file, "path", None)
    url: str | None = getattr(file, "url", None)
    return Path(os.path.abspath(base / path)).as_uri() if path else without_secret(url or "")
