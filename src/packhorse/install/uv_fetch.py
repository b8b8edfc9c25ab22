"""uv, where it is wanted and not there: its wheel from the index → `deps/bin` of the root.

Promises the network policy and the hashes of any other wheel, and that a uv in `deps/bin` is a whole one.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence

from packhorse import atomic
from packhorse.errors import PackhorseError
from packhorse.install import access, uv
from packhorse.install.downloads import Downloads, RefusedError, checked
from packhorse.install.pip import Engine


def fetch(engine: Engine, sources: Sequence[str]) -> str:
    """Bring uv into the root; returns its path. `sources` are the lines that tell pip where to look.

    Raises PackhorseError where no index has one for this platform, NetworkError, IntegrityError.
    """
    requirement = f"uv>={uv.OLDEST}"
    options = ("--no-deps", "--only-binary", ":all:")
    try:
        found = engine.resolve((), [*sources, requirement], engine.session.tmp / "target", *options)
    except PackhorseError as error:
        raise PackhorseError(
            f'environment.engine is "uv", which is not there, and cannot be fetched: {error.what}',
            f'Install uv (`pip install uv`), or take engine = "auto". {error.remedy}',
        ) from error
    chosen = next((each for each in found or () if each.name == "uv"), None)
    if chosen is None:
        raise PackhorseError(
            'environment.engine is "uv", and there is none on PATH or in deps/bin of the root.',
            'Install uv (`pip install uv`), or take engine = "auto".',
        )
    engine.progress.stage("fetching uv")
    reached = access.access(engine.pip_settings, sources, engine.pip_environ, engine.command.python)
    downloads = Downloads(reached, engine.settings, engine.note, sleep=engine.sleep)
    path = chosen.local
    if path is None:
        path = engine.session.tmp / chosen.file
        try:
            downloads.fetch(chosen.url, path, chosen.hashes, chosen.size)
        except RefusedError as error:
            raise PackhorseError(
                f"{chosen.file} cannot be downloaded: {error}.",
                "Give its credentials in ~/.netrc or in the URL of the index, or install uv yourself.",
            ) from error
    else:
        checked(chosen.file, path, chosen.hashes, {}, chosen.url)
    target = engine.session.root.deps / "bin" / "uv"
    os.makedirs(target.parent, exist_ok=True)
    atomic.write_file(target, _program(str(path), chosen.file), mode=0o755)
    if chosen.local is None:
        path.unlink()
    engine.note(f"uv {chosen.version} was fetched into {target.parent}")
    return str(target)


def _program(wheel: str, file: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".data/scripts/uv")]
            return archive.read(names[0])
    except (zipfile.BadZipFile, IndexError) as error:
        raise PackhorseError(
            f"{file} is not a wheel of uv that can be used.", 'Install uv yourself, or take engine = "auto".'
        ) from error
