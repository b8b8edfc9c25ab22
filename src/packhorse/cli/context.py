"""What most commands begin with: the configuration of this invocation, its root and its store."""

from __future__ import annotations

import os
from pathlib import Path

import click

from packhorse import config
from packhorse.cli import console
from packhorse.errors import ConfigError
from packhorse.root import Root


def load() -> config.Config:
    """The configuration that the flags, the environment and the file give. Raises ConfigError."""
    flags = click.get_current_context().obj or {}
    return config.load(
        os.environ,
        working_directory(),
        config_file=flags.get("config_file"),
        root=flags.get("root", ""),
        store=flags.get("store", ""),
        tag=flags.get("tag", ""),
    )


def working_directory() -> Path:
    """Where this invocation works. Raises ConfigError where that was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise ConfigError("The working directory was removed.", "Change into one that is there.") from error


def repeated_flags() -> list[str]:
    """The shared flags of this invocation, for a process of packhorse's own that works on the same things."""
    flags = click.get_current_context().obj or {}
    named = {"--config": "config_file", "--root": "root", "--store": "store", "--tag": "tag"}
    given = [word for flag, key in named.items() if flags.get(key) for word in (flag, str(flags[key]))]
    return given + [f"--{key}" for key in ("quiet", "verbose") if flags.get(key)]


def open_root(loaded: config.Config) -> Root:
    """The root of the configuration, created where it is not there yet."""
    return Root.open(loaded.root)


def waiting(holder: str) -> None:
    """Say whom this command waits for."""
    console.note(f"waiting for {holder}, which is changing this root")


def mind_default_store(loaded: config.Config) -> None:
    """Warn where snapshots go to the OS disk because no store was named."""
    path = loaded.storage.directory
    if loaded.store_is_default and path is not None:
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        if existing.stat().st_dev == Path("/").stat().st_dev:
            console.warn(
                f"no store is configured, so snapshots go to {path}, on the OS disk; "
                "set storage.url to an object store to keep them"
            )
