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
from packhorse.errors import ConfigError, PackhorseError
from packhorse.install import access, fingerprint, lock, requirements, sizes
from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads, RefusedError, sha256
from packhorse.install.interpreter import worker_interpreter
from packhorse.install.log import Log
from packhorse.install.pip import Engine
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
    sleep: Callable[[float], None] = time.sleep,
) -> LockResult:
    """Resolve the requirements and dependencies for the worker's Python, and write the lock file.

    Raises ConfigError where there is nothing to lock, and PackhorseError where pip cannot resolve it.
    """
    started = time.monotonic()
    environment = config.environment
    if not environment.requirements and not environment.dependencies:
        raise ConfigError(
            "There is nothing to lock.",
            "Add requirements or dependencies under [environment] in packhorse.toml.",
        )
    msgspec.structs.replace(environment, lock="", wheels=()).check_files()
    interpreter = worker_interpreter(environment.python, environ)
    directory = config.file.parent if config.file else Path.cwd()
    path = Path(environment.lock or directory / DEFAULT)
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
            note=note,
            sleep=sleep,
        )
        chosen = engine.resolve(environment.requirements, environment.dependencies, own.tmp / "target")
        if chosen is None:
            raise PackhorseError(
                "This pip cannot tell what it would install.", "Install pip 23.3 or newer beside packhorse."
            )
        settings = access.pip_settings(engine.command.words, engine.pip_environ)
        texts = [line.text for line in requirements.lines(environment.requirements)]
        reached = access.access(settings, [*texts, *environment.dependencies], engine.pip_environ)
        downloads = Downloads(reached, config.network, note, sleep=sleep)
        chosen = _complete(chosen, downloads, own, progress)
        content = lock.encoded(
            chosen,
            lock.target(interpreter, environ),
            fingerprint.requirements_digest(environment, interpreter),
        )
    changed = not path.exists() or path.read_bytes() != content
    if changed:
        atomic.write_file(path, content, mode=0o644)
    seconds = round(time.monotonic() - started, 3)
    return LockResult(
        str(path), changed, len(chosen), sum(each.size for each in chosen), seconds, str(log.path)
    )


def _complete(
    chosen: Sequence[Chosen], downloads: Downloads, own: Session, progress: Progress
) -> list[Chosen]:
    """With sizes, and with hashes for what an index gave without."""
    progress.stage("looking at the sizes of the wheels")
    wheels = [each for each in chosen if each.is_wheel]
    known = {each.chosen.url: each.chosen for each in sizes.sized(wheels, downloads, own.heartbeat)}
    found = [known.get(each.url, each) for each in chosen]
    return [
        each if each.hashes or not _is_file(each) else _hashed(each, downloads, own, progress)
        for each in found
    ]


def _is_file(chosen: Chosen) -> bool:
    direct = chosen.direct or {}
    return "vcs_info" not in direct and "dir_info" not in direct


def _hashed(chosen: Chosen, downloads: Downloads, own: Session, progress: Progress) -> Chosen:
    if chosen.local is not None:
        return msgspec.structs.replace(chosen, hashes={"sha256": sha256(chosen.local)})
    progress.stage(f"downloading {chosen.file}, which has no hash", chosen.size or None)
    path = own.tmp / chosen.file
    try:
        digest = downloads.fetch(chosen.url, path, {}, chosen.size)
    except RefusedError as error:
        raise PackhorseError(
            f"{chosen.file} has no hash in its index and cannot be downloaded to make one: {error}.",
            "Give its credentials in ~/.netrc or in the URL of the index.",
        ) from error
    size = path.stat().st_size
    path.unlink()
    return msgspec.structs.replace(chosen, hashes={"sha256": digest}, size=size)
