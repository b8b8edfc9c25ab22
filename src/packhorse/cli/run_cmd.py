"""`packhorse run`: restore (or install and push), run a command, back up when it ends."""

from __future__ import annotations

from pathlib import Path

import click

from packhorse.cli import console, supervised


@click.command("run", context_settings=supervised.SETTINGS)
@click.option("--snapshot", default="", metavar="ID", help="Take this snapshot, not the newest of the tag.")
@click.option(
    "--status-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep a JSON file that tells what happens.",
)
@console.shared_options
@supervised.command_argument
def command(snapshot: str, status_file: Path | None, words: tuple[str, ...]) -> int:
    """Bring the environment up, run a command in it, and save what changed when it ends.

    Exits with the command's own code (128 + n if signal n killed it); 125 when packhorse fails, 126 when the
    command cannot be executed, 127 when it is not found.
    """
    from packhorse.worker import run

    return supervised.call(words, lambda call: run.run(call, snapshot=snapshot, status_file=status_file))
