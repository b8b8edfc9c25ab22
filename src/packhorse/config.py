"""packhorse.toml, the environment and the flags → one checked, typed Config.

Every value is checked before anything happens; an error names the place (file and key, variable or flag)
and what is allowed. The one module, beside redirect.py, that reads environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from packhorse import config_values as values
from packhorse.config_values import Check, Place, printable
from packhorse.errors import ConfigError

Engine = Literal["auto", "uv", "pip"]
Profile = Literal["full", "slim"]
Start = Literal["complete", "ready", "early"]
OnMissing = Literal["install", "fail"]
OnRestoreFailure = Literal["fail", "install"]
Backup = Literal["models", "deps", "pip"]


class Wheel(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """One `[[environment.wheels]]`: installed last, from `url`, `path` or by `version` from `find_links`."""

    name: str
    version: str = ""
    url: str = ""
    path: str = ""
    find_links: tuple[str, ...] = ()


class Environment(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """`[environment]`: what is installed. Paths are absolute after `load`."""

    requirements: tuple[str, ...] = ()
    dependencies: tuple[str, ...] = ()
    lock: str = ""
    """A pylock.toml (PEP 751); "" for none."""
    verify: tuple[str, ...] = ()
    engine: Engine = "auto"
    python: str = ""
    """The worker's interpreter; "" for the `python3` that the child's PATH gives."""
    profile: Profile = "full"
    slim_keep: tuple[str, ...] = ()
    slim_remove: tuple[str, ...] = ()
    keep_downloads: bool = False
    wheels: tuple[Wheel, ...] = ()

    @property
    def configured(self) -> bool:
        """Whether there is anything to install."""
        return bool(self.requirements or self.dependencies or self.lock or self.wheels)

    def check_files(self) -> None:
        """Raise ConfigError unless every file and directory named here is there.

        Not part of `load`: a worker that only restores needs none of the wheels.
        """
        named = [("requirements", path) for path in self.requirements]
        named += [("lock", self.lock)] if self.lock else []
        for wheel in self.wheels:
            links = (link for link in wheel.find_links if "://" not in link)
            named += [("wheels", path) for path in (wheel.path, *links) if path]
        for key, path in named:
            if not os.path.exists(path):
                make = "`packhorse lock` makes it" if key == "lock" else "Create it"
                raise ConfigError(
                    f"{printable(path)}, named in environment.{key}, does not exist.",
                    f"{make}, or correct the configuration.",
                )


class Network(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """`[network]`: attempts, and seconds without a byte, for small and for large wheels (bytes)."""

    attempts: int = 3
    timeout_small: float = 120
    timeout_large: float = 600
    large_size: int = 100_000_000
    large_attempts: int = 10


class Storage(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """`[storage]`: where snapshots live. `url` is never empty after `load`."""

    url: str = ""
    endpoint: str = ""
    region: str = ""
    tag: str = "main"

    @property
    def directory(self) -> Path | None:
        """The directory of a `file://` store; None for others."""
        from urllib.parse import unquote

        return Path(unquote(self.url.removeprefix("file://"))) if self.url.startswith("file:") else None


class Run(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """`[run]`: times are seconds; `backup_every` is 0 for off."""

    start: Start = "complete"
    gpu: str = "auto"
    on_missing: OnMissing = "install"
    on_restore_failure: OnRestoreFailure = "fail"
    backup: tuple[Backup, ...] = ("models", "deps")
    stop_timeout: float = 4
    exclude: tuple[str, ...] = ("*.tmp", "*.incomplete")
    backup_every: float = 0
    grace: float = 8
    app_path: str = ""


class Config(msgspec.Struct, frozen=True):
    """All of it; `file` is the file it came from, if there was one."""

    root: Path
    environment: Environment
    network: Network
    storage: Storage
    run: Run
    file: Path | None = None
    store_is_default: bool = False
    """The embedded store beside the root was taken because none was named."""


def load(
    environ: Mapping[str, str],
    directory: Path,
    *,
    config_file: Path | None = None,
    root: str = "",
    store: str = "",
    tag: str = "",
) -> Config:
    """The configuration of a command started in `directory`.

    Flags (`config_file`, `root`, `store`, `tag`; "" is not given) win over PACKHORSE_... variables, they over
    the file, found upwards from `directory`: packhorse.toml, else a pyproject.toml with [tool.packhorse].
    Relative paths in the file are relative to the file, all others to `directory`. Raises ConfigError.
    """
    directory = Path(os.path.abspath(directory))
    file, content = _find(environ, directory, config_file)
    settings = {
        **_from_file(file, content, environ),
        **_from_variables(environ, directory),
        **_from_flags({"root": root, "store": store, "tag": tag}, environ, directory),
    }
    settings.setdefault("root", _Setting(_default_root(environ), ""))
    chosen = Path(settings["root"].value)
    settings.setdefault("storage.url", _Setting(Path(f"{chosen}-store").as_uri(), ""))
    _refuse_store_inside(chosen, settings["storage.url"])
    _settle_stop_timeout(settings)
    return Config(
        root=chosen,
        environment=Environment(**_fields("environment", settings)),
        network=Network(**_fields("network", settings)),
        storage=Storage(**_fields("storage", settings)),
        run=Run(**_fields("run", settings)),
        file=file,
        store_is_default=not settings["storage.url"].where,
    )


# --- keys ---


def _wheel(value: object, place: Place) -> Wheel:
    given = values.table(value, place, _WHEEL)
    if "name" not in given:
        raise ConfigError(f"{place.name}: the name is missing.", 'Say which package it is: name = "...".')
    sources = [key for key in ("url", "path", "find-links") if given.get(key)]
    if len(sources) != 1:
        raise ConfigError(
            f"{place.name}: expected exactly one of url, path and find-links, got {' and '.join(sources) or 'none'}.",
            "Keep the one that has the wheel; what the package index has belongs in dependencies.",
        )
    if "version" in given and sources != ["find-links"]:
        raise ConfigError(
            f"{place.name}: version goes with find-links only.",
            f"Take it out: the file's name in {sources[0]} tells the version.",
        )
    return Wheel(**{key.replace("-", "_"): each for key, each in given.items()})


_WHEEL: dict[str, Check] = {
    "name": values.pattern(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", "the name of a package"),
    "version": values.pattern(r"[0-9A-Za-z][0-9A-Za-z.!+_-]*", 'an exact version such as "2.8.0.post2"'),
    "url": values.wheel_url,
    "path": values.wheel_path,
    "find-links": values.list_of(values.links),
}

TAG = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What can be a tag."""
_PATTERN = values.pattern(r".+", "a pattern of file names")

_TABLES: dict[str, dict[str, Check]] = {
    "environment": {
        "requirements": values.list_of(values.file),
        "dependencies": values.list_of(values.requirement),
        "lock": values.file,
        "verify": values.list_of(values.module),
        "engine": values.one_of(Engine),
        "python": values.interpreter,
        "profile": values.one_of(Profile),
        "slim-keep": values.list_of(_PATTERN),
        "slim-remove": values.list_of(_PATTERN),
        "keep-downloads": values.boolean,
        "wheels": values.list_of(_wheel),
    },
    "network": {
        "attempts": values.count,
        "timeout-small": values.seconds,
        "timeout-large": values.seconds,
        "large-size": values.size,
        "large-attempts": values.count,
    },
    "storage": {
        "url": values.store,
        "endpoint": values.endpoint,
        "region": values.pattern(r"[A-Za-z0-9-]{1,64}", 'the name of a region, such as "us-west-004"'),
        "tag": values.pattern(
            TAG,
            "at most 64 letters, digits, dots, dashes and underscores, a letter or digit first",
        ),
    },
    "run": {
        "start": values.one_of(Start),
        "gpu": values.gpu,
        "on-missing": values.one_of(OnMissing),
        "on-restore-failure": values.one_of(OnRestoreFailure),
        "backup": values.list_of(values.one_of(Backup)),
        "stop-timeout": values.seconds,
        "exclude": values.list_of(_PATTERN),
        "backup-every": values.interval,
        "grace": values.seconds,
        "app-path": values.search_directory,
    },
}

_HOMES = {key: name for name, checks in _TABLES.items() for key in checks}
_FILE: dict[str, Check] = {
    "root": values.root,
    **{name: partial(values.table, checks=checks, homes=_HOMES) for name, checks in _TABLES.items()},
}

_KEYS: dict[str, Check] = {
    "root": values.root,
    **{f"{name}.{key}": check for name, checks in _TABLES.items() for key, check in checks.items()},
}


def variable(key: str) -> str:
    """The environment variable of a key: `storage.url` is PACKHORSE_STORAGE_URL."""
    return "PACKHORSE_" + key.replace(".", "_").replace("-", "_").upper()


# --- layers ---


class _Setting(NamedTuple):
    """A checked value, and where it stands ("" for a default)."""

    value: Any
    where: str


_Layer = dict[str, _Setting]
"""By the dotted name of the key."""

_FLAGS = {"root": "root", "store": "storage.url", "tag": "storage.tag"}
_FILE_VARIABLE = "PACKHORSE_CONFIG"


def _find(
    environ: Mapping[str, str], directory: Path, flag: Path | None
) -> tuple[Path | None, dict[str, Any]]:
    """The configuration file and its tables; None and {} where there is none."""
    named = str(flag) if flag is not None else environ.get(_FILE_VARIABLE, "")
    if named:
        where = "--config" if flag is not None else _FILE_VARIABLE
        file = Path(values.path(named, Place(where, directory, environ)))
        content = _read(file)
        if content is None:
            raise ConfigError(f"{printable(file)}, named by {where}, has no [tool.packhorse].", "Add it.")
        return file, content
    for folder in (directory, *directory.parents):
        for file in (folder / "packhorse.toml", folder / "pyproject.toml"):
            content = _read(file) if os.path.isfile(file) else None
            if content is not None:
                if folder != directory:
                    _refuse_foreign(file)
                return file, content
    return None, {}


def _refuse_foreign(file: Path) -> None:
    """A file that another user put above this directory, say into /tmp, could name programs to run."""
    owner = os.stat(file).st_uid
    if owner not in (0, os.geteuid()):
        raise ConfigError(
            f"{printable(file)} belongs to user {owner}, not to you (user {os.geteuid()}).",
            f"If you trust it, name it: --config {printable(file)}.",
        )


def _read(file: Path) -> dict[str, Any] | None:
    """The configuration in a file; None for a pyproject.toml without [tool.packhorse]."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(
            f"{printable(file)} cannot be read: {reason}.",
            "Correct it, or name another file with --config.",
        ) from error
    if file.name != "pyproject.toml":
        return values.toml(text, printable(file))
    if "packhorse" not in text:
        return None
    tool = values.toml(text, printable(file)).get("tool", {})
    return tool.get("packhorse") if isinstance(tool, dict) else None


def _from_file(file: Path | None, content: dict[str, Any], environ: Mapping[str, str]) -> _Layer:
    if file is None:
        return {}
    inside = "tool.packhorse" if file.name == "pyproject.toml" else ""
    place = Place(f"{printable(file)}: {inside}", file.parent, environ)
    layer: _Layer = {}
    for name, checked in values.table(content, place, _FILE, _HOMES).items():
        entries = (
            {f"{name}.{key}": each for key, each in checked.items()} if name in _TABLES else {name: checked}
        )
        layer |= {key: _Setting(each, place.below(key).name) for key, each in entries.items()}
    url = layer.get("storage.url")
    if "storage.endpoint" in layer and url is not None and url.value.startswith("file:"):
        bucket = values.as_bucket(content["storage"]["url"]) or "s3://BUCKET/PREFIX"
        raise ConfigError(
            f"{url.where}: this is a directory, but storage.endpoint names a service.",
            f"Write the bucket as {bucket}, or take the endpoint out.",
        )
    return layer


def _from_variables(environ: Mapping[str, str], directory: Path) -> _Layer:
    """An empty variable counts as not set."""
    known = {variable(key): key for key in _KEYS}
    layer = {}
    for name, text in environ.items():
        if name in known and text.strip():
            place = Place(name, directory, environ, text=True)
            layer[known[name]] = _Setting(_KEYS[known[name]](text.strip(), place), name)
        elif name.startswith("PACKHORSE_") and name not in known and name != _FILE_VARIABLE:
            _refuse_mistaken(Place(name, directory, environ), list(known))
    return layer


def _refuse_mistaken(place: Place, known: list[str]) -> None:
    """Raise ConfigError for a variable that was meant for one of ours; others may begin with our name."""
    word = place.name.removeprefix("PACKHORSE_")
    siblings = [name for name in known if name.startswith(f"PACKHORSE_{word.split('_')[0]}_")]
    meant = variable(_FLAGS[word.lower()]) if word.lower() in _FLAGS else place.name
    hint = values.did_you_mean(meant, known, likeness=0.9)
    if siblings or hint:
        place.refuse_unknown("variable", hint, siblings)


def _from_flags(flags: Mapping[str, str], environ: Mapping[str, str], directory: Path) -> _Layer:
    layer = {}
    for flag, text in flags.items():
        if text:
            place = Place(f"--{flag}", directory, environ, text=True)
            layer[_FLAGS[flag]] = _Setting(_KEYS[_FLAGS[flag]](text, place), place.name)
    return layer


# --- what belongs together ---


def _default_root(environ: Mapping[str, str]) -> str:
    on_runpod = environ.get("RUNPOD_POD_ID") or environ.get("RUNPOD_ENDPOINT_ID")
    return "/tmp/runpod-cache" if on_runpod else "/tmp/packhorse"  # noqa: S108 - Root.open refuses others' roots


def _refuse_store_inside(root: Path, url: _Setting) -> None:
    directory = Storage(url.value).directory
    if directory is not None and directory.is_relative_to(root):
        raise ConfigError(
            f"{url.where}: the store {printable(directory)} lies inside the root {printable(root)}.",
            "Choose a directory outside the root: what is inside becomes part of the snapshots.",
        )


def _settle_stop_timeout(settings: _Layer) -> None:
    """The child is killed before everything must end; by default at half of a short grace."""
    grace = settings["run.grace"].value if "run.grace" in settings else Run().grace
    stop = settings.setdefault("run.stop-timeout", _Setting(min(Run().stop_timeout, grace / 2), ""))
    if stop.value > grace:
        raise ConfigError(
            f"{stop.where}: expected at most run.grace, which is {grace:g} seconds, got {stop.value:g}.",
            "Shorten it, or lengthen run.grace up to what the platform gives.",
        )


def _fields(table: str, settings: _Layer) -> dict[str, Any]:
    prefix = f"{table}."
    return {
        key.removeprefix(prefix).replace("-", "_"): setting.value
        for key, setting in settings.items()
        if key.startswith(prefix)
    }
