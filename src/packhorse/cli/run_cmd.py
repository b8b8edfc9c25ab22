"""`packhorse run`: restore (or install and push), run a command, back up when it ends."""

from __future__ import annotations

from pathlib import Path

import click

from packhorse.cli import console, supervised


@console.without_json
@click.command("run", context_settings=supervised.SETTINGS)
@click.option("--snapshot", default="", metavar="ID", help="Take this snapshot, not the newest of the tag.")
@click.option(
    "--status-file",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=supervised.checked_file,
    help="Keep a JSON file that tells what happens.",
)
@click.option(
    "--profile",
    default="",
    metavar="NAME",
    callback=supervised.checked_profile,
    help="The order of files for an early start, and its name for the next; by default by CMD.",
)
@click.option(
    "--locked", is_flag=True, help="Fail unless a lock file is configured and fits the requirements."
)
@console.shared_options
@supervised.command_argument
def command(
    snapshot: str, status_file: Path | None, profile: str, locked: bool, words: tuple[str, ...]
) -> int:
    """Bring the environment up, run a command in it, and save what changed when it ends.

    Exits with the command's own code (128 + n if signal n killed it); 125 when packhorse fails, 126 when the
    command cannot be executed, 127 when it is not found.
    """
    from dataclasses import replace

    from packhorse.worker import run

    def action(call: run.Invocation) -> int:
        if locked:
            from packhorse.install import locked as lock_check

            lock_check.require(call.config.environment, call.environ)
        return run.run(replace(call, profile=profile), snapshot=snapshot, status_file=status_file)

    return supervised.call(words, action)
