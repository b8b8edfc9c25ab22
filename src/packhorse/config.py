"""packhorse.toml, the environment and the flags → one checked, typed Config.

Every value is checked before anything happens; an error names the place (file and key, variable or flag)
and what is allowed. The one module, beside redirect.py, that reads environment variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec


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
    verify: tuple[str, ...] = ()
    engine: Literal["auto", "pip"] = "auto"
    python: str = ""
    """The worker's interpreter; "" for the `python3` that the child's PATH gives."""
    profile: Literal["full"] = "full"
    keep_downloads: bool = False
    wheels: tuple[Wheel, ...] = ()

    @property
    def configured(self) -> bool:
        """Whether there is anything to install."""
        return bool(self.requirements or self.dependencies or self.wheels)


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


class Run(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """`[run]`: times are seconds; `backup_every` is 0 for off."""

    start: Literal["complete"] = "complete"
    on_missing: Literal["install", "fail"] = "install"
    on_restore_failure: Literal["fail", "install"] = "fail"
    backup: tuple[Literal["models", "deps", "pip"], ...] = ("models", "deps")
    stop_timeout: float = 4
    exclude: tuple[str, ...] = ("*.tmp", "*.incomplete")
    backup_every: float = 0
    grace: float = 8
    app_path: str = ""


class Config(msgspec.Struct, frozen=True):
    """All of it; `file` is the file it came from, if there was one, `environ` what was read beside it."""

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
    Relative paths in the file are relative to the file. Raises ConfigError.
    """
    raise NotImplementedError
