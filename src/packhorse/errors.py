"""Every error a user can meet: one sentence on what happened, one on what to do, and the exit code.

Knows nothing of the rest of the package, so that every other module may raise from here.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TypeGuard

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are not the document they should be."""


class PackhorseError(Exception):
    """The operation failed. Base of all errors that are shown without a traceback.

    `what` says what happened and `remedy` what to do next; both are whole sentences and hold no secret.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        joint = "\n" if "\n" in self.what else " "  # `what` may end with lines that a program printed
        return f"{self.what}{joint}{self.remedy}".strip()


class ConfigError(PackhorseError):
    """The configuration or the command line cannot be used."""

    exit_code = 2


class NoSuchSnapshotError(PackhorseError):
    """The tag or snapshot asked for does not exist, or none fits this worker."""

    exit_code = 3


class IntegrityError(PackhorseError):
    """Stored or local bytes are not what their digest says; nothing of them was made visible."""

    exit_code = 4


class NoSpaceError(PackhorseError):
    """A disk has, or would have, too little space."""

    exit_code = 5


class StorageError(PackhorseError):
    """The store cannot be reached, or refuses the credentials."""

    exit_code = 6


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether the operating system says that a disk, or a quota on it, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def unless_full(told: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Go on where a disk is full, once that was `told`: for what spares work, and is not needed."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        told()


MEND = "`packhorse push --repair` from a root that still has this mends it; else use another snapshot."
"""The remedy for objects of a store that are corrupt or gone."""

# What `run` and `exec` answer when it is packhorse that failed, not the command (as docker does).
EXIT_SUPERVISOR = 125
EXIT_CANNOT_EXECUTE = 126
EXIT_NOT_FOUND = 127


class CannotStartError(PackhorseError):
    """The command of `run` or `exec` cannot be executed."""

    exit_code = EXIT_CANNOT_EXECUTE


class CommandNotFoundError(CannotStartError):
    """The command of `run` or `exec` is not there."""

    exit_code = EXIT_NOT_FOUND
