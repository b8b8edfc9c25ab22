"""The wheels of `[[environment.wheels]]` → exact files, chosen before anything is downloaded where that can be known.

Promises that a wheel that fits nothing is told before gigabytes of torch are fetched: how that torch was built is read
from the small files of its wheel that tell it. Knows nothing of how files are installed.
"""

from __future__ import annotations

import contextlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.tags import parse_tag
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from packhorse import atomic
from packhorse.config import Wheel
from packhorse.errors import PackhorseError
from packhorse.install import sizes, torch_build, wheels
from packhorse.install.accelerator import Selection, needs
from packhorse.install.access import Access, without_user
from packhorse.install.chosen import Chosen
from packhorse.install.downloads import Downloads, RefusedError
from packhorse.install.elsewhere import Elsewhere
from packhorse.install.links import Fetcher, Link
from packhorse.install.log import without_credentials
from packhorse.install.network import Attempts
from packhorse.install.pip import Engine
from packhorse.install.torch_build import Torch

_HASH = re.compile(r"(?:^|&)(sha256|sha384|sha512)=([0-9a-fA-F]+)")


class _NotYetKnownError(Exception):
    """How the torch was built can only be told when it is there."""


class Extra:
    """The extra wheels of one installation."""

    def __init__(
        self,
        engine: Engine,
        asked: Sequence[Wheel],
        access: Access,
        packages: Path,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        """`packages` is where the environment will be; `elsewhere` the worker's Python where it is not here."""
        self._elsewhere = elsewhere
        self._engine, self._asked, self._packages = engine, asked, packages
        self._downloads = Downloads(access, engine.settings, engine.note, sleep=engine.sleep)
        attempts = Attempts(engine.settings, engine.note, engine.sleep)
        self._fetcher = Fetcher(self._downloads, attempts, engine.environ)
        self._builds: dict[str, Torch] = {}

    @property
    def names(self) -> set[str]:
        """The normalised names of the distributions that the wheels are of."""
        return {canonicalize_name(wheel.name) for wheel in self._asked}

    def early(self, resolved: Sequence[Chosen]) -> list[Chosen] | None:
        """The files, for the torch among `resolved`; None where that is not known before it is installed.

        Raises PackhorseError where a wheel does not fit, or none does.
        """
        if self._asked:
            self._engine.progress.stage("choosing wheels")
        found: list[Chosen] = []
        said: list[str] = []
        try:
            for wheel in self._asked:
                torch = next((each for each in reversed([*resolved, *found]) if each.name == "torch"), None)
                selection = self._selection(torch)
                link, text = wheels.link(wheel, selection)
                self._refuse_guess(link, torch)
                found.append(_exact(wheel, link))
                said.append(text)
        except _NotYetKnownError:
            return None
        for text in filter(None, said):
            self._engine.note(text)
        return found

    def late(self, wheel: Wheel) -> Chosen:
        """The file of one wheel, for the torch that is in `packages` now. Raises as `early`."""
        link, text = wheels.link(wheel, self._selection(None))
        if text:
            self._engine.note(text)
        return _exact(wheel, link)

    def check_symbols(self, names: set[str]) -> None:
        """Raise PackhorseError where a module that came with wheels of these names cannot be loaded."""
        wheels.refuse_unloadable(names, self._selection(None), self._engine, self._packages)

    def _selection(self, torch: Chosen | None) -> Selection:
        engine = self._engine
        told: Callable[[], Torch | None] | None = None if torch is None else lambda: self._build(torch)
        interpreter, tags = engine.interpreter, None
        if self._elsewhere is not None:
            interpreter = self._elsewhere.interpreter
            tags = [tag for text in self._elsewhere.target.tags for tag in parse_tag(text)]
            told = told or (lambda: None)
        root = engine.session.root.path
        return Selection(interpreter, engine.environ, self._packages, root, self._fetcher, told, tags)

    def _build(self, torch: Chosen) -> Torch:
        """How the torch in a wheel was built."""
        if torch.url not in self._builds:
            self._builds[torch.url] = self._look(torch)
        return self._builds[torch.url]

    def _look(self, torch: Chosen) -> Torch:
        import urllib3

        if not torch.is_wheel:
            raise _NotYetKnownError
        try:
            files = sizes.members(torch, self._downloads, torch_build.TELLING)
        except (RefusedError, urllib3.exceptions.HTTPError, OSError, zipfile.BadZipFile, zlib.error) as error:
            self._engine.log.add(f"how {torch.file} was built could not be read from it: {error}")
            raise _NotYetKnownError from error
        place = self._engine.session.tmp / "torch"
        with contextlib.ExitStack() as cleaning:
            cleaning.callback(atomic.remove_tree, place)
            for name, content in files.items():
                path = place / name
                os.makedirs(path.parent, exist_ok=True)
                path.write_bytes(content)
            found = torch_build.find([place], self._engine.interpreter, self._engine.environ, ask=False)
        if found is None:
            raise _NotYetKnownError
        return found

    def _refuse_guess(self, link: Link, torch: Chosen | None) -> None:
        """Raise where a wheel was chosen whose ABI could not be held against that of torch."""
        if torch is None or torch.url not in self._builds or self._builds[torch.url].cxx11_abi is not None:
            return
        with contextlib.suppress(InvalidWheelFilename):
            if needs(parse_wheel_filename(link.file)[1]).cxx11_abi is not None:
                raise _NotYetKnownError


def _exact(wheel: Wheel, link: Link) -> Chosen:
    """The file that a link names. Raises PackhorseError where its name says that it is something else."""
    try:
        name, version, _, _ = parse_wheel_filename(link.file)
    except InvalidWheelFilename as error:
        raise PackhorseError(
            f"{link.file} is not the name of a wheel: {error}.", "Give it the name that it was built with."
        ) from error
    if name != canonicalize_name(wheel.name):
        raise PackhorseError(
            f"{link.file} is a wheel of {name}, not of {wheel.name}.",
            "Correct the name, or the file, in [[environment.wheels]].",
        )
    address, _, fragment = link.url.partition("#")
    url = without_user(address)
    hashes = {key: value.lower() for key, value in _HASH.findall(fragment)}
    direct = {"url": without_credentials(url)}
    return Chosen(name, str(version), url, hashes, requested=True, direct=direct)
