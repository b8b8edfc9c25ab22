"""What a person or a program sees: results on stdout, progress and notes on stderr, errors in two sentences.

Knows how to print; decides nothing. A stderr that fails (its reader is gone, its disk full) ends nothing: what else there is to
say is lost.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click

from packhorse.errors import NoSpaceError, PackhorseError, is_full
from packhorse.progress import Progress, Silent

_settings = {"json": False, "quiet": False, "verbose": False}
F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")

_PLACES = ("--config", "--root", "--store", "--tag")
SHARED = (*_PLACES, "--json", "-q", "--quiet", "-v", "--verbose")
"""The flags that every command has."""


def shared_options(function: F) -> F:
    """The flags that every command has; they reach the command as one `flags: Flags`."""

    def received(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
        flags = ctx.ensure_object(dict)
        assert parameter.name is not None
        flags[parameter.name] = value
        if parameter.name in _settings:
            _settings[parameter.name] = bool(value)

    for option in reversed(
        (
            click.option("--config", "config_file", type=click.Path(path_type=Path, dir_okay=False),
                         expose_value=False, callback=received, help="The configuration file to use."),
            click.option("--root", default="", expose_value=False, callback=received, metavar="DIR",
                         help="The directory that holds everything."),
            click.option("--store", default="", expose_value=False, callback=received, metavar="URL",
                         help="Where snapshots live: s3://, gs://, az://, file:/// or a directory."),
            click.option("--tag", default="", expose_value=False, callback=received, metavar="NAME",
                         help="The tag that names the newest snapshot."),
            click.option("--json", is_flag=True, expose_value=False, callback=received,
                         help="Print one JSON object on stdout."),
            click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=received,
                         help="No progress and no notes."),
            click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=received,
                         help="More detail; tracebacks of failures."),
        )
    ):  # fmt: skip
        function = option(function)
    return function


class Number(click.FloatRange):
    """A number of a range: click takes `nan` for one that lies in every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or click.BadParameter."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


class Finite(Number):
    """A number of a range, and one to count with."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or click.BadParameter."""
        number = super().convert(value, param, ctx)
        if math.isinf(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


def without_places(command: click.Command) -> click.Command:
    """Keep the flags that name a configuration, a root or a store out of the help of a command that refuses them."""
    return _without(command, _PLACES)


def without_json(command: click.Command) -> click.Command:
    """Keep --json out of the help of a command whose stdout is the child's alone."""
    return _without(command, ("--json",))


def _without(command: click.Command, names: Collection[str]) -> click.Command:
    for option in command.params:
        if isinstance(option, click.Option) and option.opts[0] in names:
            option.hidden = True
    return command


def verbose() -> bool:
    """Whether -v was given."""
    return _settings["verbose"]


def want_json_if_asked(words: Sequence[str]) -> None:
    """Take --json from a command line that cannot be parsed."""
    own = words[: words.index("--")] if "--" in words else words
    _settings["json"] = _settings["json"] or "--json" in own


def wants_json() -> bool:
    """Whether --json was given."""
    return _settings["json"]


def keep_stdout() -> None:
    """Leave stdout to the child: from here on nothing is printed there, --json or not."""
    _settings["json"] = False


def unfailing(say: Callable[P, None]) -> Callable[P, None]:
    """`say`, which prints to stderr; when that fails nothing more is printed there by this process."""

    @functools.wraps(say)
    def said(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            say(*args, **kwargs)
        except BaseException as error:
            # What is in the buffer would fail again when the interpreter ends. The descriptor stays: a child has it too.
            sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115
            if not isinstance(error, OSError):  # a signal ended the wait for whoever reads stderr
                raise

    return said


@unfailing
def note(text: str) -> None:
    """One line for the person at the terminal or in the log."""
    if not _settings["quiet"]:
        click.echo(f"packhorse: {text}", err=True)


@unfailing
def warn(text: str) -> None:
    """One line that is printed even with -q."""
    click.echo(f"packhorse: warning: {text}", err=True)


def result(facts: object, text: str) -> None:
    """The outcome of a command: `facts` (anything msgspec can encode) with --json, else `text`."""
    if _settings["json"]:
        click.echo(_json(facts))
    elif text:
        click.echo(text)


def show_error(error: PackhorseError, exit_code: int) -> None:
    """Print a failure: two sentences on stderr; with --json also an object on stdout."""
    _print_error(error)
    if _settings["json"]:
        facts = {"error": error.what, "remedy": error.remedy, "exit_code": exit_code}
        with contextlib.suppress(OSError):  # it may be stdout that failed
            click.echo(_json(facts))


def _json(facts: object) -> str:
    import msgspec

    try:
        return msgspec.json.encode(facts).decode()
    except UnicodeEncodeError:  # a path that is not UTF-8; this writes its bytes as \\udcXX
        import json

        return json.dumps(msgspec.to_builtins(facts), separators=(",", ":"))


@unfailing
def _print_error(error: PackhorseError) -> None:
    if _settings["verbose"]:
        import traceback

        traceback.print_exception(error)
    click.echo(f"packhorse: {error}", err=True)


def operating_system_error(error: Exception) -> PackhorseError:
    """The error to show for one that no code expected."""
    if is_full(error):
        where = f"while writing {_readable(error.filename)}" if error.filename else "on the disk"
        known: PackhorseError = NoSpaceError(
            f"There is no space left {where}.",
            "Free some space, or choose a root on a larger disk with --root.",
        )
    elif isinstance(error, OSError):
        where = f"{_readable(error.filename)}: " if error.filename else ""
        known = PackhorseError(
            f"The operating system refused: {where}{error.strerror or error}.",
            _whose(error) or "Run again with -v to see where.",
        )
    elif isinstance(error, RuntimeError) and "start new thread" in str(error):
        known = PackhorseError(
            "No further thread could be started: a limit of processes or of memory is reached.",
            "Raise it (the container's pids limit, `ulimit -u`), or end other processes.",
        )
    else:
        known = PackhorseError(
            f"packhorse met a fault of its own: {type(error).__name__}: {error}.",
            "Run again with -v and report what it prints.",
        )
    known.__cause__ = error
    return known


def _whose(error: OSError) -> str:
    """What to do where a file is somebody else's."""
    if error.errno not in (errno.EPERM, errno.EACCES) or not isinstance(error.filename, (str, bytes)):
        return ""
    try:
        owner = os.lstat(error.filename).st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    return (
        f"It belongs to user {owner}, not to you (user {os.geteuid()}): change its owner, or choose another root "
        "with --root."
    )


def _readable(name: object) -> str:
    return (
        os.fsdecode(name).encode(errors="backslashreplace").decode()
        if isinstance(name, (str, bytes))
        else str(name)
    )


class _Lines:
    """One plain line every few seconds, for logs."""

    interval = 5.0

    def __init__(self) -> None:
        self.name, self.total, self.done = "", 0, 0
        self.started = self.last = time.monotonic()

    @unfailing
    def stage(self, name: str, total: int | None = None) -> None:
        self.name, self.total, self.done = name, total or 0, 0
        self.started = self.last = time.monotonic()
        click.echo(f"packhorse: {name}" + (f" ({megabytes(total)})" if total else ""), err=True)

    @unfailing
    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        self.last = now
        rate = self.done / (now - self.started)
        left = f", {max(self.total - self.done, 0) / rate:.0f} s left" if self.total and rate else ""
        of = f" of {megabytes(self.total)}" if self.total else ""
        click.echo(f"packhorse: {self.name}: {megabytes(self.done)}{of}, {megabytes(rate)}/s{left}", err=True)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """Bars on a terminal, plain lines on a pipe, nothing with -q."""
    if _settings["quiet"]:
        yield Silent()
    elif sys.stderr is None or not sys.stderr.isatty():
        yield _Lines()
    else:
        from packhorse.cli.bars import Bars

        with Bars() as bars:
            yield bars


def megabytes(count: float) -> str:
    """A byte count for people, in decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def counted(number: int, noun: str) -> str:
    """A number of things: "1 file", "41,398 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
