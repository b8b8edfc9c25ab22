"""`packhorse install`: make packages/ what the configuration asks for, and check it."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import click

from packhorse.cli import console, context

if TYPE_CHECKING:
    from packhorse.install.environment import InstallResult


@click.command("install")
@click.option("--reinstall", is_flag=True, help="Install even if everything is up to date.")
@click.option(
    "--locked", is_flag=True, help="Fail unless a lock file is configured and fits the requirements."
)
@console.shared_options
def command(reinstall: bool, locked: bool) -> None:
    """Install the environment into the root and check it.

    What is there stays in force until the new environment is complete and its modules have been imported.
    """
    from packhorse.errors import PackhorseError
    from packhorse.install.environment import install

    loaded = context.load()
    if locked:
        from packhorse.install import locked as lock_check

        lock_check.require(loaded.environment, os.environ)
    root = context.open_root(loaded)
    if root.state().state == "partial" and not reinstall:
        raise PackhorseError(
            f"{root.path} is being restored: a pull has not been finished.",
            "Run `packhorse pull` first, or `packhorse install --reinstall` to build the environment anew.",
        )
    signal.signal(signal.SIGTERM, stop)
    with console.progress() as progress:
        done = install(
            root,
            loaded,
            os.environ,
            progress,
            console.note,
            reinstall=reinstall,
            on_wait=context.waiting,
        )
    console.result(done, _table(done))


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, so that pip is stopped and nothing half done stays."""
    sys.exit(128 + number)


def _table(done: InstallResult) -> str:
    from packhorse.cli import import_table

    size = f"{console.counted(done.distributions, 'distribution')}, {console.counted(done.files, 'file')}, {console.megabytes(done.bytes)}"
    if not done.installed:
        return f"Up to date: {size}."
    lines = import_table.lines(done.imports)
    if done.slim_files:
        slim = f"{console.counted(done.slim_files, 'file')}, {console.megabytes(done.slim_bytes)}"
        lines.append(f"Left out by the slim profile: {slim}.")
    lines += [
        f"Installed {size} in {done.seconds:.1f} s.",
        f"The root holds {console.megabytes(done.root_bytes)}, at its peak "
        f"{console.megabytes(done.peak_root_bytes)}; the OS disk grew by {console.megabytes(done.os_disk_bytes)}.",
        f"Log: {done.log}",
    ]
    return "\n".join(lines)
