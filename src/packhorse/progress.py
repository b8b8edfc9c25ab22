"""The one progress interface: what a long operation reports to, whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """What a long operation reports to."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A new stage begins: its name, and its size in bytes where that is known."""

    def advance(self, count: int) -> None:
        """`count` more bytes are done. Callable from any thread."""


class Silent:
    """Shows nothing."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignored."""

    def advance(self, count: int) -> None:
        """Ignored."""
