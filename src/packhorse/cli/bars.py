"""Progress bars with rate and time left, for a terminal; loaded only there."""

from __future__ import annotations

import sys
from typing import NoReturn

from tqdm import tqdm

from packhorse.cli.console import unfailing


class Bars:
    """One bar a stage; the finished ones stay above."""

    def __init__(self) -> None:
        self._bar: tqdm[NoReturn] | None = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    @unfailing
    def stage(self, name: str, total: int | None = None) -> None:
        """A new bar; a stage of unknown size is a line."""
        self._close()
        if total is None:
            tqdm.write(name, file=sys.stderr)
        else:
            self._bar = tqdm(desc=name, total=total, unit="B", unit_scale=True, leave=True, file=sys.stderr)

    @unfailing
    def advance(self, count: int) -> None:
        """Move the bar of the present stage on by `count` bytes."""
        if self._bar is not None:
            self._bar.update(count)

    @unfailing
    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
