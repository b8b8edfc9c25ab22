"""The `packhorse` command: one module a command, loaded when it is called, so that `run` starts at once."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import time
from typing import Any


def _forget_packages() -> None:
    """Import nothing from the packages of the root that this process was started under: its own may differ."""
    packages = os.path.join(os.environ.get("PACKHORSE_ROOT", ""), "packages")
    if os.path.isabs(packages) and not __file__.startswith(packages + os.sep):
        sys.path[:] = [path for path in sys.path if not f"{path}{os.sep}".startswith(packages + os.sep)]


_forget_packages()

import click  # noqa: E402

from packhorse import __version__  # noqa: E402
from packhorse.cli import console  # noqa: E402
from packhorse.errors import EXIT_SUPERVISOR, ConfigError, PackhorseError  # noqa: E402

COMMANDS = {
    "init": "Write a commented packhorse.toml.",
    "install": "Install the environment into the root and check it.",
    "lock": "Write down exactly what is to be installed, in pylock.toml.",
    "push": "Save the root as a snapshot in the store.",
    "pull": "Restore a snapshot into the root.",
    "run": "Restore (or install and push), then run a command; back up when it ends.",
    "exec": "Run a command in the environment of the root.",
    "profile": "Run a command and record which files it opens.",
    "env": "Print the environment table, for eval.",
    "status": "Show the root, the disks, the store and what it costs.",
    "doctor": "Look for what is wrong with the root, and say what to do.",
    "snapshots": "List the snapshots of the store.",
    "diff": "Show what changed between two snapshots.",
    "verify": "Check the files of the root against their digests.",
    "prune": "Delete from the store what no tag needs.",
    "bench": "Measure a cold start here, restored, installed anew and by a plain pip.",
    "demo": "Show the main job on a small environment and an embedded store.",
}
_HIDDEN = ("boot", "backup", "flush", "record")  # the processes that `run`, `exec` and `profile` start
_SUPERVISORS = ("run", "exec", "profile")
_STORING = ("push", "pull", "status", "snapshots", "diff", "verify", "prune")
"""They may wait for a store, and leave nothing behind that the next command does not mend."""
_AFTER_INTERRUPT = 1.5
"""Seconds that they have to end by themselves."""
_INTERRUPTED = "packhorse: interrupted."


class _Commands(click.Group):
    """Finds a command's module by its name."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*args, **extra)
        except BrokenPipeError:  # of --help and --version
            raise click.exceptions.Exit(141) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would make 1 of it
            return 141

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS and cmd_name not in _HIDDEN:
            return None
        module = importlib.import_module(f"packhorse.cli.{cmd_name}_cmd")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from difflib import get_close_matches

            close = get_close_matches(name, COMMANDS, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            ctx.fail(f"There is no command `{name}`.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="packhorse %(version)s")
def packhorse() -> None:
    """Keep heavy Python environments off the small OS disk of a worker, keep them in object storage, and
    bring them back at boot.

    \b
    packhorse init                      write packhorse.toml
    packhorse run -- python handler.py  restore or install, then start
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the code that `errors.py` gives each failure."""
    _keep_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        # Paths are bytes, and → is not in Latin-1.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if arguments is None else arguments
    command = _command_of(words)
    if command in _STORING:
        _end_when_interrupted()
    code = _outcome(words, command in _SUPERVISORS)
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            # Told already. The interpreter would complain once more when it ends, with a code of its own.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    # The interpreter would wait for a thread that waits for a store, for minutes. And a thread of obstore that hands over
    # an answer while the interpreter ends aborts the process.
    os._exit(code)


def _end_when_interrupted() -> None:
    """Have SIGINT end this process also where the interpreter does not get to it: while it waits for a store."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # written to at once, by the C handler

    if os.getpid() == 1:  # the kernel drops what process 1 does not handle
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    def end() -> None:
        while (number := os.read(told, 1)[0]) not in (signal.SIGINT, signal.SIGTERM):
            pass
        if number == signal.SIGTERM:
            os._exit(128 + number)
        time.sleep(_AFTER_INTERRUPT)
        os.write(2, f"{_INTERRUPTED}\n".encode())
        os._exit(130)

    threading.Thread(target=end, name="interrupt", daemon=True).start()


def _keep_standard_descriptors() -> None:
    """Open what was closed of stdin, stdout and stderr: else a file of ours gets its number, and a child writes into it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


def _command_of(words: list[str]) -> str:
    return next((word for word in words if not word.startswith("-")), "")


def _path_of_help(error: click.ClickException, words: list[str]) -> str:
    """The command whose --help tells more; click knows none of an option without its value."""
    context: click.Context | None = getattr(error, "ctx", None)
    if context is not None:
        return context.command_path
    command = _command_of(words)
    return f"packhorse {command}" if command in COMMANDS else "packhorse"


def _outcome(words: list[str], supervisor: bool) -> int:
    try:
        answer: object = packhorse.main(args=words, prog_name="packhorse", standalone_mode=False)
        return answer if isinstance(answer, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):  # click makes the one of the other
        print(_INTERRUPTED, file=sys.stderr)  # noqa: T201
        return 130
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        code = EXIT_SUPERVISOR if supervisor else ConfigError.exit_code
        if supervisor:  # their stdout is the child's alone
            console.keep_stdout()
        else:
            console.want_json_if_asked(words)
        helps = _path_of_help(error, words)
        what = error.format_message()
        what += "" if what.endswith((".", "?")) else "."  # click leaves it out now and then
        refused = ConfigError(what, f"`{helps} --help` shows what is allowed.")
        if (
            isinstance(error, click.NoSuchOption)
            and helps == "packhorse"
            and error.option_name in console.SHARED
        ):
            option = error.option_name
            refused = ConfigError(
                f"{option} stands behind the command's name.", f"Write `packhorse COMMAND {option}`."
            )
        console.show_error(refused, code)
        return code
    except PackhorseError as error:
        console.show_error(error, EXIT_SUPERVISOR if supervisor else error.exit_code)
        return EXIT_SUPERVISOR if supervisor else error.exit_code
    except Exception as error:  # a bug, or an operating system error nobody expected
        known = console.operating_system_error(error)
        console.show_error(known, EXIT_SUPERVISOR if supervisor else known.exit_code)
        return EXIT_SUPERVISOR if supervisor else known.exit_code
