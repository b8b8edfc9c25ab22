"""`packhorse profile`: run a command and record which files it opens."""

from __future__ import annotations

from pathlib import Path

import click

from packhorse.cli import console, supervised


@console.without_json
@click.command("profile", context_settings=supervised.SETTINGS)
@click.option(
    "--name",
    default="",
    metavar="NAME",
    callback=supervised.checked_profile,
    help="What the profile is called; by default by CMD.",
)
@click.option(
    "--for",
    "seconds",
    type=console.Number(0, min_open=True),
    metavar="SECONDS",
    help="Record no longer than this; the command goes on.",
)
@click.option(
    "--status-file",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=supervised.checked_file,
    help="Keep a JSON file that tells what happens.",
)
@console.shared_options
@supervised.command_argument
def command(name: str, seconds: float | None, status_file: Path | None, words: tuple[str, ...]) -> int:
    """Run a command in the environment of the root, and store which files of 64 KiB and more it opens, in which order and when.

    Exits with the command's own code (128 + n if signal n killed it); 125 when packhorse fails, 126 when the
    command cannot be executed, 127 when it is not found.
    """
    from packhorse.worker.profile import profile

    return supervised.call(
        words, lambda call: profile(call, name=name, seconds=seconds or 0.0, status_file=status_file)
    )
