"""`packhorse lock`, whole: requirements → exact files with hashes and sizes → pylock.toml.

Promises that a file that is there stays as it is until the new one is complete.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from packhorse import atomic, session
from packhorse.config import Config
from packhorse.config_values import printable
from packhorse.errors import ConfigError, PackhorseError
from packhorse.install import elsewhere, fingerprint, hashes, lock, sizes
from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads, RefusedError, checked
from packhorse.install.extra import Extra
from packhorse.install.interpreter import worker_interpreter
from packhorse.install.log import Log
from packhorse.install.pip import Engine
from packhorse.install.resolution import Resolution
from packhorse.progress import Progress
from packhorse.root import Root
from packhorse.session import Session
from packhorse.watch.disk import Watch

DEFAULT = "pylock.toml"


class LockResult(msgspec.Struct):
    """What was locked: distributions, and the bytes of their files. `changed` is False where the file said so already."""

    lock: str
    changed: bool
    distributions: int
    bytes: int
    seconds: float
    log: str


def make(
    root: Root,
    config: Config,
    environ: Mapping[str, str],
    progress: Progress,
    note: Callable[[str], None],
    *,
    python: str = "",
    platform: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> LockResult:
    """Resolve the requirements, dependencies and extra wheels for the worker's Python, and write the lock file.

    `python` ("3.12") and `platform` ("manylinux_2_28_aarch64") name a worker's that is not here. Raises ConfigError
    where there is nothing to lock, and PackhorseError where the engine cannot resolve it or no wheel fits.
    """
    started = time.monotonic()
    environment = config.environment
    if not (environment.requirements or environment.dependencies or environment.wheels):
        raise ConfigError(
            "There is nothing to lock.",
            "Add requirements, dependencies or wheels under [environment] in packhorse.toml.",
        )
    msgspec.structs.replace(environment, lock="").check_files()
    interpreter = worker_interpreter(environment.python, environ)
    other = elsewhere.elsewhere(python, platform, interpreter)
    directory = config.file.parent if config.file else Path.cwd()
    path = Path(environment.lock or directory / DEFAULT)
    if not path.parent.is_dir():
        raise ConfigError(
            f"There is no directory {printable(path.parent)} for the lock file.",
            "Create it, or correct environment.lock in the configuration.",
        )
    session.clean(root)
    with Watch(root.path) as watch, Session(root) as own, contextlib.closing(Log(root.logs, own.id)) as log:
        engine = Engine(
            interpreter=interpreter,
            environ=environ,
            directory=directory,
            settings=config.network,
            session=own,
            log=log,
            watch=watch,
            progress=progress,
            note=log.noting(note),
            sleep=sleep,
        )
        resolution = Resolution(engine, environment, other)
        named = environment.requirements or environment.dependencies
        chosen = resolution.chosen(own.tmp / "target") if named else []
        if chosen is None:
            raise PackhorseError(
                "This pip cannot tell what it would install.", "Install pip 23.3 or newer beside packhorse."
            )
        extra = Extra(engine, environment.wheels, resolution.access, own.tmp / "target", other)
        last = _wheels(extra, chosen)
        downloads = Downloads(resolution.access, config.network, engine.note, sleep=sleep)
        kept = [each for each in chosen if each.name not in extra.names]
        chosen = _complete([*kept, *last], downloads, own, progress)
        content = lock.encoded(
            chosen,
            resolution.target,
            fingerprint.requirements_digest(
                environment, other.interpreter if other is not None else interpreter
            ),
            path.parent,
            [each.name for each in last],
        )
    changed = not path.exists() or path.read_bytes() != content
    if changed:
        atomic.write_file(path, content, mode=0o644)
    seconds = round(time.monotonic() - started, 3)
    return LockResult(
        str(path), changed, len(chosen), sum(each.size for each in chosen), seconds, str(log.path)
    )


def _wheels(extra: Extra, resolved: Sequence[Chosen]) -> list[Chosen]:
    """The extra wheels. Raises PackhorseError where they depend on a torch of which nothing can be told."""
    found = extra.early(resolved)
    if found is None:
        raise PackhorseError(
            "How the torch of the requirements was built is not known before it is installed, and wheels of "
            "[[environment.wheels]] depend on it.",
            "Name each by its url, or take an index whose server answers requests for parts of files.",
        )
    return found


def _complete(
    chosen: Sequence[Chosen], downloads: Downloads, own: Session, progress: Progress
) -> list[Chosen]:
    """With sizes, and with hashes for what an index gave without."""
    progress.stage("looking at the sizes of the wheels")
    wheels = [each for each in chosen if each.is_wheel]
    known = {each.chosen.url: each.chosen for each in sizes.sized(wheels, downloads, own.heartbeat)}
    found = [known.get(each.url, each) for each in chosen]
    return [
        each if not _is_file(each) or _has_hash(each) else _hashed(each, downloads, own, progress)
        for each in found
    ]


def _has_hash(chosen: Chosen) -> bool:
    """Whether the index tells a hash, and it proves the file to be one that the requirements allow."""
    return bool(chosen.hashes.keys() & {"sha256", "sha384", "sha512"}) and hashes.is_proven(chosen)


def _is_file(chosen: Chosen) -> bool:
    direct = chosen.direct or {}
    return "vcs_info" not in direct and "dir_info" not in direct


def _hashed(chosen: Chosen, downloads: Downloads, own: Session, progress: Progress) -> Chosen:
    if chosen.local is not None:
        digest = checked(chosen.file, chosen.local, chosen.hashes, chosen.allowed, chosen.url)
        return msgspec.structs.replace(chosen, hashes={"sha256": digest})
    progress.stage(f"downloading {chosen.file}, which has no hash", chosen.size or None)
    path = own.tmp / chosen.file
    try:
        digest = downloads.fetch(chosen.url, path, chosen.hashes, chosen.size, chosen.allowed)
    except RefusedError as error:
        raise PackhorseError(
            f"{chosen.file} has no hash in its index and cannot be downloaded to make one: {error}.",
            "Give its credentials in ~/.netrc or in the URL of the index.",
        ) from error
    size = path.stat().st_size
    path.unlink()
    return msgspec.structs.replace(chosen, hashes={"sha256": digest}, size=size)
