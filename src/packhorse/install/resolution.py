"""Requirements → the exact files that they mean, by uv or pip, with what the requirements say of hashes and builds.

Promises the same whichever engine is asked: no file that a `--hash` does not allow, and the build options of each.
Knows nothing of how files are fetched or installed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from packhorse.config import Environment, Network
from packhorse.errors import ConfigError, NoSpaceError, PackhorseError
from packhorse.install import access, hashes, lock, requirements, uv
from packhorse.install.access import Access
from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads, RefusedError, not_allowed
from packhorse.install.elsewhere import Elsewhere
from packhorse.install.hashes import Demands
from packhorse.install.log import without_credentials
from packhorse.install.pip import Engine
from packhorse.install.requirements import Line


class Resolution:
    """The requirements of an environment, and who is asked what they mean."""

    def __init__(self, engine: Engine, environment: Environment, elsewhere: Elsewhere | None = None) -> None:
        """`elsewhere` is the worker's Python, where it is not the one of `engine`."""
        self._elsewhere = elsewhere
        self._engine, self._environment = engine, environment
        self._given = list(requirements.lines(environment.requirements))
        self._target = elsewhere.target if elsewhere is not None else None

    @property
    def sources(self) -> list[str]:
        """The lines of requirements files that tell pip where to look."""
        return requirements.sources(self._lines)

    @cached_property
    def access(self) -> Access:
        """How to reach what the requirements and the wheels name."""
        environment = self._environment
        wheels = [text for each in environment.wheels for text in (each.url, *each.find_links)]
        texts = [*(line.text for line in self._given), *environment.dependencies, *wheels]
        locked = b""
        if environment.lock and os.path.exists(environment.lock):  # it may be written only now
            locked = requirements.read_bytes(environment.lock)
        engine = self._engine
        return access.access(
            engine.pip_settings,
            texts,
            engine.pip_environ,
            engine.command.python,
            locked.decode(errors="replace"),
        )

    @property
    def target(self) -> lock.Target:
        """What the worker's Python takes."""
        if self._target is None:
            self._target = lock.target(self._engine.interpreter, self._engine.environ)
        return self._target

    def locked(self) -> list[Chosen]:
        """What the lock file says. Raises ConfigError where it says nothing for the worker's Python."""
        return self._completed(lock.chosen_by(self._environment.lock, self.target))

    def chosen(self, target: Path) -> list[Chosen] | None:
        """What the requirements and dependencies mean; None where this pip does not tell it without installing.

        `target` is where pip would install. Raises PackhorseError where they mean nothing, ConfigError for hashes
        that are missing, IntegrityError for a file that they do not allow.
        """
        demands = self._demands
        if self._elsewhere is not None:
            if self._environment.engine == "pip":
                raise ConfigError(
                    "pip cannot resolve for another Python: it reads markers for the one that runs it.",
                    'Take engine = "auto" or "uv", or run `packhorse lock` where that Python is.',
                )
            asked = uv.find(self._engine, "uv", self._lines, self._engine.pip_settings)
            by_uv = self._by_uv(asked, demands)
            return self._completed(self._held(by_uv or (), demands, target))
        asked = uv.find(self._engine, self._environment.engine, self._lines, self._engine.pip_settings)
        if asked and (found := self._by_uv(asked, demands)) is not None:
            return self._completed(self._held(found, demands, target))
        files = self._environment.requirements
        if demands is not None or self._has_remote:
            files = (str(self._flat(hashes_only=True)),)
        if (by_pip := self._by_pip(files, target)) is None:
            return None
        return self._completed(self._held(by_pip, demands, target))

    def install_whole(self, target: Path) -> None:
        """Have pip install all by itself, which an old one has to."""
        options = ("--require-hashes",) if self._demands is not None else ()
        environment = self._environment
        self._engine.progress.stage("resolving and downloading")
        self._engine.install(environment.requirements, environment.dependencies, target, *options)

    # --- who is asked ---

    def _by_uv(self, asked: str, demands: Demands | None) -> list[Chosen] | None:
        """None where uv did not find an answer and pip may."""
        environment, engine = self._environment, self._engine
        optional = environment.engine == "auto" and self._elsewhere is None
        here = engine.interpreter
        # Both: a pyproject.toml may name another version for `uv pip`.
        options: tuple[str, ...] = ("--python", here.path, "--python-version", here.version)
        if self._elsewhere is not None:
            options = self._elsewhere.uv_options
        if environment.engine == "auto":
            options += uv.AS_PIP
        files = environment.requirements
        if self._has_remote or any(line.parts[0] and line.parts[1] for line in self._lines):
            files = (str(self._flat(hashes_only=False)),)
        allowed = demands.allowed if demands is not None else {}
        settings = _impatient(engine.settings) if optional else engine.settings
        try:
            found = uv.resolve(
                asked, engine, files, environment.dependencies, settings, self.target, allowed, options
            )
        except NoSpaceError:
            raise
        except PackhorseError as error:
            if not optional:
                raise
            engine.log.add(f"uv did not find an answer: {error.what}")
            engine.note("uv did not find an answer, so pip is asked")
            return None
        wanted = {each.name for each in map(self._named, self._all_lines) if each is not None}
        return [msgspec.structs.replace(each, requested=each.name in wanted) for each in found]

    def _by_pip(self, files: Sequence[str], target: Path, *options: str) -> list[Chosen] | None:
        return self._engine.resolve(files, self._environment.dependencies, target, *options)

    def _flat(self, *, hashes_only: bool) -> Path:
        def keep(option: str) -> bool:
            return hashes_only and not option.startswith("--hash")

        return requirements.flat(self._lines, self._engine.session.tmp, keep)

    # --- what the requirements say besides ---

    @cached_property
    def _lines(self) -> list[Line]:
        """All lines, of files that are included by URL too: what those say of hashes must be held as well."""
        return list(self._expanded(self._given, set()))

    def _expanded(self, lines: Iterable[Line], seen: set[str]) -> Iterator[Line]:
        for line in lines:
            if not line.remote:
                yield line
            elif (key := f"{line.kind} {line.text}") not in seen:
                seen.add(key)
                yield from self._expanded(requirements.included(line, self._fetched(line.text)), seen)

    def _fetched(self, url: str) -> bytes:
        engine, parts = self._engine, urlsplit(url)
        if parts.scheme == "file":
            return requirements.read_bytes(unquote(parts.path))
        downloads = Downloads(self.access, engine.settings, engine.note, sleep=engine.sleep)
        path = engine.session.tmp / (parts.path.rpartition("/")[2] or "requirements.txt")
        try:
            downloads.fetch(access.without_user(url), path, {})
        except RefusedError as error:
            raise ConfigError(
                f"{without_credentials(url)}, which the requirements include, cannot be read: {error}.",
                "Give its credentials in ~/.netrc.",
            ) from error
        content = path.read_bytes()
        path.unlink()
        return content

    @cached_property
    def _demands(self) -> Demands | None:
        settings = self._engine.pip_settings
        return hashes.demanded(self._all_lines, settings, lambda: self.target.environment)

    @property
    def _has_remote(self) -> bool:
        return any(line.remote for line in self._given)

    @property
    def _all_lines(self) -> list[Line]:
        return [*self._lines, *requirements.asked(self._environment.dependencies)]

    def _named(self, line: Line) -> requirements.Named | None:
        if line.kind != "requirement":
            return None
        return requirements.named(line, self.target.environment)

    def _held(self, chosen: Sequence[Chosen], demands: Demands | None, target: Path) -> list[Chosen]:
        """With the hashes that are allowed; where the engine took another file of the version, with an allowed one."""
        if demands is None:
            return list(chosen)
        found = {each.name: each for each in hashes.held(chosen, demands)}
        others = [each for each in found.values() if not hashes.fits(each)]
        for each in others:
            if each.direct is not None:
                raise not_allowed(each.file, each.allowed, _known(each.hashes), each.url)
        if others:
            lines = [*self.sources, *map(hashes.pinned, others)]
            for each in self._engine.resolve((), lines, target, "--no-deps", "--require-hashes") or ():
                known = msgspec.structs.replace(
                    each, allowed=found[each.name].allowed, requested=found[each.name].requested
                )
                if not hashes.fits(known):
                    raise not_allowed(known.file, known.allowed, _known(known.hashes), known.url)
                found[each.name] = known
        return list(found.values())

    def _completed(self, chosen: Sequence[Chosen]) -> list[Chosen]:
        """With the options by which pip is to build them."""
        options: Mapping[str, str] = {}
        if any(line.parts[0] and line.parts[1] for line in self._lines):
            options = {
                named.name: text
                for line in self._lines
                if (named := self._named(line)) is not None and (text := _build_options(line))
            }
        return [
            msgspec.structs.replace(each, build_options=options[each.name]) if each.name in options else each
            for each in chosen
        ]


def _build_options(line: Line) -> str:
    given = requirements.split_options(line.parts[1])
    return " ".join(option for option in given if not option.startswith("--hash"))


def _known(known: Mapping[str, str]) -> str:
    return known.get("sha256") or ", ".join(f"{name}:{value}" for name, value in known.items())


def _impatient(settings: Network) -> Network:
    """For an engine that need not answer: the other has all the attempts."""
    return msgspec.structs.replace(settings, attempts=1, large_attempts=1)
