"""What `run` and `exec` share: their command line, the supervisor, and a stdout that is the child's alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from packhorse.cli import console, context
from packhorse.errors import CannotStartError

if TYPE_CHECKING:
    from packhorse.worker.run import Invocation

SETTINGS: dict[str, Any] = {"allow_interspersed_args": False}
"""The first word that is no option begins the command, with or without `--`."""

command_argument = click.argument(
    "words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD..."
)


def checked_profile(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    """The name of a profile. Raises BadParameter."""
    if value:
        import re

        from packhorse import profile_name

        if not re.fullmatch(profile_name.PATTERN, value):
            raise click.BadParameter(
                "a name is a letter or digit, then up to 63 letters, digits, `.`, `_` and `-`."
            )
    return value


def checked_file(ctx: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """The path of a file. Raises BadParameter for an empty one, of which click makes the working directory."""
    if value == Path():
        raise click.BadParameter("a file is expected.")
    return value


def call(words: tuple[str, ...], action: Callable[[Invocation], int]) -> int:
    """Do `action` for the command `words` and return the exit code. Raises PackhorseError."""
    from packhorse.worker.run import Invocation, Speech
    from packhorse.worker.supervise import Stopped, Supervisor

    console.keep_stdout()
    supervisor = Supervisor()
    try:
        with supervisor.interruptible():
            loaded = context.load()
            supervisor.grace = loaded.run.grace
            root = context.open_root(loaded)
        return action(
            Invocation(
                config=loaded,
                root=root,
                command=words,
                # Who called us may have an entry without a name, which nothing can be started with.
                environ={name: value for name, value in os.environ.items() if name},
                flags=context.repeated_flags(),
                speech=Speech(console.note, supervisor.unhurried(console.warn)),
                supervisor=supervisor,
            )
        )
    except Stopped as stopped:
        return stopped.exit_code
    except CannotStartError as error:
        console.show_error(error, error.exit_code)
        return error.exit_code
    finally:
        supervisor.say_the_rest()
