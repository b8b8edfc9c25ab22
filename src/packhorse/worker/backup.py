"""Backup: save what changed in the `backup` directories, in a process of its own, by a deadline if there is one."""

from __future__ import annotations

import time
from collections.abc import Callable

from packhorse.progress import Progress
from packhorse.transfer.push import PushResult, push
from packhorse.transfer.setup import Setup

SHARE_FOR_READING = 0.6
"""How much of the time until the deadline goes into frames; the rest is for the last pack and the tag."""


def backup(
    setup: Setup, progress: Progress, warn: Callable[[str], None], *, seconds: float | None = None
) -> PushResult:
    """Save the directories of `run.backup`; within `seconds`, if given, as much of them as fits.

    What is left out is named in the result and joins the next backup. Raises StorageError.
    """
    deadline = None if seconds is None else time.monotonic() + SHARE_FOR_READING * seconds
    return push(
        setup.root,
        setup.store,
        setup.config.storage.tag,
        interpreter=lambda: setup.interpreter,
        progress=progress,
        warn=warn,
        directories=setup.config.run.backup,
        exclude=setup.config.run.exclude,
        deadline=deadline,
    )
