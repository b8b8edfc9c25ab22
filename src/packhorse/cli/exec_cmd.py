"""`packhorse exec`: run a command in the environment of the root, as it is."""

from __future__ import annotations

import click

from packhorse.cli import console, supervised


@console.without_json
@click.command("exec", context_settings=supervised.SETTINGS)
@console.shared_options
@supervised.command_argument
def command(words: tuple[str, ...]) -> int:
    """Run a command in the environment of the root, without restoring before or saving after.

    Exits with the command's own code (128 + n if signal n killed it); 125 when packhorse fails, 126 when the
    command cannot be executed, 127 when it is not found.
    """
    from packhorse.worker import run

    return supervised.call(words, run.execute)
